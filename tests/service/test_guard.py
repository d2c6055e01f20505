import asyncio
import json
import socket
import threading

import httpx
import pytest

from pipeline.config import ServeConfig
from pipeline.errors import SettingsError
from pipeline.service.access import check_exposure, is_loopback, read_api_keys
from pipeline.service.guard import LOOPBACK_HOSTS, RateLimiter
from pipeline.service.serve import serve
from service.gallery import make_image
from service.services import ColourEmbedder, run_service

KEY = "photos/000.tar/00003.jpg"
API_KEY = "correct-horse-battery-staple"


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text(f"# rotated in spring\n{API_KEY}  # the web team\n\nanother-key-0123456789\n")
    return read_api_keys(str(path))


def test_every_answer_carries_the_security_headers(http):
    for path in ("/", "/v1/info", "/v1/nothing", f"/v1/items/{KEY}/image", "/page.js"):
        headers = http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


def test_the_policy_allows_no_inline_code_and_no_other_site(http):
    policy = http.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "*" not in policy


def test_a_service_with_keys_shows_strangers_no_data(gallery, keys):
    with (
        run_service(gallery.open(), keys=keys) as service,
        httpx.Client(base_url=service.url) as http,
    ):
        for path in ("/v1/info", f"/v1/items/{KEY}/image", "/metrics", "/v1/map"):
            response = http.get(path)
            assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/", "/page.js", "/page.css", "/docs", "/healthz", "/openapi.json"):
            assert http.get(path).status_code == 200
        for headers in (
            {"authorization": f"Bearer {API_KEY}"},
            {"x-api-key": "another-key-0123456789"},
        ):
            assert http.get("/v1/info", headers=headers).status_code == 200
        for wrong in ("", API_KEY[:-1], API_KEY + "x", "# rotated in spring", "ключ"):
            headers = {"x-api-key": wrong.encode()}
            assert http.get("/v1/info", headers=headers).status_code == 401


def test_keys_have_to_be_there_and_long_enough(tmp_path):
    path = tmp_path / "keys"
    with pytest.raises(SettingsError, match="cannot read --api-key-file"):
        read_api_keys(str(path))
    path.write_text("# nothing\n\n")
    with pytest.raises(SettingsError, match="holds no key"):
        read_api_keys(str(path))
    path.write_text("short\n")
    with pytest.raises(SettingsError, match="fewer than 16 characters"):
        read_api_keys(str(path))
    assert not read_api_keys(None).digests


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_a_public_address_needs_keys_or_consent(host):
    with pytest.raises(SettingsError, match="--api-key-file FILE, or --allow-public"):
        check_exposure(host, has_keys=False, allow_public=False)
    check_exposure(host, has_keys=True, allow_public=False)
    check_exposure(host, has_keys=False, allow_public=True)


