"""Fixtures that several test modules share."""

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from s3.faulty_proxy import FaultyProxy
from s3.servers import ACCESS_KEY, S3Server, run_moto, run_swift

if TYPE_CHECKING:
    from service.gallery import Gallery


def pytest_configure(config: pytest.Config) -> None:
    """Set the credentials of the session's S3 servers, for workers started by tests as well."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=secrets.token_hex(16),
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    )


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """A real S3 server: Swift, or moto's where Swift cannot be installed, and says so."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(run_swift())
        except RuntimeError as error:
            writer = request.config.get_terminal_writer()
            writer.line(f"\nmoto stands in for Swift: {error}", yellow=True)
            server = stack.enter_context(run_moto(note=str(error)))
        yield server


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    """An S3 server that honours If-Match on PUT, which Swift does not."""
    with run_moto() as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> str:
    """URI of a new, empty bucket."""
    return s3_server.make_bucket()


@pytest.fixture
def faulty_s3(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """A proxy in front of ``s3_server``; use its ``endpoint_url`` and ``inject`` faults."""
    with FaultyProxy(s3_server.endpoint_url) as proxy:
        yield proxy


GROUPS = ("gallery", "moto_server", "s3_server", "ray_cluster", "serve_on_ray")
"""Fixtures that take seconds to set up: the tests of each run in one process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run pure tests first, then those that share a server, then those that share a Ray.

    Of several processes one begins with the tests on Ray, which take longest. Those that need a Ray
    of their own in this process come after the others of theirs.
    """

    def find_group(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return max((place for place, name in enumerate(GROUPS, 1) if name in names), default=0)

    on_ray = GROUPS.index("ray_cluster") + 1
    items.sort(key=find_group)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: find_group(item) < on_ray)
    for item in items:
        group = find_group(item)
        if group:
            name = "ray" if group >= on_ray else GROUPS[group - 1]
            item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of a Ray cluster with two cores; this process has joined it, others may."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=256 * 2**20,
        )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of fbnetv3_b, the quickest backbone, with sane random weights."""
    from pipeline.backbones import load_weights, save_weights

    path = tmp_path_factory.mktemp("weights") / "fbnetv3_b.safetensors"
    loaded = load_weights("fbnetv3_b.ra2_in1k", "random:0")
    save_weights(loaded.state_dict, str(path))
    return path


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> "Gallery":
    """Sixty indexed pictures in six colours, with a map; read only."""
    from service.gallery import Gallery

    made = Gallery(tmp_path_factory.mktemp("gallery"))
    made.add_shard(60)
    made.build()
    return made
