"""Counters and histograms of the service, in Prometheus' text format."""

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.registry import Collector

from pipeline.service.guard import Asgi, Message, Receive, Scope, Send

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


ReadReplicas = Callable[[], Awaitable[Mapping[str, Sequence[Metric]]]]
"""Returns what every replica of a service has counted, by the replica's name."""


class Metrics:
    """One registry per application, so that two in a process do not meet."""

    def __init__(self, read_replicas: ReadReplicas | None = None) -> None:
        """Count from nothing.

        Args:
            read_replicas: Asks all replicas, this one included, where several serve one address;
                None where this process is the whole service.
        """
        self._read_replicas = read_replicas
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pipeline_requests",
            "Requests answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.request_s = self._time("pipeline_request_seconds", "Time to answer.", ["route"])
        self.stage_s = self._time(
            "pipeline_stage_seconds", "Time of one batch of embed, search or image.", ["stage"]
        )
        self.batch_size = Histogram(
            "pipeline_batch_size",
            "Items computed together.",
            ["stage"],
            buckets=_SIZES,
            registry=self.registry,
        )
        self.image_cache = Counter(
            "pipeline_image_cache",
            "Pictures asked for, by whether they were cached.",
            ["result"],
            registry=self.registry,
        )
        self.refreshes = Counter(
            "pipeline_index_refreshes",
            "Looks for a newer generation, by outcome.",
            ["result"],
            registry=self.registry,
        )

    def _time(self, name: str, text: str, labels: list[str]) -> Histogram:
        return Histogram(name, text, labels, buckets=_SECONDS, registry=self.registry)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read when somebody asks."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def collect(self) -> list[Metric]:
        """Return what this process has counted."""
        return list(self.registry.collect())

    async def render(self) -> bytes:
        """Return everything in the text format, UTF-8; of all replicas, where there are several.

        Raises:
            TimeoutError: A replica has not answered in time.
        """
        if self._read_replicas is None:
            return generate_latest(self.registry)
        merged = CollectorRegistry()
        merged.register(_Families(merge_replicas(await self._read_replicas())))
        return generate_latest(merged)


@dataclass(frozen=True, slots=True, eq=False)
class _Families(Collector):
    """Metrics that are collected already, in the form that a registry takes."""

    families: Sequence[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def merge_replicas(replicas: Mapping[str, Sequence[Metric]]) -> list[Metric]:
    """Return the metrics of all replicas as one list, with the label ``replica`` on each series.

    Args:
        replicas: What each replica has counted, by its name.
    """
    merged: dict[str, Metric] = {}
    for replica, families in replicas.items():
        for family in families:
            empty = Metric(family.name, family.documentation, family.type)
            samples = merged.setdefault(family.name, empty).samples
            samples += [s._replace(labels=s.labels | {"replica": replica}) for s in family.samples]
    return list(merged.values())


class Meter:
    """ASGI middleware that counts and times every answer, the guard's refusals included."""

    def __init__(self, app: Asgi, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass the server's lifespan on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        start_s = time.perf_counter()

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            # The template, never the path: keys of items would make endless time series.
            route = getattr(scope.get("route"), "path_format", "none")
            self._metrics.requests.labels(scope["method"], route, str(status)).inc()
            self._metrics.request_s.labels(route).observe(time.perf_counter() - start_s)
