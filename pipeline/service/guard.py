"""The gate in front of every request: headers, host, keys, rate, body size and time."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from pipeline.service.access import ApiKeys
from pipeline.service.problems import Problem, overloaded

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "geolocation=(), microphone=(), payment=(), usb=()",
}
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """What one request, and one client, may cost.

    Attributes:
        max_body_bytes: Longest request body.
        max_concurrent: Requests that may be under way at the same time.
        timeout_s: Longest time from the first byte read to the last byte sent.
        requests_per_s: Sustained rate of one client; twice as many may come in a burst. 0 is
            no limit.
        hosts: Names the service may be called by, or None for any. A browser on this machine
            can be tricked into calling a local service by another name (DNS rebinding).
    """

    max_body_bytes: int
    max_concurrent: int
    timeout_s: float
    requests_per_s: float = 0.0
    hosts: frozenset[str] | None = None


class RateLimiter:
    """A token bucket per client, for the most recent ``max_clients`` of them."""

    def __init__(self, requests_per_s: float, *, max_clients: int = 10_000) -> None:
        self._rate = requests_per_s
        self._burst = max(1.0, 2 * requests_per_s)
        self._max_clients = max_clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, client: str, now_s: float) -> float:
        """Take a token; return 0, or the seconds to wait where there is none."""
        if self._rate <= 0:
            return 0.0
        tokens, then_s = self._buckets.pop(client, (self._burst, now_s))
        tokens = min(self._burst, tokens + (now_s - then_s) * self._rate)
        wait_s = 0.0 if tokens >= 1 else (1 - tokens) / self._rate
        self._buckets[client] = (tokens if wait_s else tokens - 1, now_s)
        if len(self._buckets) > self._max_clients:
            self._buckets.popitem(last=False)
        return wait_s


class Guard:
    """ASGI middleware; what it turns away never reaches the application."""

    def __init__(
        self, app: Asgi, keys: ApiKeys, limits: GuardLimits, *, open_paths: Container[str]
    ) -> None:
        """Put a guard in front of ``app``.

        Args:
            app: What is guarded.
            keys: Who may pass; everybody where empty.
            limits: What a request may cost.
            open_paths: Paths that need no key: they show no data.
        """
        self._app = app
        self._open_paths = open_paths
        self._keys = keys
        self._limits = limits
        self._limiter = RateLimiter(limits.requests_per_s)
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass the server's lifespan on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = _Reply(send)
        try:
            self._check(scope)
            await self._pass_on(scope, receive, reply)
        except (Problem, TimeoutError) as error:
            if reply.started:
                raise
            problem = error if isinstance(error, Problem) else self._explain_timeout()
            await problem.to_response()(scope, receive, reply.send)

    async def _pass_on(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        bounded = _BoundedBody(receive, self._limits.max_body_bytes)
        if self._under_way >= self._limits.max_concurrent and scope["path"] not in self._open_paths:
            raise overloaded("requests")
        self._under_way += 1
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await self._app(scope, bounded.receive, reply.send)
        finally:
            self._under_way -= 1

    def _explain_timeout(self) -> Problem:
        limit_s = self._limits.timeout_s
        return Problem(504, "timeout", detail=f"not answered within {limit_s:g} s", retry_after_s=1)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        guarded = scope["path"] not in self._open_paths
        if guarded:  # probes call by address, and see no data
            self._check_host(headers)
        self._check_length(headers)
        key = _find_key(headers)
        known = bool(self._keys.digests) and self._keys.accept(key)
        # Guesses of keys share the bucket of their address, whatever they guess.
        self._check_rate(key if known else str((scope.get("client") or ("",))[0]))
        if self._keys.digests and not known and guarded:
            raise Problem(
                401, "unauthorized", detail="pass a key as Authorization: Bearer … or X-API-Key: …"
            )

    def _check_rate(self, client: str) -> None:
        wait_s = self._limiter.check(client, time.monotonic())
        if wait_s:
            detail = f"more than {self._limits.requests_per_s:g} requests a second"
            raise Problem(429, "rate_limited", detail=detail, retry_after_s=math.ceil(wait_s))

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._limits.hosts is not None and name.lower() not in self._limits.hosts:
            raise Problem(
                421, "unknown_host", detail="not known by this name; see the setting allowed_hosts"
            )

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.max_body_bytes:
            raise _explain_length(self._limits.max_body_bytes)


def _explain_length(max_body_bytes: int) -> Problem:
    return Problem(
        413, "body_too_large", detail=f"a request may have at most {max_body_bytes} bytes"
    )


def _find_key(headers: Headers) -> str:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials:
        return credentials.strip()
    return headers.get("x-api-key", "")


class _Reply:
    """Adds the headers to every answer, and remembers whether one has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)


class _BoundedBody:
    """Counts the bytes of a body that came without an honest length."""

    def __init__(self, receive: Receive, max_body_bytes: int) -> None:
        self._receive = receive
        self._max_body_bytes = max_body_bytes
        self._received_bytes = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._received_bytes += len(message.get("body", b""))
            if self._received_bytes > self._max_body_bytes:
                raise _explain_length(self._max_body_bytes)
        return message
