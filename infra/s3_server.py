"""A real S3-compatible server on this machine: OpenStack Swift with its s3api, one node.

    python infra/s3_server.py --bucket images --env-file s3.env &
    source s3.env

Installs Swift into ``.venv-swift/`` the first time. Prints the lines of the environment that reach
the server once it answers, then runs until it is told to stop. Needs nothing but Python itself;
``--install-only`` stops after the installation.
"""

import argparse
import contextlib
import ctypes
import hashlib
import hmac
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("SWIFT_VENV", ROOT / ".venv-swift"))
SWIFT = "swift>=2.38,<3"
USER = "dev:pipeline"
REGION = "us-east-1"
START_TIMEOUT_S = 60.0
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
BACKENDS = ("account", "container", "object")

BACKEND_CONFIG = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
mount_check = false
disable_fallocate = true
devices = {folder}/devices
swift_dir = {folder}
log_level = WARNING
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""

PROXY_CONFIG = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = {workers}
swift_dir = {folder}
log_level = WARNING
[pipeline:main]
pipeline = {pipeline}
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:s3api]
use = egg:swift#s3api
location = {region}
auth_pipeline_check = true
max_multi_delete_objects = 1000
[filter:tempauth]
use = egg:swift#tempauth
user_dev_pipeline = {secret} .admin
"""
MAKE_RINGS = """\
import sys
from swift.common.ring import RingBuilder
for argument in sys.argv[2:]:
    kind, port = argument.split("=")
    ring = RingBuilder(4, 1, 1)
    device = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "disk"}
    ring.add_dev(device | {"weight": 1.0})
    ring.rebalance()
    ring.get_ring().save(f"{sys.argv[1]}/{kind}.ring.gz")
"""

MIDDLEWARE = {  # name in the pipeline: name in Swift
    "catch_errors": "catch_errors",
    "gatekeeper": "gatekeeper",
    "healthcheck": "healthcheck",
    "cache": "memcache",
    "listing_formats": "listing_formats",
    "bulk": "bulk",
    "s3api": "s3api",
    "tempauth": "tempauth",
    "copy": "copy",
    "slo": "slo",
    "dlo": "dlo",
    "versioned_writes": "versioned_writes",
    "symlink": "symlink",
}


class SetupError(Exception):
    """The server cannot be installed or started here; the message says why."""


def main() -> int:
    """Install, start, print the environment, wait; return the exit code."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if arguments.with_parent:
        end_with_parent()
    try:
        install()
        if arguments.install_only:
            return 0
        with serve(arguments) as environment:
            publish(environment, arguments.env_file)
            signal.pause()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="port of the server; 0: a free one")
    parser.add_argument("--data", type=Path, help="folder of the data; a temporary one otherwise")
    parser.add_argument("--bucket", action="append", default=[], help="bucket to make; repeatable")
    parser.add_argument("--workers", type=int, default=0, help="processes of the proxy server")
    parser.add_argument("--env-file", type=Path, help="also write the environment to this file")
    parser.add_argument(
        "--with-parent", action="store_true", help="stop when the process that started it ends"
    )
    parser.add_argument("--install-only", action="store_true", help="install and stop")
    return parser.parse_args()


def install() -> None:
    """Install Swift into an environment of its own, unless that has been done."""
    stamp = VENV / ".installed"
    if stamp.exists():
        return
    print(f"installing {SWIFT} into {VENV}", file=sys.stderr)
    try:
        venv.create(VENV, with_pip=True, clear=True)
        command = [_program("python"), "-m", "pip", "install", "--quiet", SWIFT]
        subprocess.run(command, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"Swift could not be installed with pip: {error}") from error
    if not _imports_swift() and not (_install_erasure_code() and _imports_swift()):
        raise SetupError(
            "Swift needs the library liberasurecode; as root: apt-get install liberasurecode1"
        )
    stamp.touch()


def _imports_swift() -> bool:
    command = [_program("python"), "-c", "import swift, pyeclib.ec_iface, xattr"]
    return subprocess.run(command, capture_output=True).returncode == 0


