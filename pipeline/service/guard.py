"""The gate in front of every request: host, site, keys, rate, body size and time."""

import asyncio
import ipaddress
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Container, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

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
PROBES = frozenset({"/healthz", "/readyz"})
"""Paths that a machine asks by address, however busy the service is."""
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """What one request, and one client, may cost.

    Attributes:
        max_body_bytes: Longest request body.
        max_bodies_bytes: All request bodies that are held at the same time; half of it for one
            client, so that nobody can take it all.
        max_concurrent: Requests that may be under way at the same time.
        timeout_s: Longest time from the first byte read to the last byte sent.
        requests_per_s: Sustained rate of one client; twice as many may come in a burst. 0 is
            no limit.
        hosts: Names the service may be called by beside ``localhost`` and addresses, or None for
            any. A browser can be tricked into calling a service of its own machine or network by
            another site's name (DNS rebinding), but not by an address or as ``localhost``.
        origins: Other sites whose pages may send requests; ``*`` is any.
    """

    max_body_bytes: int
    max_concurrent: int
    timeout_s: float
    max_bodies_bytes: int = 256 * 2**20
    requests_per_s: float = 0.0
    hosts: frozenset[str] | None = None
    origins: frozenset[str] = frozenset()


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


class BodyBudget:
    """The bytes of all request bodies that are held at the same time, by client."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()
        self._held_bytes = 0

    def take(self, client: str, size_bytes: int) -> None:
        """Hold some more bytes for a client.

        Raises:
            Problem: 429 that client holds its half, 503 all clients together hold everything.
        """
        if self._held_bytes + size_bytes > self._max_bytes:
            raise overloaded("request bodies")
        if self._held[client] + size_bytes > self._max_bytes // 2:
            detail = f"request bodies of more than {self._max_bytes // 2} bytes at the same time"
            raise Problem(429, "too_many_bytes", detail=detail, retry_after_s=1)
        self._held[client] += size_bytes
        self._held_bytes += size_bytes

    def give_back(self, client: str, size_bytes: int) -> None:
        """Let go of what a request held."""
        self._held_bytes -= size_bytes
        self._held[client] -= size_bytes
        if not self._held[client]:
            del self._held[client]


class Guard:
    """ASGI middleware; what it turns away never reaches the application.

    Attributes:
        under_way: Requests that the application is answering.
    """

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
        self._budget = BodyBudget(limits.max_bodies_bytes)
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass the server's lifespan on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = _Reply(send)
        try:
            client = self._check(scope)
            body = _BoundedBody(receive, client, self._budget, self._limits.max_body_bytes)
            try:
                await self._pass_on(scope, body, reply)
            finally:
                body.close()
        except (Problem, TimeoutError) as error:
            if reply.started:
                raise
            problem = error if isinstance(error, Problem) else self._explain_timeout()
            await problem.to_response()(scope, receive, reply.send)

    async def _pass_on(self, scope: Scope, body: "_BoundedBody", reply: "_Reply") -> None:
        if self.under_way >= self._limits.max_concurrent and scope["path"] not in self._open_paths:
            raise overloaded("requests")
        self.under_way += 1
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await self._app(scope, body.receive, reply.send)
        finally:
            self.under_way -= 1

    def _explain_timeout(self) -> Problem:
        limit_s = self._limits.timeout_s
        return Problem(504, "timeout", detail=f"not answered within {limit_s:g} s", retry_after_s=1)

    def _check(self, scope: Scope) -> str:
        """Return the client: its API key, or its address where it has none."""
        headers = Headers(scope=scope)
        address = str((scope.get("client") or ("",))[0])
        if scope["path"] in PROBES:
            return address
        self._check_host(headers)
        self._check_site(scope["method"], headers)
        self._check_length(headers)
        key = _find_key(headers)
        known = bool(self._keys.digests) and self._keys.accept(key)
        # Guesses of keys share the bucket of their address, whatever they guess.
        client = key if known else address
        self._check_rate(client)
        if self._keys.digests and not known and scope["path"] not in self._open_paths:
            raise Problem(
                401, "unauthorized", detail="pass a key as Authorization: Bearer … or X-API-Key: …"
            )
        return client

    def _check_rate(self, client: str) -> None:
        wait_s = self._limiter.check(client, time.monotonic())
        if wait_s:
            detail = f"more than {self._limits.requests_per_s:g} requests a second"
            raise Problem(429, "rate_limited", detail=detail, retry_after_s=math.ceil(wait_s))

    def _check_host(self, headers: Headers) -> None:
        name = find_host_name(headers.get("host", ""))
        if self._limits.hosts is None or name in self._limits.hosts or is_own_name(name):
            return
        detail = "not known by this name; start the service with --allowed-hosts and the name"
        raise Problem(421, "unknown_host", detail=detail)

    def _check_site(self, method: str, headers: Headers) -> None:
        """Refuse what the page of another site sends: a form needs nobody's leave to do so.

        Browsers say where a request comes from; other programs send neither header.
        """
        origin = headers.get("origin")
        if method in _SAFE_METHODS or self._limits.origins & {origin, "*"}:
            return
        site = headers.get("sec-fetch-site")
        if site is not None:
            allowed = site in ("same-origin", "none")
        else:
            allowed = origin is None or origin.split("://")[-1] == headers.get("host")
        if not allowed:
            detail = "sent by the page of another site; see the setting cors_origins"
            raise Problem(403, "cross_site", detail=detail)

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.max_body_bytes:
            raise _explain_length(self._limits.max_body_bytes)


def find_host_name(host: str) -> str:
    """Return the name or address in a ``Host`` header: lower case, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # no name could be read this way
        return ""


def is_own_name(name: str) -> bool:
    """Tell whether no other site can have this name: it is an address, or ``localhost``."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


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
    """Counts the bytes of a body as they come, for itself and for everybody's budget."""

    def __init__(
        self, receive: Receive, client: str, budget: BodyBudget, max_body_bytes: int
    ) -> None:
        self._receive = receive
        self._client = client
        self._budget = budget
        self._max_body_bytes = max_body_bytes
        self._held_bytes = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            size_bytes = len(message.get("body", b""))
            if self._held_bytes + size_bytes > self._max_body_bytes:
                raise _explain_length(self._max_body_bytes)
            self._budget.take(self._client, size_bytes)
            self._held_bytes += size_bytes
        return message

    def close(self) -> None:
        """Let go of the body; the request has been answered."""
        self._budget.give_back(self._client, self._held_bytes)
        self._held_bytes = 0
