import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ServeConfig
from pipeline.errors import SettingsError
from pipeline.service.access import check_exposure, is_loopback, read_api_keys
from pipeline.service.guard import BodyBudget, RateLimiter
from pipeline.service.problems import Problem
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
    with run_service(gallery.open(), hosts=frozenset()) as service:
        port = service.url.rsplit(":", 1)[1]
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
            assert httpx.get(f"{service.url}/v1/info", headers={"host": host}).status_code == 200
        for host in (f"evil.example:{port}", "localhost.evil.example", "", "127.0.0.1.nip.io"):
            response = httpx.get(f"{service.url}/v1/info", headers={"host": host})
            assert (response.status_code, response.json()["code"]) == (421, "unknown_host")
        probe = httpx.get(f"{service.url}/readyz", headers={"host": f"10.1.2.3:{port}"})
        assert probe.status_code == 200


def test_a_forwarded_service_answers_to_addresses_and_to_localhost_beside_its_names(gallery):
    """Nobody else's page can have these names; through a forwarded port they are all there is."""
    with run_service(gallery.open(), hosts=frozenset({"lookups.internal"})) as service:
        for host in ("lookups.internal:8000", "LOOKUPS.internal", "localhost:9", "10.1.2.3:80"):
            assert httpx.get(f"{service.url}/v1/info", headers={"host": host}).status_code == 200
        for path in ("/", "/page.js", "/v1/info", "/docs", "/metrics"):
            for host in ("evil.example", "xlookups.internal", "[::1", "localhost@evil.example"):
                response = httpx.get(f"{service.url}{path}", headers={"host": host})
                assert response.status_code == 421
                assert "--allowed-hosts" in response.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "https://friend.example"}, 200),
        ({"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://lookups.example:8000", "host": "lookups.example:8000"}, 200),
        ({"origin": "http://lookups.example:8001", "host": "lookups.example:8000"}, 403),
    ],
)
def test_a_request_that_another_site_s_page_sends_is_refused(gallery, headers, status):
    with run_service(gallery.open(), origins=frozenset({"https://friend.example"})) as service:
        body = {"query": {"key": KEY}}
        response = httpx.post(f"{service.url}/v1/search", json=body, headers=headers)
        assert response.status_code == status
        assert status == 200 or response.json()["code"] == "cross_site"
        assert httpx.get(f"{service.url}/v1/info", headers=headers).status_code == 200


def test_bodies_share_a_budget_of_which_one_client_has_half(gallery, tmp_path):
    path = tmp_path / "keys"
    names = [f"client-{number}-0123456789" for number in range(3)]
    path.write_text("\n".join(names))
    limits = {"max_body_bytes": 1000, "max_bodies_bytes": 2000, "keys": read_api_keys(str(path))}
    with run_service(gallery.open(), **limits) as service, contextlib.ExitStack() as stack:

        def hold(name):
            connection = http.client.HTTPConnection(service.url.removeprefix("http://"))
            stack.callback(connection.close)
            connection.putrequest("POST", "/v1/search")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "951")
            connection.putheader("X-API-Key", name)
            connection.endheaders(b" " * 950)
            return connection

        def ask(name):
            headers = {"content-type": "application/json", "x-api-key": name}
            body = b'{"query": {"key": "nobody"}}'.ljust(120)
            response = httpx.post(f"{service.url}/v1/search", content=body, headers=headers)
            return response.status_code, response.json()["code"], "retry-after" in response.headers

        first, second = hold(names[0]), hold(names[1])
        wait_for(lambda: ask(names[2]) == (503, "overloaded", True))
        second.send(b"x")
        assert second.getresponse().status == 422
        assert ask(names[0]) == (429, "too_many_bytes", True)
        assert ask(names[2]) == (404, "unknown_key", False)
        first.send(b"x")
        assert first.getresponse().status == 422
        assert ask(names[0]) == (404, "unknown_key", False)


def wait_for(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-5, 60)), max_size=40))
def test_the_budget_of_bodies_holds_what_was_taken_and_not_given_back(steps):
    """Negative sizes give back; the model is two sums."""
    budget, held = BodyBudget(100), dict.fromkeys("abc", 0)
    for client, size in steps:
        if size < 0:
            budget.give_back(client, min(-size, held[client]))
            held[client] -= min(-size, held[client])
            continue
        fits = sum(held.values()) + size <= 100 and held[client] + size <= 50
        if fits:
            budget.take(client, size)
            held[client] += size
        else:
            with pytest.raises(Problem):
                budget.take(client, size)


def test_probes_are_answered_whatever_their_address_has_asked(gallery):
    with run_service(gallery.open(), requests_per_s=0.01) as service:
        assert httpx.get(f"{service.url}/v1/info").status_code == 200
        for _ in range(5):
            assert httpx.get(f"{service.url}/v1/info").status_code == 429
            assert httpx.get(f"{service.url}/healthz").status_code == 200
            assert httpx.get(f"{service.url}/readyz").status_code == 200


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
    with run_service(gallery.open(), requests_per_s=0.01) as service:
        responses = [httpx.get(f"{service.url}/v1/info") for _ in range(3)]
    assert [r.status_code for r in responses] == [200, 429, 429]
    assert responses[1].json()["code"] == "rate_limited"
    assert int(responses[1].headers["retry-after"]) >= 1


def test_guesses_of_keys_are_limited_by_address(gallery, keys):
    with run_service(gallery.open(), keys=keys, requests_per_s=0.01) as service:
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
    with run_service(gallery.open(), origins=frozenset({"https://friend.example"})) as service:
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
