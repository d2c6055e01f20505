"""The dashboard and the alert rules against the metrics that are really exported."""

import asyncio
import contextlib
import http.server
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from service.gallery import Gallery
from service.services import run_service

from infra.manifests import find_clusters, kubernetes
from pipeline.cli import parse_settings
from pipeline.config import NightlyConfig
from pipeline.nightly import Freshness
from pipeline.service.access import read_api_keys
from pipeline.service.metrics import Metrics

INFRA = Path(__file__).parents[2] / "infra"
DASHBOARD = json.loads((INFRA / "grafana" / "dashboard.json").read_text())
ALERTS = yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text())
WAIT_S = 90
KEY = "a-key-of-the-lookups-for-prometheus"

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
        self.metrics.record(LoadSample({"ok": 30, "truncated": 3}, seconds, 10**6, 16, 0))

actor, driver, stalled = Actor.remote(), DriverMetrics("night"), DriverMetrics("stalled")
driver.start(10**7)
stalled.start(10**7)
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
    old_s = time.time() - 80 * 3600
    night = Freshness(old_s, 1.0, old_s, "00001-x", 10, {"ok": 10, "truncated": 1})
    return asyncio.run(service.render()).decode() + night.to_prometheus(night.finished_s)


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
    with run_exporter() as running:
        yield running


