"""DOOR to Ray for building: the same function over many tasks, here or on a cluster."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipeline.config import IndexConfig
from pipeline.joining import guard_joining

Task = TypeVar("Task")
Result = TypeVar("Result")

LOG = logging.getLogger("pipeline.index")

RETRIES = 3
PATIENCE_S = 60.0
"""Time without a finished task after which a line says so."""
MAX_TASK_THREADS = 16

LOCAL_ROWS = 2_000_000
"""Up to so many rows a cluster would take longer to start than the build takes here."""

CLUSTER_ROWS = 200_000
"""From so many rows on, a cluster that is there already is used."""


class Workers(Protocol):
    """Whatever runs tasks."""

    @property
    def threads(self) -> int:
        """Threads that one task may use."""
        ...

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], *, memory_bytes: int = 0
    ) -> list[Result]:
        """Return ``function(task)`` for every task, in order.

        Args:
            function: Safe to run again after a worker was lost.
            tasks: Its arguments; they pickle.
            memory_bytes: What one task holds in memory.
        """
        ...


@dataclass(frozen=True, slots=True)
class LocalWorkers:
    """Runs one task after another in this process, with all its cores.

    Attributes:
        threads: Threads that one task may use.
    """

    threads: int

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], *, memory_bytes: int = 0
    ) -> list[Result]:
        """Return ``function(task)`` for every task, in order."""
        return [function(task) for task in tasks]


@dataclass(frozen=True, slots=True)
class RayWorkers:
    """Runs tasks on a Ray cluster, as many at once as its cores and memory allow.

    Attributes:
        threads: Threads, and so CPUs, of one task.
    """

    threads: int

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], *, memory_bytes: int = 0
    ) -> list[Result]:
        """Return ``function(task)`` for every task, in order; lost workers are replaced."""
        import ray

        remote = ray.remote(function).options(
            num_cpus=self.threads, memory=memory_bytes, max_retries=RETRIES
        )
        limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)) // self.threads)
        pending: dict[Any, int] = {}
        results: dict[int, Result] = {}
        for number, task in enumerate(tasks):
            if len(pending) >= limit:
                _take_finished(ray, pending, results)
            pending[remote.remote(task)] = number
        while pending:
            _take_finished(ray, pending, results)
        return [results[number] for number in range(len(tasks))]


def _take_finished(ray: Any, pending: dict[Any, int], results: dict[int, Any]) -> None:
    while not (done := ray.wait(list(pending), num_returns=1, timeout=PATIENCE_S)[0]):
        free = ray.available_resources().get("CPU", 0.0)
        LOG.warning(
            "waiting tasks=%d free_cpus=%g: tasks run, or wait for CPUs", len(pending), free
        )
    for reference in done:
        try:
            results[pending.pop(reference)] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            # The error as the task raised it, whose message is for people.
            raise error.cause from error


@contextmanager
def open_workers(*, use_ray: bool, address: str | None, tasks: int) -> Iterator[Workers]:
    """Provide workers, joining or starting a Ray cluster only if it is wanted.

    Args:
        use_ray: Spread the tasks over a cluster.
        address: The cluster; the surrounding job's, or one started here, where None.
        tasks: How many tasks there will be at once; few tasks get more threads each.
    """
    if not use_ray:
        yield LocalWorkers(len(os.sched_getaffinity(0)))
        return
    import ray

    joined = ray.is_initialized()
    if not joined:
        with guard_joining(address):
            ray.init(address=address, log_to_driver=False, logging_level="warning")
    try:
        largest = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])
        total = int(ray.cluster_resources().get("CPU", 1))
        yield RayWorkers(max(1, min(largest, MAX_TASK_THREADS, total // max(1, tasks))))
    finally:
        if not joined:
            ray.shutdown()


def is_on_cluster() -> bool:
    """Tell whether this process belongs to a Ray cluster that was not started for it."""
    return bool(os.environ.get("RAY_ADDRESS"))


def wants_ray(config: IndexConfig, rows: int) -> bool:
    """Tell whether to spread the work over a cluster."""
    if config.workers != "auto":
        return config.workers == "ray"
    at_hand = config.ray_address is not None or is_on_cluster()
    return rows > (CLUSTER_ROWS if at_hand else LOCAL_ROWS)