def _install_erasure_code() -> bool:
    """Install what wheels of pyeclib bring along and source builds do not."""
    if os.geteuid() != 0:
        return False
    try:
        for arguments in (["update", "-qq"], ["install", "-qq", "-y", "liberasurecode1"]):
            subprocess.run(["apt-get", *arguments], check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextlib.contextmanager
def serve(arguments: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Run the four servers; give the environment that reaches them."""
    with contextlib.ExitStack() as stack:
        folder = arguments.data or Path(stack.enter_context(_make_folder()))
        folder = folder.resolve()
        _check_attributes(folder)
        secret = _keep_secret(folder)
        ports = {name: _find_port() for name in (*BACKENDS, "proxy")}
        port = ports["proxy"] = arguments.port or ports["proxy"]
        write_settings(folder, ports, secret=secret, workers=arguments.workers)
        servers = [stack.enter_context(_run_server(name, folder)) for name in (*BACKENDS, "proxy")]
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": REGION,
        }
        _wait_until_healthy(ports, servers, folder)
        for bucket in arguments.bucket:
            make_bucket(bucket, port=port, secret=secret)
        yield environment


def write_settings(folder: Path, ports: dict[str, int], *, secret: str, workers: int) -> None:
    """Write the configuration and, the first time, the rings of one device."""
    (folder / "devices" / "disk").mkdir(parents=True, exist_ok=True)
    hash_file = folder / "swift.conf"
    if not hash_file.exists():
        hash_file.write_text(f"[swift-hash]\nswift_hash_path_suffix = {secrets.token_hex(8)}\n")
    for kind in BACKENDS:
        settings = BACKEND_CONFIG.format(kind=kind, folder=folder, port=ports[kind])
        (folder / f"{kind}.conf").write_text(settings)
    _write_rings(folder, ports)
    filters = "".join(
        f"[filter:{name}]\nuse = egg:swift#{entry}\n"
        for name, entry in MIDDLEWARE.items()
        if f"[filter:{name}]" not in PROXY_CONFIG
    )
    proxy_file = folder / "proxy.conf"
    proxy_file.touch(mode=0o600)
    settings = PROXY_CONFIG.format(
        folder=folder,
        port=ports["proxy"],
        workers=workers,
        region=REGION,
        secret=secret,
        pipeline=" ".join([*MIDDLEWARE, "proxy-server"]),
    )
    proxy_file.write_text(settings + filters)


def _write_rings(folder: Path, ports: dict[str, int]) -> None:
    """Make the rings: 16 partitions, one copy, one device. One process for all, it is quicker."""
    arguments = [f"{kind}={ports[kind]}" for kind in BACKENDS]
    command = [_program("python"), "-c", MAKE_RINGS, folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"Swift's rings cannot be made: {done.stderr}")


@contextlib.contextmanager
def _run_server(name: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [_program(f"swift-{name}-server"), folder / f"{name}.conf", "--verbose"]
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its parent is gone, killed or not."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_healthy(
    ports: dict[str, int], servers: list[subprocess.Popen[bytes]], folder: Path
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and all(server.poll() is None for server in servers):
        if all(map(_is_listening, ports.values())) and _is_healthy(ports["proxy"]):
            return
        time.sleep(0.1)
    logs = "".join(
        file.read_text(errors="replace")[-1500:] for file in sorted(folder.glob("*.log"))
    )
    raise SetupError(f"Swift does not start; its logs end with:\n{logs}")


def _is_listening(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def make_bucket(bucket: str, *, port: int, secret: str) -> None:
    """Make a bucket with one signed request; one that is there already is fine.

    Signed by hand (Signature Version 4), so that this script needs no packages.
    """
    now = datetime.now(UTC)
    empty = hashlib.sha256(b"").hexdigest()
    headers = {
        "host": f"127.0.0.1:{port}",
        "x-amz-content-sha256": empty,
        "x-amz-date": now.strftime("%Y%m%dT%H%M%SZ"),
    }
    scope = f"{now:%Y%m%d}/{REGION}/s3/aws4_request"
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    request = f"PUT\n/{bucket}\n\n{lines}\n{names}\n{empty}"
    to_sign = "\n".join(
        ["AWS4-HMAC-SHA256", headers["x-amz-date"], scope, _digest(request.encode())]
    )
    key = f"AWS4{secret}".encode()
    for part in [*scope.split("/"), to_sign]:
        key = hmac.digest(key, part.encode(), "sha256")
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={USER}/{scope}, SignedHeaders={names}, Signature={key.hex()}"
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("PUT", f"/{bucket}", headers=headers)
    response = connection.getresponse()
    if response.status not in (200, 409):
        raise SetupError(f"cannot make bucket {bucket!r}: {response.status} {response.read()!r}")


def publish(environment: dict[str, str], env_file: Path | None) -> None:
    """Print the environment as shell lines, and write them to a file only its owner reads."""
    lines = "".join(f"export {name}={value}\n" for name, value in environment.items())
    if env_file is not None:
        env_file.touch(mode=0o600)
        env_file.write_text(lines)
    print(lines + "# ready", flush=True)


def _make_folder() -> tempfile.TemporaryDirectory[str]:
    shared_memory = Path("/dev/shm")
    base = shared_memory if os.access(shared_memory, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="s3-server-", dir=base)


def _check_attributes(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.setxattr(folder, "user.s3_server", b"1")
    except OSError as error:
        raise SetupError(
            f"Swift needs a folder with extended attributes, and {folder} will not do: {error}; "
            "choose another one with --data"
        ) from error


def _keep_secret(folder: Path) -> str:
    """Return the secret key of the folder's server: S3_SERVER_SECRET, or one made once."""
    file = folder / "secret"
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(os.environ.get("S3_SERVER_SECRET") or secrets.token_hex(16))
    return file.read_text()


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _program(name: str) -> str:
    return str(VENV / "bin" / name)


if __name__ == "__main__":
    sys.exit(main())