def test_the_job_refuses_a_public_address_before_it_opens_anything():
    with pytest.raises(SettingsError, match="reachable from other machines"):
        serve(ServeConfig(index="/nowhere", host="0.0.0.0", local=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_addresses_need_nothing(host):
    assert is_loopback(host)
    check_exposure(host, has_keys=False, allow_public=False)


def test_a_local_service_answers_to_no_other_name(gallery):
    with run_service(gallery.open(), hosts=LOOPBACK_HOSTS) as service:
        port = service.url.rsplit(":", 1)[1]
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
            assert httpx.get(f"{service.url}/v1/info", headers={"host": host}).status_code == 200
        for host in (f"evil.example:{port}", "localhost.evil.example", "", "127.0.0.1.nip.io"):
            response = httpx.get(f"{service.url}/v1/info", headers={"host": host})
            assert (response.status_code, response.json()["code"]) == (421, "unknown_host")
        probe = httpx.get(f"{service.url}/readyz", headers={"host": f"10.1.2.3:{port}"})
        assert probe.status_code == 200


def test_a_body_beyond_the_limit_is_refused_by_its_length(gallery):
    with run_service(gallery.open(), max_body_bytes=1000) as service:
        response = httpx.post(f"{service.url}/v1/search", content=b"x" * 1001)
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


def test_a_body_that_hides_its_length_is_refused_while_it_comes(gallery):
    with run_service(gallery.open(), max_body_bytes=1000) as service:
        headers = {"content-type": "application/json"}
        chunks = (b"x" * 100 for _ in range(100))
        response = httpx.post(f"{service.url}/v1/search", content=chunks, headers=headers)
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


def test_a_body_that_never_ends_runs_into_the_time_limit(gallery):
    with run_service(gallery.open(), timeout_s=0.3) as service:
        port = int(service.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(
                b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            answer = connection.recv(65536)
    assert b"504 " in answer.split(b"\r\n")[0]
    assert b'"code":"timeout"' in answer


def test_a_slow_answer_runs_into_the_time_limit(gallery):
    hold = threading.Event()
    embedder = ColourEmbedder(hold=hold)
    with run_service(gallery.open(), embedder=embedder, timeout_s=0.3) as service:
        response = httpx.post(f"{service.url}/v1/search", files={"image": make_image(1)})
        hold.set()
    assert (response.status_code, response.json()["code"]) == (504, "timeout")
    assert response.headers["retry-after"] == "1"


def test_a_client_that_asks_too_often_is_told_when_to_go_on(gallery):
    with run_service(gallery.open(), requests_per_s=0.5) as service:
        responses = [httpx.get(f"{service.url}/v1/info") for _ in range(3)]
    assert [r.status_code for r in responses] == [200, 429, 429]
    assert responses[1].json()["code"] == "rate_limited"
    assert int(responses[1].headers["retry-after"]) >= 1


def test_guesses_of_keys_are_limited_by_address(gallery, keys):
    with run_service(gallery.open(), keys=keys, requests_per_s=0.5) as service:
        guesses = [
            httpx.get(f"{service.url}/v1/info", headers={"x-api-key": f"guess-{n}"})
            for n in range(4)
        ]
        good = httpx.get(f"{service.url}/v1/info", headers={"x-api-key": API_KEY})
    assert {r.status_code for r in guesses[1:]} == {429}
    assert good.status_code == 200


def test_tokens_come_back_at_the_set_rate():
    limiter = RateLimiter(2.0)
    assert [limiter.check("a", 0.0) for _ in range(4)] == [0.0] * 4
    assert limiter.check("a", 0.0) == pytest.approx(0.5)
    assert limiter.check("b", 0.0) == 0.0
    assert limiter.check("a", 0.5) == 0.0
    assert RateLimiter(0.0).check("a", 0.0) == 0.0


def test_the_limiter_forgets_the_longest_silent_clients():
    limiter = RateLimiter(1.0, max_clients=2)
    for client in ("a", "b", "c"):
        limiter.check(client, 0.0)
    assert set(limiter._buckets) == {"b", "c"}


def test_requests_beyond_the_concurrency_limit_are_turned_away(gallery):
    hold = threading.Event()
    embedder = ColourEmbedder(hold=hold)
    with run_service(gallery.open(), embedder=embedder, max_concurrent=2) as service:
        statuses = asyncio.run(_crowd(service.url, embedder, hold))
    assert statuses == {"waiting": [200, 200], "third": 503, "health": 200}


async def _crowd(url, embedder, hold):
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        files = {"image": make_image(1)}
        waiting = [asyncio.create_task(http.post("/v1/search", files=files)) for _ in range(2)]
        await asyncio.to_thread(embedder.entered.wait, 20)
        third = await http.get("/v1/info")
        while third.status_code == 200:  # the second may still be on its way
            third = await http.get("/v1/info")
        health = await http.get("/healthz")
        hold.set()
        done = await asyncio.gather(*waiting)
    return {
        "waiting": [r.status_code for r in done],
        "third": third.status_code,
        "health": health.status_code,
    }


def test_other_sites_may_call_only_when_named(gallery):
    origin = {"origin": "https://friend.example"}
    ask = origin | {"access-control-request-method": "POST"}
    with run_service(gallery.open()) as service:
        assert httpx.options(f"{service.url}/v1/search", headers=ask).status_code == 405
    with run_service(gallery.open(), cors_origins=("https://friend.example",)) as service:
        allowed = httpx.options(f"{service.url}/v1/search", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
        stranger = httpx.get(f"{service.url}/v1/info", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers


def test_no_answer_names_a_place_on_this_machine(http, gallery):
    secret = str(gallery.folder)
    paths = ["/v1/info", "/v1/sample", "/v1/map", f"/v1/items/{KEY}?neighbours=5", "/metrics"]
    answers = [http.get(path).text for path in paths]
    answers.append(http.post("/v1/search", json={"query": {"key": KEY}}).text)
    answers.append(json.dumps(http.get("/openapi.json").json()))
    assert not [text for text in answers if secret in text]
