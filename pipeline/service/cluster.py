"""DOOR to Ray Serve: replicas of the service behind Ray's HTTP proxies."""

import logging
import shlex
import threading
import time
import webbrowser
from collections.abc import Sequence

import ray
from prometheus_client import Metric
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from pipeline.cli import parse_settings
from pipeline.config import ServeConfig
from pipeline.errors import ClusterError
from pipeline.joining import guard_joining
from pipeline.service.app import build_app
from pipeline.service.guard import Asgi
from pipeline.service.metrics import Metrics
from pipeline.service.server import ServeReport, catch_signals, check_keys

log = logging.getLogger(__name__)

APP_NAME = "lookups"
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


METRICS_TIMEOUT_S = 5.0
"""Longest wait for the counts of all replicas."""


class Replica:
    """One replica. Those of one machine map the same index files, so its memory holds one copy."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._metrics = Metrics(read_replicas)

    def __serve_build_asgi_app__(self) -> Asgi:  # Ray Serve's name
        """Return the application; Ray Serve calls it once, in the replica."""
        return build_app(self._config, self._metrics)

    def read_metrics(self) -> tuple[str, list[Metric]]:
        """Return the name of this replica and what it has counted."""
        return serve.get_replica_context().replica_tag, self._metrics.collect()


async def read_replicas() -> dict[str, Sequence[Metric]]:
    """Return what every live replica of this application has counted, by its name.

    A request reaches one replica, whichever is free, so that one replica's counts would jump up
    and down from scrape to scrape.

    Raises:
        TimeoutError: A replica has not answered in time.
    """
    here = serve.get_replica_context()
    handle = serve.get_deployment_handle(here.deployment, here.app_name)
    asked = handle.broadcast("read_metrics")
    answers = await asked.results_async(timeout_s=METRICS_TIMEOUT_S, return_exceptions=True)
    lost = [answer for answer in answers if isinstance(answer, BaseException)]
    for error in lost:
        log.warning("a replica did not give its metrics: %s", error)
    return dict(answer for answer in answers if not isinstance(answer, BaseException))


def serve_on_ray(config: ServeConfig) -> ServeReport:
    """Answer lookups on a Ray cluster until SIGINT or SIGTERM.

    Raises:
        ClusterError: The replicas do not start; the message says why.
    """
    started_s = time.monotonic()
    stop = threading.Event()
    join_cluster(config)
    # Ray installs its own handlers when it starts: on SIGTERM they abort this process, and the
    # cluster with it, in the middle of its requests. Ours have to come after them.
    with catch_signals(stop):
        start_replicas(config)
        url = f"http://{config.host}:{config.port}"
        log.info("serving %s on %s with %d replicas", config.index, url, config.replicas)
        if config.open:
            webbrowser.open(url)
        stop.wait()
        stop_replicas(config.shutdown_s)
    return ServeReport(config.index, url, round(time.monotonic() - started_s, 3))


def join_cluster(config: ServeConfig) -> None:
    """Join the Ray cluster that ``config`` names, or start one."""
    if not ray.is_initialized():
        with guard_joining(config.ray_address):
            ray.init(address=config.ray_address, log_to_driver=False, logging_level=logging.WARNING)


def start_replicas(config: ServeConfig) -> None:
    """Start Ray Serve and the replicas; return when all are ready to answer.

    Raises:
        ClusterError: They do not start; the message says why.
    """
    http = HTTPOptions(
        host=config.host, port=config.port, request_timeout_s=config.request_timeout_s + 5
    )
    serve.start(http_options=http, logging_config=QUIET)
    try:
        serve.run(make_application(config), name=APP_NAME, logging_config=QUIET)
    except RuntimeError as error:
        reason = explain_failure() or str(error)
        serve.delete(APP_NAME)
        raise ClusterError(f"the replicas of {config.index} did not start: {reason}") from error


def explain_failure() -> str:
    """Return why the replicas did not start, without the traceback; empty where nothing is known.

    Ray Serve tells the caller only that a deployment failed; the error itself is in its status.
    """
    status = serve.status().applications.get(APP_NAME)
    texts = [item.message for item in status.deployments.values()] if status else []
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("pipeline.errors.")]
    return str((errors or lines or [""])[-1]).removeprefix("pipeline.errors.")


def make_application(config: ServeConfig) -> serve.Application:
    """Return the replicas as an application of Ray Serve, not yet started."""
    # The replica's own bounded queues answer first, with a Retry-After; these are the backstop.
    most = 2 * config.max_waiting + 16
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=APP_NAME,
        num_replicas=config.replicas,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
        },
        max_ongoing_requests=most,
        max_queued_requests=most,
        graceful_shutdown_timeout_s=config.shutdown_s,
        logging_config=QUIET,
    )
    return deployment.bind(config)


def build_application(arguments: dict[str, str]) -> serve.Application:
    """Return the application that a Serve config file asks for.

    Args:
        arguments: ``args`` of the file: ``flags``, as ``jobs/serve.py`` takes them.

    Raises:
        SettingsError: A setting is unknown or wrong, or the service would let strangers in.
    """
    config = parse_settings(ServeConfig, shlex.split(arguments["flags"]), prog="lookups")
    check_keys(config)
    return make_application(config)


def stop_replicas(shutdown_s: float) -> None:
    """Let the replicas finish what has begun, then stop them; Ray itself goes on.

    Args:
        shutdown_s: The time that the replicas were given to finish.
    """
    deadline_s = time.monotonic() + shutdown_s
    while True:
        try:
            serve.delete(APP_NAME)  # waits for a minute at most, whatever the replicas were given
        except TimeoutError:
            if time.monotonic() > deadline_s:
                log.warning("the replicas are still busy after %g s; leaving them", shutdown_s)
                return
        else:
            return
