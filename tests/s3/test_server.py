import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.storage import Storage
from s3.servers import SCRIPT, connect, read_environment


@contextmanager
def run(*arguments: str) -> Iterator[dict[str, str]]:
    """Run the server script; give the environment that it prints."""
    command = [sys.executable, SCRIPT, "--with-parent", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        environment = dict(read_environment(process))
        if not environment:
            pytest.skip(f"no Swift here: {process.communicate()[1].decode()[-300:]}")
        try:
            yield environment
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode == 0


@pytest.mark.slow
def test_the_server_keeps_its_data_keys_and_buckets_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env_file = tmp_path / "s3.env"
    arguments = ["--data", str(tmp_path / "data"), "--bucket", "images", "--bucket", "out"]
    with run(*arguments, "--env-file", str(env_file)) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        listed = connect(environment["AWS_ENDPOINT_URL"]).list_buckets()["Buckets"]
        assert sorted(bucket["Name"] for bucket in listed) == ["images", "out"]
        assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
        assert environment["AWS_SECRET_ACCESS_KEY"] in env_file.read_text()
        Storage().put("s3://images/x", b"kept")

    with run(*arguments) as again:
        assert again["AWS_SECRET_ACCESS_KEY"] == environment["AWS_SECRET_ACCESS_KEY"]
        monkeypatch.setenv("AWS_ENDPOINT_URL", again["AWS_ENDPOINT_URL"])
        assert Storage().read("s3://images/x") == b"kept"


def test_a_folder_that_will_not_do_is_named() -> None:
    command = [sys.executable, SCRIPT, "--data", "/proc/s3-server"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Swift could not be installed" in done.stderr:
        pytest.skip("no Swift here")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: Swift needs a folder with extended attributes, and /proc/s3-" in done.stderr
    assert "choose another one with --data" in done.stderr
