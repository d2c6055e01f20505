"""DOOR to Ray Serve: replicas of the service behind Ray's HTTP proxies."""

import logging
import shlex
import threading
import time

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from pipeline.cli import parse_settings
from pipeline.config import ServeConfig
from pipeline.service.app import build_app
from pipeline.service.guard import Asgi
from pipeline.service.server import ServeReport, catch_signals, check_keys

log = logging.getLogger(__name__)

APP_NAME = "lookups"
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


class Replica:
    """One replica. Those of one machine map the same index files, so its memory holds one copy."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config

    def __serve_build_asgi_app__(self) -> Asgi:  # Ray Serve's name
        """Return the application; Ray Serve calls it once, in the replica."""
        return build_app(self._config)


def serve_on_ray(config: ServeConfig) -> ServeReport:
    """Answer lookups on a Ray cluster until SIGINT or SIGTERM."""
    started_s = time.monotonic()
    stop = threading.Event()
    with catch_signals(stop):
        start_replicas(config)
        url = f"http://{config.host}:{config.port}"
        log.info("serving %s on %s with %d replicas", config.index, url, config.replicas)
        stop.wait()
        stop_replicas()
    return ServeReport(config.index, url, round(time.monotonic() - started_s, 3))


def start_replicas(config: ServeConfig) -> None:
    """Start Ray Serve and the replicas; return when all are ready to answer."""
    if not ray.is_initialized():
        ray.init(address=config.ray_address, log_to_driver=False, logging_level=logging.WARNING)
    http = HTTPOptions(
        host=config.host, port=config.port, request_timeout_s=config.request_timeout_s + 5
    )
    serve.start(http_options=http, logging_config=QUIET)
    serve.run(make_application(config), name=APP_NAME, logging_config=QUIET)


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


def stop_replicas() -> None:
    """Let the replicas finish what has begun, then stop them; Ray itself goes on."""
    serve.delete(APP_NAME)
