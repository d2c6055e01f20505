"""The development stack is real: a nightly run submitted to it, and lookups served on it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from infra.manifests import INFRA, ROOT, kubernetes

KEY = "a-key-that-only-this-test-knows"
PORTS = 120


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a running stack."""
    if not (Path(sys.prefix) / ".installed-test").exists():
        pytest.skip("infra/test.sh has not installed this environment; dev.sh would")
    folder = tmp_path_factory.mktemp("dev")
    first = find_free_ports(PORTS)
    environment = {name: value for name, value in os.environ.items() if name[:3] != "AWS"}
    environment |= {
        "VENV": sys.prefix,
        "DEV": str(folder),
        "RAY_PORT": str(first),
        "S3_PORT": str(first + PORTS - 1),
        "RAY_TMP": f"/tmp/ray-dev-{first}",
    }
    dev = ["bash", INFRA / "dev.sh"]
    try:
        subprocess.run([*dev, "up"], env=environment, check=True, stdout=subprocess.DEVNULL)
        shown = subprocess.run(
            ["bash", "-c", f"source {folder}/env; env -0"],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        yield dict(line.split("=", 1) for line in shown.split("\0") if line)
    finally:
        done = subprocess.run([*dev, "down"], env=environment, capture_output=True, text=True)
    assert done.stdout.count("not running") == 2
    assert list(find_processes(str(folder))) == []


def find_free_ports(number: int) -> int:
    """Return the first of ``number`` ports in a row of which none is listened to."""
    for first in range(20_000, 30_000, number):
        if all(is_free(port) for port in range(first, first + number)):
            return first
    raise AssertionError("no free block of ports")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def find_processes(word: str) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in command:
            yield command


def submit(stack: dict[str, str], *command: str) -> str:
    """Run a command as a Ray job; return what it printed."""
    done = subprocess.run(
        ["ray", "job", "submit", "--", *command], env=stack, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def night(stack: dict[str, str]) -> dict[str, object]:
    """The report of a first nightly run."""
    printed = submit(stack, *NIGHTLY)
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


NIGHTLY = [
    *("image-nightly", "--input", "s3://dev/photos", "--output", "s3://dev/embeddings"),
    *("--index", "s3://dev/index", "--model", "fbnetv3_b.ra2_in1k", "--weights", "random:0"),
    *("--image-size", "64"),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_submitted_night_embeds_and_indexes_every_picture(night: dict[str, dict]) -> None:
    assert night["embed"]["rows"] == {"ok": 360}
    assert night["freshness"]["indexed_rows"] == 360


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_night_finds_nothing_to_do(stack: dict[str, str], night: dict[str, dict]) -> None:
    printed = submit(stack, *NIGHTLY)
    report = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert report["embed"]["images"]["embedded"] == 0
    assert report["freshness"]["generation"] == night["freshness"]["generation"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not shutil.which("prometheus"), reason="needs prometheus; infra/test.sh gets it"
)
def test_prometheus_finds_the_ray_of_the_stack(stack: dict[str, str], tmp_path: Path) -> None:
    address = f"127.0.0.1:{find_free_ports(1)}"
    command = [
        "prometheus",
        f"--config.file={stack['DEV']}/prometheus.yaml",
        f"--storage.tsdb.path={tmp_path}",
        f"--web.listen-address={address}",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 120
            while "up" not in (health := read_health(address)):
                assert time.monotonic() < deadline, health
                time.sleep(0.5)
        finally:
            server.terminate()


def read_health(address: str) -> list[str]:
    """Return how the Ray targets of a Prometheus are; nothing while it starts."""
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/targets", timeout=10) as answer:
            targets = json.load(answer)["data"]["activeTargets"]
    except urllib.error.URLError:
        return []
    return [t["health"] for t in targets if t["scrapePool"] == "ray"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_serve_config_of_the_manifest_starts_the_lookups(
    stack: dict[str, str], night: dict[str, dict], tmp_path: Path
) -> None:
    manifest = kubernetes()["RayService/image-lookups"]
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    port = find_free_ports(1)
    keys = tmp_path / "keys"
    keys.write_text(KEY + "\n")
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"]["flags"] = (
        f"--index s3://dev/index --host 0.0.0.0 --port {port} --api-key-file {keys}"
        f" --cpus-per-replica 0.5 --threads 1 --no-image-queries --cache-dir {tmp_path}"
    )
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    address = stack["RAY_API_SERVER_ADDRESS"]
    subprocess.run(["serve", "deploy", file, "--address", address], env=stack, cwd=ROOT, check=True)
    info = wait_for_info(f"http://127.0.0.1:{port}/v1/info")
    assert info["rows"] == 360
    assert info["generation"] == night["freshness"]["generation"]


def wait_for_info(url: str) -> dict[str, object]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {KEY}"})
    deadline = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
