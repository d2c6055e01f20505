"""The dashboard and the alert rules against the metrics that are really exported."""

import asyncio
import http.server
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.nightly import Freshness
from pipeline.service.metrics import Metrics

INFRA = Path(__file__).parents[2] / "infra"
DASHBOARD = json.loads((INFRA / "grafana" / "dashboard.json").read_text())
ALERTS = yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text())
WAIT_S = 90

EXPORTER = """
import sys, ray
from pipeline.embed_job.metrics import ActorMetrics, DriverMetrics, LoadSample
port = int(sys.argv[1])
ray.init(address="local", num_cpus=1, include_dashboard=False, _metrics_export_port=port)

@ray.remote
class Actor:
    def __init__(self):
        self.metrics = ActorMetrics("night")
    def record(self):
        seconds = {"decode": 1.0, "forward": 2.0}
        self.metrics.record(LoadSample({"ok": 30, "truncated": 1}, seconds, 10**6, 16, 0))

actor, driver = Actor.remote(), DriverMetrics("night")
driver.start(10**7)
while True:
    ray.get(actor.record.remote())
    driver.count_commit()
    if not sys.stdin.readline():
        break
"""


def list_queries() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return panels + [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]


def list_metrics(text: str) -> set[str]:
    return set(re.findall(r"^([a-z_]+)[{ ]", text, re.MULTILINE))


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


def find_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def render_others() -> str:
    """What the nightly job's metrics file and the lookup service say."""
    service = Metrics()
    service.requests.labels("POST", "/v1/search", "200").inc()
    service.requests.labels("POST", "/v1/search", "503").inc()
    service.request_s.labels("/v1/search").observe(0.002)
    night = Freshness(time.time(), 1.0, time.time(), "00001-x", 10, {"ok": 10, "truncated": 1})
    return asyncio.run(service.render()).decode() + night.to_prometheus()


class OthersHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = render_others().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def exporter() -> Iterator[tuple[int, subprocess.Popen[str]]]:
    port = find_port()
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORTER, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield port, process
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def others() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OthersHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def wait_for(condition: object, what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    last: object = None
    while time.monotonic() < deadline_s:
        try:
            last = condition()  # type: ignore[operator]
        except OSError as error:
            last = error
        if last is True:
            return
        threading.Event().wait(1.0)
    raise AssertionError(f"{what}: {last}")


@pytest.mark.slow
def test_every_metric_of_the_dashboard_and_the_alerts_is_exported(exporter, others) -> None:
    port, _ = exporter
    wanted = {
        name
        for query in list_queries()
        for name in re.findall(r"\b((?:ray_image_embedding|image_embedding|pipeline)_\w+)", query)
    }

    def all_there() -> object:
        there = list_metrics(read(f"http://127.0.0.1:{port}/metrics"))
        there |= list_metrics(read(f"http://127.0.0.1:{others}/metrics"))
        return wanted - there or True

    wait_for(all_there, "not exported")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs the prometheus server")
def test_a_real_prometheus_answers_every_query_of_the_dashboard(
    exporter, others, tmp_path: Path
) -> None:
    port, process = exporter
    targets = [f"127.0.0.1:{port}", f"127.0.0.1:{others}"]
    config = {
        "global": {"scrape_interval": "1s"},
        "rule_files": [str(INFRA / "prometheus" / "alerts.yaml")],
        "scrape_configs": [{"job_name": "all", "static_configs": [{"targets": targets}]}],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{find_port()}"
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path}/prometheus.yaml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        queries = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]

        def all_answered() -> object:
            process.stdin.write("\n")
            process.stdin.flush()
            unanswered = [query for query in queries if not ask(address, query)]
            return unanswered or True

        wait_for(all_answered, "no answer to")
    finally:
        server.terminate()
        server.wait(timeout=30)


def ask(address: str, query: str) -> bool:
    query = query.replace("$run_id", ".*")
    text = urllib.parse.urlencode({"query": query})
    answer = json.loads(read(f"http://{address}/api/v1/query?{text}"))
    return answer["status"] == "success" and bool(answer["data"]["result"])


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")
def test_the_alert_rules_are_valid() -> None:
    rules = INFRA / "prometheus" / "alerts.yaml"
    subprocess.run(["promtool", "check", "rules", rules], check=True, capture_output=True)


def test_every_alert_says_what_to_do() -> None:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"], rule["alert"]
            assert rule["annotations"]["remedy"].endswith("."), rule["alert"]
