"""S3 servers on loopback: OpenStack Swift where it installs, moto's server otherwise."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import boto3
from botocore.config import Config
from moto.server import ThreadedMotoServer

from pipeline.config import StorageOptions
from pipeline.storage import Storage

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "s3_server.py"
ACCESS_KEY = "dev:pipeline"


@dataclass(frozen=True)
class S3Server:
    """A running server. Its credentials are in the environment of the test session.

    Attributes:
        endpoint_url: Where it listens.
        kind: ``"swift"`` or ``"moto"``.
        note: Why it is not Swift, or empty.
    """

    endpoint_url: str
    kind: str
    note: str = ""

    def make_bucket(self) -> str:
        """Make an empty bucket and return its URI."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        connect(self.endpoint_url).create_bucket(Bucket=name)
        return f"s3://{name}"

    def storage(self, **options: object) -> Storage:
        """Return a storage of this server, by default with short waits."""
        settings = {"storage_attempts": 4, "storage_timeout_s": 10.0} | options
        return Storage(StorageOptions(endpoint_url=self.endpoint_url, **settings))


def connect(endpoint_url: str):
    """Return a plain boto3 client, which knows nothing of the code under test."""
    config = Config(retries={"total_max_attempts": 1})
    # A session of its own: boto3's default one keeps the credentials that it first saw.
    return boto3.Session().client("s3", endpoint_url=endpoint_url, config=config)


@contextmanager
def run_moto(note: str = "") -> Iterator[S3Server]:
    """Run moto's server in a thread; starts in a second."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}", "moto", note)
    finally:
        server.stop()


@contextmanager
def run_swift() -> Iterator[S3Server]:
    """Run Swift, as infra/s3_server.py brings it up, with the session's credentials.

    Raises:
        RuntimeError: It cannot be installed or started here; the message says why.
    """
    secret = {"S3_SERVER_SECRET": os.environ["AWS_SECRET_ACCESS_KEY"]}
    with TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "--with-parent"],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | secret,
        )
        try:
            environment = dict(read_environment(process))
            if "AWS_ENDPOINT_URL" not in environment:
                errors.seek(0)
                raise RuntimeError(errors.read().decode(errors="replace").strip()[-500:])
            yield S3Server(environment["AWS_ENDPOINT_URL"], "swift")
        finally:
            process.terminate()
            process.wait(30)
            process.stdout.close()


def read_environment(process: subprocess.Popen) -> Iterator[tuple[str, str]]:
    for line in process.stdout:
        text = line.decode().strip()
        if text == "# ready":
            return
        yield tuple(text.removeprefix("export ").split("=", 1))
