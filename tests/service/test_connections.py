"""Connections that dawdle, and clients that hold too many, on the server of the job itself."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import pytest

from service.services import serve_app


async def answer_early(scope, receive, send):
    """Answer without a look at the body."""
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
        return
    length = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.contextmanager
def serve(**settings):
    with serve_app(answer_early, **settings) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        yield lambda: contextlib.closing(socket.create_connection((host, int(port)), timeout=20))


def trickle_until_closed(connection):
    """Send a byte now and then until the server has enough; fail if it goes on for ever."""
    connection.settimeout(0.02)
    for _ in range(1000):
        try:
            connection.sendall(b"x")
            if connection.recv(100) == b"":
                return
        except TimeoutError:
            continue
        except OSError:  # reset: the server has closed, and our byte came after
            return
    pytest.fail("the connection was held for ever")


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: ",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\nX-Long: ",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n",
    ],
    ids=["nothing", "half_headers", "half_of_the_second", "the_body_after_its_answer"],
)
def test_a_connection_that_does_not_come_to_a_request_is_closed(beginning):
    with serve(headers_timeout_s=0.3) as connect, connect() as connection:
        connection.sendall(beginning)
        trickle_until_closed(connection)


def test_headers_without_end_are_refused_however_fast_they_come():
    with (
        serve(headers_timeout_s=60) as connect,
        connect() as connection,
        contextlib.suppress(OSError),  # closed while we still send
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        for number in range(100_000):
            connection.sendall(b"X-%d: %s\r\n" % (number, b"x" * 1000))
        pytest.fail("100 MB of headers were taken")


def test_headers_of_some_size_are_taken():
    with serve() as connect, connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 30_000)
        connection.sendall(b"\r\n\r\n")
        assert b"200 OK" in connection.recv(1000)


def test_a_silent_connection_is_closed():
    with serve(headers_timeout_s=0.1) as connect, connect() as connection:
        assert connection.recv(100) == b""


def test_a_request_that_takes_longer_than_its_headers_may_is_answered():
    done = threading.Event()

    async def answer_late(scope, receive, send):
        if scope["type"] == "http":
            await asyncio.to_thread(done.wait, 20)
        await answer_early(scope, receive, send)

    with serve_app(answer_late, headers_timeout_s=0.1) as (url, _):
        timer = threading.Timer(0.4, done.set)
        timer.start()
        assert httpx.get(url).text == "ok"
        timer.join()


def test_one_address_holds_no_more_connections_than_it_may():
    with serve(connections_per_client=2, headers_timeout_s=60) as connect:
        with connect(), connect() as second, connect() as third:
            assert b"429 Too Many Requests" in third.recv(1000)
            second.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in second.recv(1000)
        deadline = time.monotonic() + 20
        while b"200 OK" not in ask_once(connect):  # the server hears of the ends one by one
            assert time.monotonic() < deadline, "connections that are closed still count"


def ask_once(connect):
    with connect() as connection, contextlib.suppress(OSError):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return connection.recv(1000)
    return b""


def test_without_a_bound_any_number_is_held():
    with serve(connections_per_client=0) as connect, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect()) for _ in range(200)]
        connections[-1].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in connections[-1].recv(1000)
