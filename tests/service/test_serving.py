"""The job as operators run it: a process, a signal, and Ray Serve with real replicas."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import pipeline
from jobs.serve import main
from pipeline.config import ServeConfig
from pipeline.errors import SettingsError

ROOT = Path(__file__).parents[2]
KEY = "photos/000.tar/00003.jpg"
RAY_FLAGS = ("--ray-address", "local", "--cpus-per-replica", 0.5)
"""A cluster of the job's own, whatever else runs on this machine."""


@contextlib.contextmanager
def start_job(*flags):
    """Run the job as a process; one that still runs at the end of the block is killed."""
    command = [sys.executable, str(ROOT / "jobs/serve.py"), *map(str, flags)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_url(process):
    """Return where the job says that it serves."""
    for line in process.stderr:
        if " on http://" in line:
            return line.split(" on ")[1].split()[0]
    raise AssertionError(f"the job ended: {process.wait()}")


def test_the_job_serves_in_one_process_until_it_is_told_to_stop(gallery, tmp_path, monkeypatch):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    flags = ("--index", gallery.index, "--local", "--no-image-queries", "--port", 0, "--open")
    with start_job(*flags) as process:
        url = read_url(process)
        with pipeline.Client(url) as client:
            assert client.info().rows == 60
            assert len(client.search(key=KEY, k=3).results) == 3
            server = httpx.get(f"{client._http.base_url}healthz").headers.get("server")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (tmp_path / "opened").read_text() == url
    report = json.loads(out.splitlines()[-1])
    assert (report["job"], report["index"]) == ("serve", gallery.index)
    assert server is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "--api-key-file FILE, or --allow-public"),
        (("--api-key-file", "/nowhere/keys"), "cannot read --api-key-file"),
        (("--port", "99999"), "port is 99999"),
        (("--prot", "1"), "did you mean --port?"),
        (("--local", "--index", "/nowhere/index"), "no index at '/nowhere/index'"),
    ],
)
def test_a_wrong_start_ends_with_its_reason(gallery, capsys, flags, words):
    assert main(["--index", gallery.index, *flags]) in (1, 2)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"port": -1}, "port is -1"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"requests_per_s": -1.0}, "must not be negative"),
        ({"request_timeout_s": 0.0}, "must be positive"),
        ({"top_k_classes": 1001}, "use 0 to 1000"),
        ({"max_body": "much"}, "max_body is 'much'"),
    ],
)
def test_settings_guard_themselves(changes, words):
    with pytest.raises(SettingsError, match=words):
        ServeConfig(index="x", **changes)


@pytest.fixture
def serve_on_ray():
    """Return a function that starts replicas on a Ray of their own; all is stopped at the end."""
    import ray
    from ray import serve

    from pipeline.service.cluster import start_replicas

    ray.shutdown()  # the cluster of other tests, none of which come after this one
    ray.init(
        num_cpus=3, include_dashboard=False, log_to_driver=False, address="local", namespace="test"
    )
    yield start_replicas
    serve.shutdown()
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_replicas_on_ray_serve_answer_like_one_server(gallery, serve_on_ray, free_port):
    config = ServeConfig(
        index=gallery.index,
        port=free_port,
        replicas=2,
        cpus_per_replica=0.5,
        image_queries=False,
        refresh_s=0.2,
    )
    serve_on_ray(config)
    url = f"http://127.0.0.1:{free_port}"
    check_metrics_of_all_replicas(url)
    index = gallery.open()
    keys = [f"photos/000.tar/{number:05d}.jpg" for number in range(40)]
    with pipeline.Client(url) as client:
        assert client.is_ready()
        assert client.info().rows == 60
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda key: client.search(key=key, k=4), keys))
        for key, answer in zip(keys, answers, strict=True):
            expected = [n.key for n in index.neighbours_of(key, 4)]
            assert [r.key for r in answer.results] == expected
        assert client.image(keys[3], size=64)
        page = httpx.get(url)
        assert "Image lookups" in page.text
        assert page.headers["x-content-type-options"] == "nosniff"
        assert httpx.get(f"{url}/v1/items/nobody").json()["code"] == "unknown_key"
        headers = {"host": "evil.example"}
        assert httpx.get(f"{url}/v1/info", headers=headers).status_code == 421
        assert httpx.get(f"{url}/v1/items/..%2F..%2Fetc%2Fpasswd/image").status_code == 404


def check_metrics_of_all_replicas(url):
    """Every scrape counts what all replicas have answered, whichever of them is asked."""
    rows = 'pipeline_index_rows{replica="'
    first = httpx.get(f"{url}/metrics").text
    assert first.count(rows) == 2
    assert first.count("# TYPE pipeline_index_rows gauge") == 1
    for asked in range(1, 13):
        assert httpx.get(f"{url}/v1/info").status_code == 200
        text = httpx.get(f"{url}/metrics").text
        counted = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith("pipeline_requests_total{") and 'route="/v1/info"' in line
        ]
        assert sum(counted) == asked
    assert len(counted) == 2, "one replica has answered everything"


@pytest.mark.slow
def test_a_stopped_service_on_ray_serve_answers_what_it_has_accepted(gallery, free_port):
    flags = ("--index", gallery.index, "--no-image-queries", "--port", free_port)
    with (
        start_job(*flags, *RAY_FLAGS) as process,
        contextlib.ExitStack() as stack,
    ):
        url = read_url(process)
        requests = [stack.enter_context(begin_search(free_port)) for _ in range(4)]
        wait_until(lambda: read_gauge(url, "pipeline_requests_under_way") == 5)  # and this one
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/healthz").status_code != 200)
        assert [finish() for finish in requests] == [200] * 4
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["job"] == "serve"


@pytest.mark.slow
def test_replicas_that_cannot_start_end_the_job_with_their_own_reason(gallery, free_port):
    flags = ("--index", gallery.index, "--weights", "random:0", "--port", free_port)
    with start_job(*flags, *RAY_FLAGS) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "did not start: CorruptionError: " in err
    assert "other weights" in err
    assert "Traceback" not in err


@contextlib.contextmanager
def begin_search(port):
    """Send a search but for the end of its body; give what sends the end and returns the status.

    The service has begun to answer, and waits: a request under way for as long as it takes.
    """
    body = json.dumps({"query": {"key": KEY}}).encode()
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    ) as connection:
        connection.putrequest("POST", "/v1/search")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:10])

        def finish():
            connection.send(body[10:])
            with connection.getresponse() as response:
                return response.status

        yield finish


def read_gauge(url, name):
    """Return the sum of a gauge over all replicas."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def wait_until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.05)


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
