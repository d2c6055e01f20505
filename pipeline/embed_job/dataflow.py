"""DOOR to Ray Data: the cluster, the graph, the faults.

Read tasks stream shards and send *loads*: one Ray Data row with the encoded images of one or more
chunks. Ray never splits or merges a row, so a chunk stays whole; only compressed bytes and
receipts cross the object store. An actor embeds a load, writes its parts, and returns a receipt
per chunk. The driver writes a shard's commit once its parts tile the shard.
"""

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.config import EmbedConfig
from pipeline.embed_job.actors import DecodeActor, EmbedActor, FlowSettings, make_embedder
from pipeline.embed_job.resources import Resources, fit_actors
from pipeline.embed_job.wire import (
    LOAD_SCHEMA,
    LoadBounds,
    Receipt,
    bound_loads,
    group_shards,
    read_loads,
    unpack_receipts,
)
from pipeline.errors import AbortError, ClusterError
from pipeline.joining import guard_joining
from pipeline.records import Record, Shard

_READ_CPUS = 0.05
_WHOLE_LOADS: dict[str, Any] = {
    "batch_size": 1,  # a row is a load; with GPUs Ray insists on a number
    "batch_format": "pyarrow",
    "zero_copy_batch": True,
}
_EXCEPTION_LINE = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)(: .*)?$")


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Be part of a Ray cluster; ends it afterwards if it was started here.

    Joins ``address``, else the cluster that ``RAY_ADDRESS`` names (``ray job submit`` sets it),
    else starts one on this machine. Ray's chatter is kept off the terminal.

    Raises:
        SettingsError: No cluster answers at ``address``.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"include_dashboard": False} if target == "local" else {}
    with guard_joining(address), _mute_stderr():
        ray.init(address=target, log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        with _last_words():
            yield
    finally:
        ray.shutdown()


_LAST_WORDS = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
if not sys.stdin.buffer.read():
    print(
        "error: the run ended without a word of its own: Ray's node process (raylet) or its GCS",
        "died, or the driver was killed; committed shards stay: look at the memory and the disk of",
        "this machine and at Ray's logs, then run again",
        file=sys.stderr,
    )
"""


@contextmanager
def _last_words() -> Iterator[None]:
    """Say why a run vanished: Ray's library ends the process at once when its raylet or GCS dies.

    Nothing of this process runs then, so a child waits for the pipe from it to close.
    """
    command = [sys.executable, "-I", "-S", "-c", _LAST_WORDS]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        try:
            yield
        finally:
            child.stdin.write(b"ended")


@contextmanager
def _mute_stderr() -> Iterator[None]:
    """Keep what Ray's native code says while it starts off the terminal; exceptions still tell."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def choose_resources(config: EmbedConfig) -> Resources:
    """Return the actors that fit the cluster as it is now; see ``resources.fit_actors``."""
    return fit_actors(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def run_flow(
    shards: Sequence[Shard],
    settings: FlowSettings,
    resources: Resources,
    *,
    stand_in: type | None = None,
) -> Generator[Receipt, None, None]:
    """Embed shards on the cluster; yield a receipt per chunk, in the order they are done.

    A receipt may come twice, after a fault; the part behind it has the same rows then. Closing
    the iterator stops the run. ``stand_in``, made without arguments, takes the place of the
    embedder actors in simulations.
    """
    with _explaining_faults():
        for batch in _build_flow(shards, settings, resources, stand_in):
            for receipt in unpack_receipts(batch):
                if receipt.fatal is not None:
                    raise receipt.fatal
                yield receipt


def _build_flow(
    shards: Sequence[Shard],
    settings: FlowSettings,
    resources: Resources,
    stand_in: type | None,
) -> Iterable[pa.Table]:
    with ray.data.DataContext.current(_make_context(resources)):
        dataset = _read(shards, settings, resources, simulated=stand_in is not None)
        if resources.decoders:
            dataset = dataset.map_batches(
                DecodeActor,
                fn_constructor_kwargs={"settings": settings},
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.decoders),
                num_cpus=0.9,
                **_WHOLE_LOADS,
            )
        dataset = dataset.map_batches(
            stand_in or EmbedActor,
            fn_constructor_kwargs={} if stand_in else {"settings": settings},
            compute=_choose_pool(resources),
            # slightly less than its cores, in Ray's books only: reading needs a share of them
            num_cpus=0.9 * resources.cpus,
            num_gpus=resources.gpus or None,
            **_WHOLE_LOADS,
        )
    batches: Iterable[pa.Table] = dataset.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    return batches


def _read(
    shards: Sequence[Shard], settings: FlowSettings, resources: Resources, *, simulated: bool
) -> ray.data.Dataset:
    groups = group_shards(shards, num_groups=4 * resources.actors)
    to_gpu = resources.gpus > 0 and not resources.decoders
    bounds = bound_loads(shards, settings.read, actors=resources.actors, to_gpu=to_gpu)
    return ray.data.read_datasource(
        _ShardDatasource(groups, settings, bounds),
        override_num_blocks=len(groups),
        num_cpus=_READ_CPUS,
        concurrency=min(_count_readers(resources, simulated=simulated), len(groups)),
    )


@contextmanager
def _explaining_faults() -> Iterator[None]:
    """Turn what Ray raises into the project's exceptions."""
    try:
        yield
    except ray.exceptions.RayError as error:
        if isinstance(cause := getattr(error, "cause", None), AbortError):
            raise cause from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raised = [line for line in lines if _EXCEPTION_LINE.match(line)]
        causes = [line for line in raised if not line.startswith("ray.")] or raised or lines or [""]
        raise ClusterError(
            f"Ray gave up with {type(error).__name__}: {causes[-1]}; committed shards stay: "
            "look for more above or in Ray's logs, then run again"
        ) from error


def time_sample(records: Sequence[Record], settings: FlowSettings, resources: Resources) -> float:
    """Embed a sample on one actor's resources; return its images per second, warmed up."""

    @ray.remote(num_cpus=0.9 * resources.cpus, num_gpus=resources.gpus)  # type: ignore[untyped-decorator]
    def embed_twice(sample: Sequence[Record]) -> float:
        with closing(make_embedder(settings)) as embedder:
            embedder.embed(sample)
            start_s = time.perf_counter()
            embedder.embed(sample)
            return len(sample) / (time.perf_counter() - start_s)

    with _explaining_faults():
        return float(ray.get(embed_twice.remote(records)))


def _make_context(resources: Resources) -> ray.data.DataContext:
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A load is a block of its own: one actor call, and nothing waits for a block to fill up.
    context.target_max_block_size = 1
    context.target_min_block_size = 1
    # Actors that are killed while they start are replaced, but not for ever.
    context.max_consecutive_actor_init_deaths = 2 * resources.actors
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return context


def _count_readers(resources: Resources, *, simulated: bool) -> int:
    """Return how many shards to stream at once; each stream gives some 1,000 images a second.

    A simulation has all its processes on one machine, and its images are tiny.
    """
    if resources.gpus:
        return resources.actors if simulated else 4 * resources.actors
    return max(2, resources.actors // 4)


def _choose_pool(resources: Resources) -> ray.data.ActorPoolStrategy:
    if not resources.gpus:
        return ray.data.ActorPoolStrategy(
            min_size=1, max_size=resources.actors, initial_size=resources.actors
        )
    # Two chunks in an actor at once: one is decoded while the other is in the forward pass.
    return ray.data.ActorPoolStrategy(
        min_size=1,
        max_size=resources.actors,
        initial_size=resources.actors,
        max_concurrent_calls_per_actor=2,
        max_tasks_in_flight_per_actor=4,
        enable_true_multi_threading=True,
    )


class _ShardDatasource(Datasource):  # type: ignore[misc]
    """One read task per group of shards."""

    def __init__(
        self, groups: Sequence[Sequence[Shard]], settings: FlowSettings, bounds: LoadBounds
    ) -> None:
        super().__init__()
        self._groups = groups
        self._settings = settings
        self._bounds = bounds

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(shard.size_bytes for group in self._groups for shard in group)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [self._make_task(group) for group in self._groups]

    def _make_task(self, group: Sequence[Shard]) -> ReadTask:
        size = sum(shard.size_bytes for shard in group)
        metadata = BlockMetadata(num_rows=None, size_bytes=size, input_files=None, exec_stats=None)
        # nothing of this module is named: a process that reads need not import torch
        storage, options = self._settings.storage, self._settings.read
        read = partial(read_loads, group, storage=storage, options=options, bounds=self._bounds)
        return ReadTask(read, metadata, LOAD_SCHEMA)
