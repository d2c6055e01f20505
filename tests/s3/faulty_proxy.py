"""An HTTP proxy in front of an S3 server that breaks chosen requests.

    with FaultyProxy(server.endpoint_url) as proxy:
        proxy.inject(Fault("slow_down", method="GET", times=3))
        proxy.inject(Fault("reset", key="*/00042.tar", after_bytes=1000))
        storage = Storage(StorageOptions(endpoint_url=proxy.endpoint_url))

Headers pass unchanged, ``Host`` above all: the signature covers it.
"""

import random
import select
import socket
import struct
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

Kind = Literal[
    "slow_down",  # 503 SlowDown; the server never sees the request
    "internal_error",  # 500 InternalError; nor this one
    "expired",  # 400 ExpiredToken
    "denied",  # 403 AccessDenied
    "archived",  # 403 InvalidObjectState, as of an object in Glacier
    "conflict",  # 409 ConditionalRequestConflict
    "not_implemented",  # 501 NotImplemented
    "stall",  # no answer at all, until the client hangs up
    "stall_body",  # the answer stops after `after_bytes`, and the connection stays open
    "reset",  # the connection is reset after `after_bytes` of the body
    "short",  # the body ends after `after_bytes`, with a Content-Length of all of it
    "lost_answer",  # the server does the work; the connection is reset instead of an answer
    "ignored_condition",  # the server never sees If-Match and If-None-Match (moto only: signed)
]
ANSWERS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "archived": (403, "InvalidObjectState", "The action is not valid for the storage class."),
    "not_implemented": (501, "NotImplemented", "Not implemented."),
    "conflict": (409, "ConditionalRequestConflict", "A conflicting operation is in progress."),
}


@dataclass
class Fault:
    """A rule: which requests break, and how.

    Attributes:
        kind: How.
        method: ``"GET"``, ``"PUT"``, …; every method if None.
        key: Pattern (fnmatch) over the decoded ``bucket/key``.
        skip: How many matching requests pass unharmed first.
        times: How many break after that; all if None.
        probability: Share of them that break, drawn from the proxy's seed.
        after_bytes: Bytes of the body that still arrive (``reset``, ``short``, ``stall_body``).
    """

    kind: Kind
    method: str | None = None
    key: str = "*"
    skip: int = 0
    times: int | None = 1
    probability: float = 1.0
    after_bytes: int = 0
    seen: int = field(default=0, init=False)
    done: int = field(default=0, init=False)

    def strike(self, method: str, key: str, dice: random.Random) -> bool:
        """Tell whether this request breaks, and count it."""
        if self.method not in (None, method) or not fnmatchcase(key, self.key):
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.times is not None and self.done >= self.times):
            return False
        if dice.random() >= self.probability:
            return False
        self.done += 1
        return True


@dataclass(frozen=True)
class Seen:
    """A request that came through.

    Attributes:
        method: ``"GET"``, …
        key: Decoded ``bucket/key``.
        headers: By lower-case name.
        fault: Kind of the fault that struck it, if any.
    """

    method: str
    key: str
    headers: dict[str, str]
    fault: str | None


class FaultyProxy:
    """The proxy; use it as a context manager."""

    def __init__(self, upstream_url: str, *, seed: int = 0) -> None:
        self.upstream = urlsplit(upstream_url).netloc
        self.seen: list[Seen] = []
        self.stopping = threading.Event()
        self._faults: list[Fault] = []
        self._dice = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(self)

    @property
    def endpoint_url(self) -> str:
        """Where to send requests to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def inject(self, *faults: Fault) -> None:
        """Add rules; of several that match a request the first one strikes."""
        with self._lock:
            self._faults.extend(faults)

    def clear(self) -> None:
        """Drop all rules and forget what was seen."""
        with self._lock:
            self._faults.clear()
            self.seen.clear()

    def count(self, method: str | None = None, key: str = "*", *, faulty: bool = False) -> int:
        """Return how many requests of a kind came through, or how many of them broke."""
        with self._lock:
            return sum(
                method in (None, seen.method)
                and fnmatchcase(seen.key, key)
                and (seen.fault is not None or not faulty)
                for seen in self.seen
            )

    def choose_fault(self, method: str, target: str, headers: dict[str, str]) -> Fault | None:
        """Return the rule that strikes a request, if any, and note the request."""
        key = unquote(target.partition("?")[0]).lstrip("/")
        with self._lock:
            fault = next((f for f in self._faults if f.strike(method, key, self._dice)), None)
            self.seen.append(Seen(method, key, headers, fault.kind if fault else None))
        return fault

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, proxy: FaultyProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients that hang up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = self.server.proxy.choose_fault(self.command, self.path, headers)
        if fault is not None and fault.kind in ANSWERS:
            self._answer(*ANSWERS[fault.kind])
        elif fault is not None and fault.kind == "stall":
            self._hang()
        else:
            self._forward(body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, code: str, message: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _forward(self, body: bytes, fault: Fault | None) -> None:
        connection = HTTPConnection(self.server.proxy.upstream, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            dropped = {"connection", "expect"}
            if fault is not None and fault.kind == "ignored_condition":
                dropped |= {"if-match", "if-none-match"}
            for name, value in self.headers.items():
                if name.lower() not in dropped:
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            self._pass_on(response, response.read(), fault)
        finally:
            connection.close()

    def _pass_on(self, response: HTTPResponse, data: bytes, fault: Fault | None) -> None:
        if fault is not None and fault.kind == "lost_answer":
            self._reset()
            return
        self.send_response_only(response.status, response.reason)
        length = response.headers.get("Content-Length", str(len(data)))
        for name, value in response.headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault is None or fault.kind == "ignored_condition" or len(data) <= fault.after_bytes:
            self.wfile.write(data)
            return
        self.wfile.write(data[: fault.after_bytes])
        self.wfile.flush()
        if fault.kind == "stall_body":
            self._hang()
        elif fault.kind == "reset":
            self._reset()
        self.close_connection = True

    def _hang(self) -> None:
        """Hold the connection until the client gives up or the proxy stops."""
        while not self.server.proxy.stopping.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.1)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                break
        self.close_connection = True

    def _reset(self) -> None:
        # A close with linger time zero sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
