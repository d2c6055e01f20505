"""Connections of the plain server: how many one client may hold, and how long one may dawdle.

The server's own limits begin when a request has come in full: whoever sends half a header, and then
a byte now and then, would hold a connection and its file descriptor for ever.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MAX_HEADERS_BYTES = 64 * 1024
"""Longest request line and headers, together with what came in one read after them."""

_REFUSAL = b"HTTP/1.1 %s\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one connection, and one client, may hold.

    Attributes:
        headers_timeout_s: Longest time from the end of an answer, or from the beginning of the
            connection, to the end of the next request's headers.
        per_client: Connections that one address may hold open; 0 is no limit.
        open: Connections that are open now, by address.
    """

    headers_timeout_s: float
    per_client: int
    open: Counter[str] = field(default_factory=Counter)


def make_protocol(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """Return what a ``uvicorn.Config`` takes as ``http``: its usual protocol, with limits."""
    return cast(type[asyncio.Protocol], partial(BoundedProtocol, limits=limits))


class BoundedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """The server's HTTP/1.1 protocol, with a deadline for headers and a bound per address."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._address = ""
        self._headers_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Count the connection, and wait for its first request."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._limits.open[self._address] += 1
        if 0 < self._limits.per_client < self._limits.open[self._address]:
            self._refuse(b"429 Too Many Requests")
        else:
            self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Take some bytes of a request; whether they are the last of its headers, shows after."""
        super().data_received(data)
        self._headers_bytes += len(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()  # from here on, the time limit of requests counts
        elif self._headers_bytes > MAX_HEADERS_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_response_complete(self) -> None:
        """Wait for the next request, unless it has come already."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        self._limits.open[self._address] -= 1
        if not self._limits.open[self._address]:
            del self._limits.open[self._address]
        super().connection_lost(exc)

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(_REFUSAL % status)
            self.transport.close()

    def _await_headers(self) -> None:
        self._stop_waiting()
        self._headers_bytes = 0
        self._deadline = self.loop.call_later(self._limits.headers_timeout_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
