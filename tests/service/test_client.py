import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

import pipeline
from pipeline.errors import AccessError, QueryError, ServiceError, UnknownKeyError
from pipeline.service.access import read_api_keys
from service.gallery import make_image, make_vectors
from service.services import run_service

KEY = "photos/000.tar/00003.jpg"


@pytest.fixture
def client(service):
    with pipeline.Client(service.url) as made:
        yield made


def test_the_client_searches_by_key_vector_and_image(client, service, tmp_path):
    by_key = client.search(key=KEY, k=5, filter="price > 10", include=("metadata", "vector"))
    assert all(r.metadata["price"] > 10 for r in by_key.results)
    assert by_key.results[0].vector.shape == (16,)
    by_vector = client.search(vector=make_vectors(range(3, 4)), k=3)
    assert by_vector.results[0].key == KEY
    path = tmp_path / "query.jpg"
    path.write_bytes(make_image(3))
    by_path = client.search(image=path, k=3, include=["classes"])
    assert by_path.results == client.search(image=make_image(3), k=3, include=["classes"]).results
    assert len(by_path.classes) == 5


def test_the_client_covers_the_rest_of_the_api(client, service):
    assert client.is_ready()
    assert client.info().rows == 60
    assert client.embed([make_image(1), make_image(2)]).shape == (2, 16)
    item = client.item(KEY, neighbours=2, vector=True)
    assert (item.key, len(item.neighbours), item.vector.shape) == (KEY, 2, (16,))
    assert client.image(KEY) == make_image(3)
    assert len(client.image(KEY, size=64)) < 4000
    assert len(client.sample(5)) == 5
    answers = client.search_batch([{"key": KEY, "k": 2}, {"vector": np.ones(16), "exact": True}])
    assert [len(answer.results) for answer in answers] == [2, 10]


def test_what_cannot_be_answered_is_an_error_with_a_reason(client, tmp_path):
    with pytest.raises(UnknownKeyError, match="404: no image of this key is indexed"):
        client.item("../../etc/passwd")
    with pytest.raises(
        QueryError, match=r"422: the vector has 3 values; .* \(query.vector_base64\)"
    ):
        client.search(vector=[1, 2, 3])
    with pytest.raises(QueryError, match="did you mean 'colour'"):
        client.search(key=KEY, filter="color = teal")
    with pytest.raises(QueryError, match="exactly one of key, vector and image"):
        client.search()
    with pytest.raises(QueryError, match="cannot read the image"):
        client.search(image=tmp_path / "nothing.jpg")


def test_the_key_of_the_client_opens_a_guarded_service(gallery, tmp_path):
    path = tmp_path / "keys"
    path.write_text("a-key-of-twenty-four-chars")
    with run_service(gallery.open(), keys=read_api_keys(str(path))) as service:
        with pipeline.Client(service.url) as stranger, pytest.raises(AccessError, match="api_key"):
            stranger.info()
        with pipeline.Client(service.url, api_key="a-key-of-twenty-four-chars") as friend:
            assert friend.info().rows == 60


def test_nobody_there_is_an_error_that_says_where(unused_tcp_port):
    with pipeline.Client(f"http://127.0.0.1:{unused_tcp_port}", attempts=1) as client:
        assert not client.is_ready()
        with pytest.raises(
            ServiceError, match=f"no answer from http://127.0.0.1:{unused_tcp_port}"
        ):
            client.info()


@pytest.fixture
def unused_tcp_port():
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class BusyHandler(BaseHTTPRequestHandler):
    """Turns the first requests away as a busy service does."""

    refusals = 2

    def do_GET(self):
        kind = type(self)
        kind.refusals -= 1
        busy = kind.refusals >= 0
        body = (
            b'{"code": "overloaded", "detail": "busy"}'
            if busy
            else b'{"generation":"1","items":[]}'
        )
        self.send_response(503 if busy else 200)
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def busy_url():
    BusyHandler.refusals = 2
    server = HTTPServer(("127.0.0.1", 0), BusyHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_busy_service_is_asked_again(busy_url):
    with pipeline.Client(busy_url) as client:
        assert client.sample(1) == []


def test_a_service_that_stays_busy_is_given_up(busy_url):
    client = pipeline.Client(busy_url, attempts=2)
    with client, pytest.raises(ServiceError, match="503: busy"):
        client.sample(1)
