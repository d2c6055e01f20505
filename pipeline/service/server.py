"""Serving: on Ray Serve, or as one plain server in this process."""

import logging
import signal
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import uvicorn

from pipeline.config import ServeConfig
from pipeline.records import describe_job
from pipeline.service.access import check_exposure, read_api_keys
from pipeline.service.connections import ConnectionLimits, make_protocol
from pipeline.service.guard import Asgi

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServeReport:
    """Report of a service that has stopped.

    Attributes:
        index: URI of the index.
        url: Where it listened.
        seconds: How long.
    """

    index: str
    url: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return describe_job("serve") | asdict(self)


def check_keys(config: ServeConfig) -> None:
    """Refuse to let strangers in unasked.

    Raises:
        SettingsError: The address is public, and there is neither a key nor ``--allow-public``.
    """
    keys = read_api_keys(config.api_key_file)
    check_exposure(config.host, has_keys=bool(keys.digests), allow_public=config.allow_public)


def serve_here(config: ServeConfig) -> ServeReport:
    """Answer lookups in this process until SIGINT or SIGTERM."""
    from pipeline.service.app import build_app  # FAISS and Arrow take seconds to import

    started_s = time.monotonic()
    server = make_server(build_app(config), config)
    sock = server.config.bind_socket()
    sock.listen(server.config.backlog)  # whoever reads the log line below may connect at once
    host, port = sock.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("serving %s on %s", config.index, url)
    if config.open:
        webbrowser.open(url)
    with catch_signals(threading.Event()):
        server.run(sockets=[sock])
    return ServeReport(config.index, url, round(time.monotonic() - started_s, 3))


def make_server(app: Asgi, config: ServeConfig) -> uvicorn.Server:
    """Return a server that finishes what has begun when it is stopped."""
    limits = ConnectionLimits(config.headers_timeout_s, config.connections_per_client)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            http=make_protocol(limits),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(config.shutdown_s),
        )
    )


@contextmanager
def catch_signals(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` on SIGINT and SIGTERM instead of ending the process.

    Around a server that catches them itself: it sends them on once it has ended.
    """
    caught = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