@contextlib.contextmanager
def run_exporter() -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Run Ray with an actor and two drivers that record, one of which writes nothing."""
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


@contextlib.contextmanager
def run_prometheus(config: dict[str, object], folder: Path) -> Iterator[str]:
    """Run a server until the block ends; return its address."""
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{find_port()}"
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yaml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("prometheus"), reason="needs prometheus; infra/test.sh gets it"
)
def test_a_real_prometheus_answers_every_query_of_the_dashboard(
    exporter, others, tmp_path: Path
) -> None:
    port, process = exporter
    targets = [f"127.0.0.1:{port}", f"127.0.0.1:{others}"]
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "all", "static_configs": [{"targets": targets}]}],
    }
    queries = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
    with run_prometheus(config, tmp_path) as address:

        def all_answered() -> object:
            push(process)
            unanswered = [query for query in queries if not ask(address, query)]
            return unanswered or True

        wait_for(all_answered, "no answer to")


def push(process: subprocess.Popen[str]) -> None:
    """Let the exporter record once more."""
    process.stdin.write("\n")
    process.stdin.flush()


def point_shipped_config(folder: Path, *, ray: int, lookups: str, node: int) -> dict[str, object]:
    """Return the shipped configuration with the ports of this test, and rules that do not wait."""
    config = yaml.safe_load((INFRA / "prometheus" / "prometheus.yaml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    nodes = [{"targets": [f"127.0.0.1:{ray}"], "labels": {"job": "ray"}}]
    (folder / "nodes.json").write_text(json.dumps(nodes))
    jobs["ray"]["file_sd_configs"][0]["files"] = [str(folder / "nodes.json")]
    jobs["lookups"]["static_configs"][0]["targets"] = [lookups.removeprefix("http://")]
    jobs["node"]["static_configs"][0]["targets"] = [f"127.0.0.1:{node}"]
    (folder / jobs["lookups"]["authorization"]["credentials_file"]).write_text(KEY + "\n")
    rules = [rule | {"for": "0s"} for group in ALERTS["groups"] for rule in group["rules"]]
    (folder / "alerts.yaml").write_text(yaml.safe_dump({"groups": [{"name": "a", "rules": rules}]}))
    return config | {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}}


def list_firing(address: str) -> set[str]:
    answer = json.loads(read(f"http://{address}/api/v1/alerts"))
    return {a["labels"]["alertname"] for a in answer["data"]["alerts"] if a["state"] == "firing"}


UNSEEN = {"LookupsUnseen", "RayUnseen"}


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("prometheus"), reason="needs prometheus; infra/test.sh gets it"
)
def test_every_alert_fires_in_a_real_prometheus_with_the_shipped_configuration(
    others, gallery: Gallery, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(KEY)
    keys = read_api_keys(str(tmp_path / "keys"))
    with contextlib.ExitStack() as running:
        watched = contextlib.ExitStack()
        ray, process = watched.enter_context(run_exporter())
        service = watched.enter_context(run_service(gallery.open(), keys=keys))
        service.lookups.is_open = False  # answers 503 from now on, and goes on counting
        running.push(watched)
        config = point_shipped_config(tmp_path, ray=ray, lookups=service.url, node=others)
        address = running.enter_context(run_prometheus(config, tmp_path))

        def all_fire() -> object:
            push(process)
            request = urllib.request.Request(f"{service.url}/v1/info", headers={"X-API-Key": KEY})
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(request, timeout=5)
            wanted = {rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]}
            return wanted - UNSEEN - list_firing(address) or True

        wait_for(all_fire, "does not fire")
        assert not UNSEEN & list_firing(address)
        watched.close()
        wait_for(lambda: UNSEEN - list_firing(address) or True, "does not fire")


def ask(address: str, query: str) -> bool:
    query = query.replace("$run_id", ".*")
    text = urllib.parse.urlencode({"query": query})
    answer = json.loads(read(f"http://{address}/api/v1/query?{text}"))
    return answer["status"] == "success" and bool(answer["data"]["result"])


LATER = "16h"
OK = 'ray_image_embedding_images_total{run_id="n",status="ok"}'
BAD = 'ray_image_embedding_images_total{run_id="n",status="truncated"}'
BROKEN = {  # by alert: the series that make it fire, one value every five minutes
    "IndexStale": [{}, {"image_embedding_last_success_timestamp_seconds": "-90000x300"}],
    "NewestImageOld": [{}, {"image_embedding_newest_image_timestamp_seconds": "-250000x300"}],
    "ManyImagesFail": [{OK: "0+90x300", BAD: "0+10x300"}],
    "RunStalled": [
        {'ray_image_embedding_run_active{run_id="n"}': "1x300"},
        {'ray_image_embedding_run_active{run_id="n"}': "1x300", OK: "7x300"},
    ],
    "LookupsFail": [
        {
            'pipeline_requests_total{status="200"}': "0+90x300",
            'pipeline_requests_total{status="503"}': "0+2x300",
        }
    ],
    "LookupsUnseen": [{}, {'up{job="lookups"}': "0x300"}],
    "RayUnseen": [{'up{job="ray"}': "0x300"}],
}
HEALTHY = {
    "image_embedding_last_success_timestamp_seconds": "0+300x300",
    "image_embedding_newest_image_timestamp_seconds": "0+300x300",
    'up{job="lookups"}': "1x300",
    'up{job="ray", instance="a"}': "1x300",
    'up{job="ray", instance="b"}': "0x300",
    'ray_image_embedding_run_active{run_id="n"}': "1x300",
    OK: "0+99x300",
    BAD: "0+1x300",
    'pipeline_requests_total{status="200"}': "0+999x300",
    'pipeline_requests_total{status="503"}': "0+1x300",
}
GONE = {  # the cluster of a night went away with its figures; the next night is due
    **HEALTHY,
    "image_embedding_last_success_timestamp_seconds": "0+300x12 _x288",
    "image_embedding_newest_image_timestamp_seconds": "0+300x12 _x288",
}


def make_unit_test(series: dict[str, str], firing: set[str]) -> dict[str, object]:
    """Return a test of promtool: at ``LATER``, these alerts fire and no others."""
    rules = {rule["alert"]: rule for group in ALERTS["groups"] for rule in group["rules"]}
    named = [{"series": name, "values": values} for name, values in series.items()]
    exists = [
        {"expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)'}
        | {"eval_time": LATER, "exp_samples": [{"value": int(name in firing)}]}
        for name in rules
    ]
    return {"interval": "5m", "input_series": named, "promql_expr_test": exists}


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool; infra/test.sh gets it")
def test_every_alert_fires_on_what_it_is_for_and_on_nothing_else(tmp_path: Path) -> None:
    assert set(BROKEN) == {rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]}
    # A missing freshness or service is an alert of its own, so what is not tested is healthy.
    tests = [make_unit_test(HEALTHY, set()), make_unit_test(GONE, set())]
    for alert, cases in BROKEN.items():
        tests += [make_unit_test(replace_series(alert, case), {alert}) for case in cases]
    rules = str(INFRA / "prometheus" / "alerts.yaml")
    text = yaml.safe_dump({"rule_files": [rules], "evaluation_interval": "5m", "tests": tests})
    (tmp_path / "tests.yaml").write_text(text)
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "tests.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def replace_series(alert: str, case: dict[str, str]) -> dict[str, str]:
    """Return the healthy series without those that the alert looks at, and the case's."""
    (expression,) = (r["expr"] for g in ALERTS["groups"] for r in g["rules"] if r["alert"] == alert)
    jobs = re.findall(r'job="\w+"', expression)
    kept = {
        name: values
        for name, values in HEALTHY.items()
        if not (any(job in name for job in jobs) if jobs else name.split("{")[0] in expression)
    }
    return kept | case


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool; infra/test.sh gets it")
def test_the_rules_and_the_configuration_are_valid(tmp_path: Path) -> None:
    for name in ("alerts.yaml", "prometheus.yaml"):
        shutil.copy(INFRA / "prometheus" / name, tmp_path)
    (tmp_path / "lookups-key").write_text(KEY)
    check = ["promtool", "check", "config", tmp_path / "prometheus.yaml"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pods_have_what_the_monitors_ask_for() -> None:
    """Which labels and ports KubeRay adds is its own documentation's word."""
    objects = kubernetes()
    policy = objects["NetworkPolicy/figures-for-prometheus"]["spec"]["ingress"][0]
    assert [port["port"] for port in policy["ports"]] == [8080, 9100]
    for name in ("RayCluster/image-embedding", "RayCronJob/nightly"):
        head = find_clusters(objects[name])[0]["headGroupSpec"]["template"]["spec"]
        (figures,) = (c for c in head["containers"] if c["name"] == "figures")
        (port,) = figures["ports"]
        assert port == {"name": "figures", "containerPort": 9100}
        places = [m["mountPath"] for c in head["containers"] for m in c["volumeMounts"]]
        folder = str(Path(nightly_metrics_file()).parent)
        assert places.count(folder) == 2
        assert f"--collector.textfile.directory={folder}" in figures["args"]
    monitors = {n: o["spec"]["podMetricsEndpoints"] for n, o in objects.items() if "PodM" in n}
    ports = {name.split("/")[1]: [e["port"] for e in found] for name, found in monitors.items()}
    assert ports == {"ray": ["metrics"], "nights": ["figures"], "lookups": ["serve"]}
    secret = monitors["PodMonitor/lookups"][0]["authorization"]["credentials"]
    manifest = (INFRA / "kubernetes" / "rayservice-lookups.yaml").read_text()
    assert f"secret generic {secret['name']}" in manifest
    assert f"--from-file={secret['key']}=" in manifest


def nightly_metrics_file() -> str:
    config = parse_settings(NightlyConfig, ["--config", str(INFRA / "nightly.toml")])
    assert config.nightly.metrics_file is not None
    return config.nightly.metrics_file


def test_every_alert_says_what_to_do() -> None:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"], rule["alert"]
            assert rule["annotations"]["remedy"].endswith("."), rule["alert"]
