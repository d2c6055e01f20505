"""Every manifest is valid, fits the jobs' settings, the image and the policies."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from infra.manifests import (
    INFRA,
    NIGHTLY_PATH,
    PROJECT,
    SETTINGS,
    find_clusters,
    find_containers,
    kubernetes,
    split_command,
    walk,
)
from jobs.nightly import main as run_nightly_job
from pipeline.cli import parse_settings
from pipeline.config import EmbedConfig, NightlyConfig, ServeConfig

OBJECTS = kubernetes()
RAY_OBJECTS = {name: o for name, o in OBJECTS.items() if o["apiVersion"] == "ray.io/v1"}
MONITORS = {name for name, o in OBJECTS.items() if o["apiVersion"].startswith("monitoring.")}
KUBERNETES_VERSION = "1.33"

CLUSTER_FIELDS = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec"),
    *("rayVersion", "workerGroupSpecs"),
}
JOB_FIELDS = {
    *("activeDeadlineSeconds", "backoffLimit", "entrypoint", "rayClusterSpec"),
    *("shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
}
# The fields that are used, as KubeRay 1.6 names them; with KUBERAY_CRDS set, its own schemas rule.
FIELDS = {
    "RayCluster": CLUSTER_FIELDS,
    "RayJob": JOB_FIELDS,
    "RayCronJob": {"schedule", "jobTemplate"},
    "RayService": {"serveConfigV2", "rayClusterConfig"},
}
WORKER_FIELDS = {
    *("groupName", "replicas", "minReplicas", "maxReplicas"),
    *("rayStartParams", "template"),
}
WITH_GPUS = ["RayJob/generated", "RayCronJob/nightly", "RayCluster/image-embedding"]


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - set(RAY_OBJECTS) - MONITORS))
def test_a_plain_object_is_valid_kubernetes(name: str) -> None:
    kubernetes_validate.validate(OBJECTS[name], KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("name", sorted(RAY_OBJECTS))
def test_a_ray_object_uses_the_fields_of_its_kind(name: str) -> None:
    item = RAY_OBJECTS[name]
    assert set(item["spec"]) <= FIELDS[item["kind"]]
    if item["kind"] == "RayCronJob":
        assert set(item["spec"]["jobTemplate"]) <= JOB_FIELDS
    (cluster,) = find_clusters(item)
    assert set(cluster) <= CLUSTER_FIELDS
    assert set(cluster["headGroupSpec"]) <= {"rayStartParams", "template"}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_FIELDS
        assert group["minReplicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", sorted(RAY_OBJECTS))
def test_the_pods_of_a_ray_object_are_valid_kubernetes(name: str) -> None:
    (cluster,) = find_clusters(RAY_OBJECTS[name])
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | group["template"]
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", sorted(RAY_OBJECTS))
def test_a_ray_object_fits_the_operators_own_schema(name: str) -> None:
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS is not set: a folder with the CRDs of a KubeRay release")
    item = RAY_OBJECTS[name]
    definition = yaml.safe_load((Path(folder) / f"ray.io_{item['kind'].lower()}s.yaml").read_text())
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    for mapping in walk(schema):
        if "properties" in mapping and "additionalProperties" not in mapping:
            open_ended = mapping.get("x-kubernetes-preserve-unknown-fields", mapping is schema)
            mapping["additionalProperties"] = bool(open_ended)
    jsonschema.validate({"spec": item["spec"]}, schema)


@pytest.mark.parametrize("name", ["RayJob/generated", "RayCronJob/nightly"])
def test_an_entrypoint_parses_with_the_settings_of_its_job(name: str) -> None:
    spec = OBJECTS[name]["spec"]
    script, flags = split_command(spec.get("jobTemplate", spec)["entrypoint"])
    assert script in PROJECT["scripts"]
    parse_settings(SETTINGS[script], flags)


def test_the_cron_job_submits_a_nightly_run_that_parses() -> None:
    (container,) = find_containers(OBJECTS["CronJob/nightly"])
    assert container["command"] == ["ray", "job", "submit"]
    options, command = container["args"][:1], container["args"][2:]
    assert options == ["--address=http://image-embedding-head-svc:8265"]
    assert container["args"][1] == "--"
    script, flags = split_command(shlex.join(command))
    assert script == "image-nightly"
    parse_settings(NightlyConfig, flags)


@pytest.mark.parametrize("name", ["RayJob/generated", "RayCronJob/nightly"])
def test_kuberay_that_sees_no_exit_code_tries_no_run_again(name: str) -> None:
    spec = OBJECTS[name]["spec"]
    assert spec.get("jobTemplate", spec)["backoffLimit"] == 0


def test_the_cron_job_checks_the_settings_it_submits_and_gives_up_on_wrong_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = OBJECTS["CronJob/nightly"]["spec"]["jobTemplate"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    (check,) = job["template"]["spec"]["initContainers"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": check["name"], "operator": "In", "values": [2]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # the policy asks for that
    (submit,) = find_containers(OBJECTS["CronJob/nightly"])
    assert submit["args"][-1] in check["args"]
    (mount,) = check["volumeMounts"]
    assert NIGHTLY_PATH.startswith(mount["mountPath"])
    (volume,) = job["template"]["spec"]["volumes"]
    assert (volume["name"], volume["configMap"]["name"]) == (mount["name"], "nightly")
    script, flags = split_command(shlex.join(check["command"] + check["args"]))
    assert script == "image-nightly"
    assert run_nightly_job(flags) == 0
    wrong = tmp_path / "nightly.toml"
    wrong.write_text((INFRA / "nightly.toml").read_text().replace("precision =", "precison ="))
    assert run_nightly_job([f"--config={wrong}", "--check"]) == 2
    assert "did you mean precision?" in capsys.readouterr().err


def test_the_cron_job_submits_to_the_cluster_that_stays_with_its_token() -> None:
    cluster = OBJECTS["RayCluster/image-embedding"]
    (container,) = find_containers(OBJECTS["CronJob/nightly"])
    environment = {item["name"]: item for item in container["env"]}
    secret = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert cluster["spec"]["authOptions"] == {"mode": environment["RAY_AUTH_MODE"]["value"]}
    assert secret == {"name": cluster["metadata"]["name"], "key": "auth_token"}
    assert f"{cluster['metadata']['name']}-head-svc:8265" in container["args"][0]


def test_the_lookups_parse_with_the_settings_of_the_serve_job() -> None:
    text = OBJECTS["RayService/image-lookups"]["spec"]["serveConfigV2"]
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = schema.applications
    assert application.import_path == "pipeline.service.cluster:build_application"
    config = parse_settings(ServeConfig, shlex.split(application.args["flags"]))
    assert (config.host, config.port) == (schema.http_options.host, schema.http_options.port)
    volumes = {mapping["mountPath"] for mapping in walk(OBJECTS) if "mountPath" in mapping}
    assert str(Path(config.api_key_file or "").parent) in volumes
    assert config.index == nightly().index.index


def nightly() -> NightlyConfig:
    return parse_settings(NightlyConfig, ["--config", str(INFRA / "nightly.toml")])


@pytest.mark.parametrize("name", WITH_GPUS)
def test_the_gpus_a_job_asks_for_fit_the_nodes_it_can_get(name: str) -> None:
    if name == "RayJob/generated":
        _, flags = split_command(OBJECTS[name]["spec"]["entrypoint"])
        config = parse_settings(EmbedConfig, flags)
    else:
        config = nightly().embed
    (cluster,) = find_clusters(OBJECTS[name])
    (group,) = cluster["workerGroupSpecs"]
    (container,) = find_containers(group)
    node = container["resources"]["limits"]
    assert config.actors is not None
    assert config.actors * (config.gpus_per_actor or 0) <= group["maxReplicas"] * int(
        node["nvidia.com/gpu"]
    )
    assert (config.cpus_per_actor or 0) < float(node["cpu"]), "reading needs a core as well"


def test_the_clusters_of_all_jobs_are_alike_but_for_the_head() -> None:
    clusters = [find_clusters(OBJECTS[name])[0] for name in WITH_GPUS]
    workers = [cluster["workerGroupSpecs"] for cluster in clusters]
    assert workers[0] == workers[1] == workers[2]
    nightly_heads = [cluster["headGroupSpec"] for cluster in clusters[1:]]
    assert nightly_heads[0] == nightly_heads[1]


@pytest.mark.parametrize("name", ["RayCronJob/nightly", "RayCluster/image-embedding"])
def test_the_head_mounts_the_nightly_settings(name: str) -> None:
    (cluster,) = find_clusters(OBJECTS[name])
    pod = cluster["headGroupSpec"]["template"]["spec"]
    mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
    name = mounts[str(Path(NIGHTLY_PATH).parent)]
    assert {"name": name, "configMap": {"name": "nightly"}} in pod["volumes"]


@pytest.mark.parametrize("name", WITH_GPUS)
def test_gpu_workers_take_spot_nodes_and_scale_to_zero_while_the_head_stays_off_them(
    name: str,
) -> None:
    (cluster,) = find_clusters(OBJECTS[name])
    (group,) = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"]
    assert group["minReplicas"] == 0
    avoided = list_labels(cluster["headGroupSpec"], "required")
    wanted = list_labels(group, "preferred")
    assert {label: ("NotIn", values) for label, (_, values) in wanted.items()} == avoided
    assert {operator for operator, _ in wanted.values()} == {"In"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def list_labels(group: dict[str, Any], rule: str) -> dict[str, tuple[str, list[str]]]:
    affinity = group["template"]["spec"]["affinity"]["nodeAffinity"]
    terms = affinity[f"{rule}DuringSchedulingIgnoredDuringExecution"]
    expressions = [e for mapping in walk(terms) for e in mapping.get("matchExpressions", [])]
    return {e["key"]: (e["operator"], e["values"]) for e in expressions}


def test_no_night_reaches_into_the_next() -> None:
    for name in ("RayCronJob/nightly", "CronJob/nightly"):
        spec = OBJECTS[name]["spec"]
        assert re.fullmatch(r"\d+ \d+ \* \* \*", spec["schedule"])
        job = spec["jobTemplate"].get("spec", spec["jobTemplate"])
        assert job["activeDeadlineSeconds"] < 24 * 3600
    assert OBJECTS["CronJob/nightly"]["spec"]["concurrencyPolicy"] == "Forbid"


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_pods_run_without_privileges(name: str) -> None:
    for mapping in walk(OBJECTS[name]):
        if "containers" in mapping:
            assert mapping["securityContext"]["runAsNonRoot"] is True
            assert mapping["securityContext"]["runAsUser"] == 1000
        for container in mapping.get("containers", []):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_everything_lives_in_one_namespace() -> None:
    for name, item in OBJECTS.items():
        if item["kind"] != "Namespace":
            assert item["metadata"]["namespace"] == "image-embedding", name


def test_jobs_and_lookups_have_service_accounts_of_their_own() -> None:
    for name, item in RAY_OBJECTS.items():
        used = {m["serviceAccountName"] for m in walk(item) if "serviceAccountName" in m}
        assert used == {"image-lookups" if item["kind"] == "RayService" else "image-embedding"}
        assert f"ServiceAccount/{used.pop()}" in OBJECTS, name
