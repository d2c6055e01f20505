"""DOOR to Ray's metrics: what a run tells Prometheus while it goes.

Ray exports these on every node's metrics port with the prefix ``ray_``. Dashboards and alert rules
under ``infra/`` use the names below; a test holds the two together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

PREFIX = "image_embedding"

_BATCH_BOUNDS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
_SECONDS_BOUNDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]


@dataclass(frozen=True, slots=True)
class LoadSample:
    """Counts and times of one load, measured by an actor.

    Attributes:
        statuses: Rows by status.
        seconds: Time by stage.
        nbytes: Encoded bytes.
        batch_size: Images in one forward pass by now.
        gpu_memory_bytes: Most GPU memory that was in use so far; 0 on the CPU.
    """

    statuses: Mapping[str, int]
    seconds: Mapping[str, float]
    nbytes: int
    batch_size: int
    gpu_memory_bytes: int


class ActorMetrics:
    """The metrics of one embedder actor."""

    def __init__(self, run_id: str) -> None:
        self._tags = {"run_id": run_id}
        keys = ("run_id",)
        self._images = Counter(
            f"{PREFIX}_images", "Rows written, by status.", tag_keys=(*keys, "status")
        )
        self._bytes = Counter(f"{PREFIX}_encoded_bytes", "Encoded image bytes.", tag_keys=keys)
        self._seconds = Counter(
            f"{PREFIX}_stage_seconds", "Time by stage, s.", tag_keys=(*keys, "stage")
        )
        self._load_seconds = Histogram(
            f"{PREFIX}_load_seconds",
            "Time to embed and write one load, by stage, s.",
            boundaries=_SECONDS_BOUNDS,
            tag_keys=(*keys, "stage"),
        )
        self._batch = Histogram(
            f"{PREFIX}_batch_images",
            "Images in one forward pass.",
            boundaries=_BATCH_BOUNDS,
            tag_keys=keys,
        )
        self._memory = Gauge(
            f"{PREFIX}_gpu_memory_bytes", "Most GPU memory in use, bytes.", tag_keys=keys
        )

    def record(self, sample: LoadSample) -> None:
        """Add one load."""
        for status, number in sample.statuses.items():
            self._images.inc(number, tags=self._tags | {"status": status})
        for stage, seconds in sample.seconds.items():
            tags = self._tags | {"stage": stage}
            self._seconds.inc(max(seconds, 1e-9), tags=tags)
            self._load_seconds.observe(max(seconds, 1e-9), tags=tags)
        if sample.nbytes:
            self._bytes.inc(sample.nbytes, tags=self._tags)
        self._batch.observe(sample.batch_size, tags=self._tags)
        self._memory.set(sample.gpu_memory_bytes, tags=self._tags)


class DriverMetrics:
    """The metrics of a run's driver; a context manager around the run."""

    def __init__(self, run_id: str) -> None:
        self._tags = {"run_id": run_id}
        keys = ("run_id",)
        self._active = Gauge(f"{PREFIX}_run_active", "1 while a run is going.", tag_keys=keys)
        self._commits = Counter(f"{PREFIX}_commits", "Shards committed.", tag_keys=keys)
        self._planned = Gauge(
            f"{PREFIX}_planned_bytes", "Size of the shards to embed, bytes.", tag_keys=keys
        )

    def start(self, planned_bytes: int) -> None:
        """Say that the run goes on, and how much it has to read."""
        self._active.set(1, tags=self._tags)
        self._planned.set(planned_bytes, tags=self._tags)

    def count_commit(self) -> None:
        """Count a committed shard."""
        self._commits.inc(1, tags=self._tags)

    def __enter__(self) -> "DriverMetrics":
        return self

    def __exit__(self, *_: Any) -> None:
        self._active.set(0, tags=self._tags)
