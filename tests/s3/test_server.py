import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import StorageOptions
from pipeline.storage import Storage
from s3.servers import SCRIPT, connect, read_environment


def start(*arguments: str) -> tuple[subprocess.Popen, dict[str, str]]:
    """Start the server script; give its process and the environment that it prints."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    return process, dict(read_environment(process))


def stop(process: subprocess.Popen) -> int:
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    return process.returncode


def test_the_server_keeps_its_data_keys_and_buckets_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env_file = tmp_path / "s3.env"
    arguments = ["--data", str(tmp_path / "data"), "--bucket", "images", "--bucket", "out"]
    process, environment = start(*arguments, "--env-file", str(env_file))
    if not environment:
        pytest.skip(f"no Swift here: {process.communicate()[1].decode()[-300:]}")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    listed = connect(environment["AWS_ENDPOINT_URL"]).list_buckets()["Buckets"]
    assert sorted(bucket["Name"] for bucket in listed) == ["images", "out"]
    assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
    assert environment["AWS_SECRET_ACCESS_KEY"] in env_file.read_text()
    Storage(StorageOptions()).put("s3://images/x", b"kept")
    assert stop(process) == 0

    process, again = start(*arguments)
    assert again["AWS_SECRET_ACCESS_KEY"] == environment["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", again["AWS_ENDPOINT_URL"])
    assert Storage(StorageOptions()).read("s3://images/x") == b"kept"
    assert stop(process) == 0


def test_a_folder_that_will_not_do_is_named() -> None:
    process, environment = start("--data", "/proc/s3-server")
    errors = process.communicate()[1].decode()
    if "Swift could not be installed" in errors:
        pytest.skip("no Swift here")
    assert process.returncode == 1
    assert not environment
    assert errors.startswith("error: Swift needs a folder with extended attributes, and /proc/s3-")
    assert "choose another one with --data" in errors
