"""The image is pinned, unprivileged, complete, and the one that everything else names."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import pipeline
from infra.manifests import INFRA, PROJECT, ROOT, find_clusters, find_containers, kubernetes

DOCKERFILE = (INFRA / "Dockerfile").read_text()
VARIANTS = set(re.findall(r"^\s+(\w+)\) extras=", DOCKERFILE, re.MULTILINE))
CONSTRAINTS = dict(
    line.split("==") for line in (INFRA / "constraints.txt").read_text().splitlines()
)


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def list_images() -> set[str]:
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    cluster = yaml.safe_load((INFRA / "aws" / "cluster.yaml").read_text())
    return {
        *(container["image"] for container in find_containers(kubernetes())),
        *(service["image"] for service in compose["services"].values()),
        cluster["docker"]["image"],
        *re.findall(r"-t (\S+)", DOCKERFILE),
    }


def test_the_base_is_pinned_to_a_patch_release() -> None:
    (default,) = re.findall(r"^ARG PYTHON=(\S+)", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"3\.1[123]\.\d+-slim-\w+", default)
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert set(bases) == {"python:${PYTHON}", "dependencies"}


def test_it_runs_as_the_user_that_the_manifests_name() -> None:
    user = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)[-1]
    assert user == "1000:1000"
    assert "useradd --create-home --uid 1000" in DOCKERFILE


def test_what_it_copies_exists_and_is_let_through_to_the_builder() -> None:
    ignored = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    let_through = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert source in let_through


def test_a_change_of_code_or_of_the_readme_installs_no_dependency_again() -> None:
    """Layers are rebuilt from the first changed COPY on, and a venv is one layer when copied."""
    dependencies, _, rest = DOCKERFILE.partition("FROM dependencies AS project")
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", dependencies, re.MULTILINE)
    assert copied == ["infra/constraints.txt pyproject.toml"]
    assert "COPY --from=dependencies /opt/venv /opt/venv" in rest
    assert rest.index("/opt/venv /opt/venv") < rest.index("COPY --from=project")


def test_its_extras_exist_in_the_project() -> None:
    extras = re.findall(r"extras=([\w,-]+)", DOCKERFILE)
    assert set(",".join(extras).split(",")) <= set(PROJECT["optional-dependencies"])
    assert '".[$extras]"' in DOCKERFILE


@pytest.mark.parametrize("extra", ["", "cpu", "gpu", "gpu-decode", "openvino", "serve"])
def test_every_dependency_is_pinned_within_the_projects_bounds(extra: str) -> None:
    pinned = {normalise(name): version for name, version in CONSTRAINTS.items()}
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in map(Requirement, listed):
        found = pinned[normalise(requirement.name)]
        assert requirement.specifier.contains(found), f"{requirement} is pinned to {found}"


def test_the_manifests_name_the_ray_that_is_in_the_image() -> None:
    versions = {cluster["rayVersion"] for cluster in find_clusters(kubernetes())}
    assert versions == {CONSTRAINTS["ray"]} == {version("ray")}


@pytest.mark.parametrize("image", sorted(list_images()))
def test_every_image_is_pinned_and_ours_is_of_this_version(image: str) -> None:
    name, _, tag = image.rpartition(":")
    assert name, f"{image} has no tag"
    assert tag != "latest"
    if Path(name).name == PROJECT["name"]:
        release, _, variant = tag.rpartition("-")
        assert release == pipeline.__version__
        assert variant in VARIANTS


def test_gpu_nodes_get_the_cuda_variant_and_lookups_the_other() -> None:
    for item in kubernetes().values():
        own = (c for c in find_containers(item) if "image-embedding-pipeline" in c["image"])
        for container in own:
            wants_gpu = item["kind"] in ("RayJob", "RayCronJob", "RayCluster")
            assert container["image"].endswith("-cuda" if wants_gpu else "-cpu")
