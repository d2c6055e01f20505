"""What goes around ``ray.init``: an address that answers, and signal handlers that stay ours."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import SettingsError

_KNOCK_S = 10.0


@contextmanager
def guard_joining(address: str | None) -> Iterator[None]:
    """Check that the cluster to be joined answers; put back the handler that Ray replaces.

    Ray would try an address for minutes. It also installs a handler of SIGTERM of its own, which
    ends the process with the exit code 15.

    Args:
        address: The address that is about to be joined; that of ``RAY_ADDRESS`` otherwise.

    Raises:
        SettingsError: Nobody answers there.
    """
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _check_reachable(target)
        yield
    except OSError as error:
        raise SettingsError(
            f"no Ray cluster answers at {target!r} ({error}); check --ray-address or RAY_ADDRESS"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _check_reachable(target: str) -> None:
    host, _, port = target.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
