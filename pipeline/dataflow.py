"""DOOR to Ray Data: the graph, the actor, the committer.

Read tasks stream shards and send *loads*: one Ray Data row with the encoded images of one or more
chunks. Ray never splits or merges a row, so a chunk stays whole; only compressed bytes and
receipts cross the object store. An actor embeds a load, writes its parts, and returns a receipt
per chunk. The driver writes a shard's commit once its parts tile the shard.
"""

import logging
import os
import pickle
import re
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.config import EmbedConfig, parse_size
from pipeline.containers.found import ReadOptions
from pipeline.crops import CROPS_SCHEMA, Crop, pack_crops, unpack_crops
from pipeline.efficiency import IdleClock
from pipeline.embedder import Embedder, EmbedderOptions, make_crop_maker
from pipeline.engines import EngineOptions, check_engine_options
from pipeline.errors import AbortError, AccessError, ClusterError, SettingsError, StorageError
from pipeline.images import ImageLimits
from pipeline.loads import LOAD_SCHEMA, FailedShard, Load, group_shards, read_loads, unpack_loads
from pipeline.metrics import ActorMetrics, LoadSample
from pipeline.parts import OutputInfo, build_part, write_part
from pipeline.quarantine import Quarantine
from pipeline.records import Chunk, Embedding, PartInfo, Record, Shard, count_statuses
from pipeline.resources import Resources, fit_actors
from pipeline.storage import Storage, join_uri

_READ_CPUS = 0.05
_WHOLE_LOADS: dict[str, Any] = {
    "batch_size": None,
    "batch_format": "pyarrow",
    "zero_copy_batch": True,
}
_EXCEPTION_LINE = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)(: .*)?$")
_WRITE_ROUNDS = 3
"""How often a part is written, with all of storage's attempts each time: embedding costs more."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the driver learns of a chunk; small, and the same however often it is sent.

    Attributes:
        shard_id: The shard.
        chunk: Position among the shard's chunks; -1 when the shard could not be read at all.
        last: True on the shard's final chunk.
        num_records: Records that the reader found in the chunk.
        part: The written part; None for a shard without records, or one that failed.
        nbytes: Encoded bytes of its images.
        seconds: Time by stage; of a whole load, with its first chunk.
        load_s: How long the load was in its actor; with its first chunk, 0 with the others.
        notes: The reader's counts, on the last chunk.
        error: Why the shard could not be read; it stays uncommitted.
        fatal: Why the whole run has to stop. Sent rather than raised: what a worker raises, Ray
            wraps in exceptions of its own.
        batch_size: The embedder's batch size by then.
    """

    shard_id: str
    chunk: int
    last: bool
    num_records: int = 0
    part: PartInfo | None = None
    nbytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    load_s: float = 0.0
    notes: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    fatal: AbortError | None = None
    batch_size: int = 0


@dataclass(frozen=True, slots=True)
class FlowSettings:
    """Everything that read tasks and actors need; small, plain and picklable.

    Attributes:
        run_id: The run.
        output: The output.
        info: Its space and layout.
        weights: URI of the checkpoint.
        storage: How to reach storage.
        read: How shards are cut into chunks.
        embedder: Device, batch size, limits.
    """

    run_id: str
    output: str
    info: OutputInfo
    weights: str
    storage: Storage
    read: ReadOptions
    embedder: EmbedderOptions


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
    try:
        with _mute_stderr():
            ray.init(address=target, log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise SettingsError(
            f"no Ray cluster answers at {target!r} ({error}); check --ray-address or RAY_ADDRESS"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


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
    shards: Sequence[Shard], settings: FlowSettings, resources: Resources
) -> Generator[Receipt, None, None]:
    """Embed shards on the cluster; yield a receipt per chunk, in the order they are done.

    A receipt may come twice, after a fault; the part behind it has the same rows then. Closing
    the iterator stops the run.
    """
    with _explaining_faults():
        for batch in _build_flow(shards, settings, resources):
            for data in batch.column("receipt").to_pylist():
                receipt: Receipt = pickle.loads(data)
                if receipt.fatal is not None:
                    raise receipt.fatal
                yield receipt


def _build_flow(
    shards: Sequence[Shard], settings: FlowSettings, resources: Resources
) -> Iterable[pa.Table]:
    groups = group_shards(shards, num_groups=4 * resources.actors)
    with ray.data.DataContext.current(_make_context(resources)):
        dataset = ray.data.read_datasource(
            _ShardDatasource(groups, settings),
            override_num_blocks=len(groups),
            num_cpus=_READ_CPUS,
            concurrency=min(_count_readers(resources), len(groups)),
        )
        if resources.decoders:
            dataset = dataset.map_batches(
                _DecodeActor,
                fn_constructor_kwargs={"settings": settings},
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.decoders),
                num_cpus=0.9,
                **_WHOLE_LOADS,
            )
        dataset = dataset.map_batches(
            _EmbedActor,
            fn_constructor_kwargs={"settings": settings, "threads": _count_threads(resources)},
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


@contextmanager
def _explaining_faults() -> Iterator[None]:
    """Turn what Ray raises into the project's exceptions."""
    try:
        yield
    except ray.exceptions.RayError as error:
        if isinstance(cause := getattr(error, "cause", None), AbortError):
            raise cause from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        causes = [line for line in lines if _EXCEPTION_LINE.match(line)] or lines or [""]
        raise ClusterError(
            f"Ray gave up with {type(error).__name__}: {causes[-1]}; committed shards stay: "
            "look for more above or in Ray's logs, then run again"
        ) from error


def time_sample(records: Sequence[Record], settings: FlowSettings, resources: Resources) -> float:
    """Embed a sample on one actor's resources; return its images per second, warmed up."""

    @ray.remote(num_cpus=0.9 * resources.cpus, num_gpus=resources.gpus)  # type: ignore[untyped-decorator]
    def embed_twice(sample: Sequence[Record]) -> float:
        embedder = _make_embedder(settings, _count_threads(resources))
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


def _count_readers(resources: Resources) -> int:
    """Return how many shards to stream at once; each stream gives some 1,000 images a second."""
    return 4 * resources.actors if resources.gpus else max(2, resources.actors // 4)


def _count_threads(resources: Resources) -> int:
    return max(1, round(resources.cpus))


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

    def __init__(self, groups: Sequence[Sequence[Shard]], settings: FlowSettings) -> None:
        super().__init__()
        self._groups = groups
        self._settings = settings

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(shard.size_bytes for group in self._groups for shard in group)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [self._make_task(group) for group in self._groups]

    def _make_task(self, group: Sequence[Shard]) -> ReadTask:
        size = sum(shard.size_bytes for shard in group)
        metadata = BlockMetadata(num_rows=None, size_bytes=size, input_files=None, exec_stats=None)
        # nothing of this module is named: a process that reads need not import torch
        storage, options = self._settings.storage, self._settings.read
        read = partial(read_loads, group, storage=storage, options=options)
        return ReadTask(read, metadata, LOAD_SCHEMA)


def _make_embedder(settings: FlowSettings, threads: int) -> Embedder:
    """Build the embedder of this process, on the device that Ray gave it."""
    options = settings.embedder
    if not ray.get_gpu_ids():
        options = replace(options, device="cpu", torch_threads=threads)
    return Embedder(
        settings.info.space, weights=settings.weights, options=options, storage=settings.storage
    )


class _DecodeActor:
    """A process that turns loads into loads of crops, for embedders on other nodes."""

    def __init__(self, settings: FlowSettings) -> None:
        options = replace(settings.embedder, device="cpu", decode_threads=1)
        self._crops = make_crop_maker(settings.info.space, options)
        self._quarantine = Quarantine(settings.run_id, options.limits)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.concat_tables([self._decode(load) for load in unpack_loads(batch)])

    def _decode(self, load: Load) -> pa.Table:
        with self._quarantine.enter(load) as safe:
            return pack_crops(safe, list(self._crops.make(safe.records)))


class _EmbedActor:
    """A process with an embedder; turns loads into parts and receipts."""

    _embedder: Embedder

    def __init__(self, settings: FlowSettings, threads: int) -> None:
        self._settings = settings
        self._failure: AbortError | None = None
        try:
            self._embedder = _make_embedder(settings, threads)
        except AbortError as error:
            self._failure = error
        self._quarantine = Quarantine(settings.run_id, settings.embedder.limits)
        self._metrics = ActorMetrics(settings.run_id)
        self._idle = IdleClock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        loads: Iterable[tuple[Load, list[Crop | Embedding] | None]]
        if batch.schema.equals(CROPS_SCHEMA):
            loads = unpack_crops(batch)
        else:
            loads = ((load, None) for load in unpack_loads(batch))
        receipts = [receipt for item in loads for receipt in self._try_load(*item)]
        return pa.table({"receipt": pa.array(map(pickle.dumps, receipts), pa.binary())})

    def _try_load(self, load: Load, crops: list[Crop | Embedding] | None) -> list[Receipt]:
        start_s = time.perf_counter()
        try:
            if self._failure is not None:
                raise self._failure
            with self._idle.interrupted() as idle_s, self._quarantine.enter(load) as safe:
                receipts = list(self._embed_load(safe, crops))
            return self._record(_add_times(receipts, idle_s, time.perf_counter() - start_s))
        except AbortError as error:
            return [Receipt("", -1, True, fatal=error)]

    def _record(self, receipts: list[Receipt]) -> list[Receipt]:
        seconds: Counter[str] = Counter()
        for receipt in receipts:
            seconds.update(receipt.seconds)
        on_gpu = self._embedder.options.device != "cpu"
        self._metrics.record(
            LoadSample(
                statuses=count_statuses(r.part.statuses for r in receipts if r.part is not None),
                seconds=seconds,
                nbytes=sum(receipt.nbytes for receipt in receipts),
                batch_size=self._embedder.batch_size,
                gpu_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
            )
        )
        return receipts

    def _embed_load(self, load: Load, crops: list[Crop | Embedding] | None) -> Iterator[Receipt]:
        for failed in load.failed:
            yield _describe_failed(failed)
        if crops is None:
            outcome = self._embedder.embed(load.records)
        else:
            outcome = self._embedder.embed_crops(crops)
        outcome = replace(outcome, seconds={"read": load.read_s} | outcome.seconds)
        embeddings = iter(outcome.embeddings)
        for shard, chunk in load.chunks:
            own = [next(embeddings) for _ in chunk.records]
            start_s = time.perf_counter()
            part = self._write(shard, chunk, own)
            seconds = {"write": time.perf_counter() - start_s} | outcome.seconds
            outcome = replace(outcome, seconds={})  # counted once a load
            yield Receipt(
                shard.id,
                chunk.index,
                chunk.last,
                num_records=len(chunk.records),
                part=part,
                nbytes=sum(record.nbytes for record in chunk.records),
                seconds=seconds,
                notes=dict(chunk.notes),
                batch_size=self._embedder.batch_size,
            )

    def _write(self, shard: Shard, chunk: Chunk, embeddings: Sequence[Any]) -> PartInfo | None:
        if not chunk.records:
            return None
        settings = self._settings
        table = build_part(chunk.records, embeddings, settings.info.schema)
        write = partial(
            write_part,
            settings.output,
            table,
            folder=shard.folder,
            chunk=chunk.index,
            space_id=settings.info.space.id,
            storage=settings.storage,
        )
        for _ in range(_WRITE_ROUNDS - 1):
            with suppress(StorageError):
                return write()
        return write()


def _add_times(receipts: list[Receipt], idle_s: float, load_s: float) -> list[Receipt]:
    first, *rest = receipts
    seconds = first.seconds | {"idle": idle_s}
    return [replace(first, seconds=seconds, load_s=load_s), *rest]


def _describe_failed(failed: FailedShard) -> Receipt:
    """Storage may still give other shards; wrong settings or credentials concern them all."""
    error = failed.error
    if isinstance(error, StorageError) and not isinstance(error, AccessError):
        return Receipt(failed.shard_id, -1, True, error=str(error))
    return Receipt(failed.shard_id, -1, True, fatal=error)


def _check_device(config: EmbedConfig, device: str) -> None:
    """Refuse what the actors' device cannot do, before any of them is started."""
    check_engine_options(EngineOptions(config.engine, device, config.precision))
    if config.decode == "gpu" and device == "cpu":
        raise SettingsError("decode gpu needs GPUs, and Ray has none; use --decode exact or fast")
    if config.decode == "gpu" and config.decode_stage:
        raise SettingsError("decode gpu leaves nothing to a decode stage; drop --decode-stage")


def make_flow_settings(
    config: EmbedConfig, info: OutputInfo, resources: Resources, *, run_id: str
) -> FlowSettings:
    """Gather what read tasks and actors need from a run's settings."""
    limits = ImageLimits(
        max_pixels=config.max_pixels,
        max_image_bytes=parse_size(config.max_image_bytes, setting="max_image_bytes"),
        timeout_s=config.image_timeout_s,
    )
    on_gpu = resources.gpus > 0
    _check_device(config, "cuda" if on_gpu else "cpu")
    return FlowSettings(
        run_id=run_id,
        output=config.output,
        info=info,
        weights=join_uri(config.output, info.weights),
        storage=Storage(config.storage),
        read=ReadOptions(
            chunk_images=info.layout.chunk_images,
            chunk_bytes=info.layout.chunk_bytes,
            max_image_bytes=limits.max_image_bytes,
            carry=info.layout.carry,
            image_column=info.layout.image_column,
            key_column=info.layout.key_column,
        ),
        embedder=EmbedderOptions(
            device="cuda" if on_gpu else "cpu",
            engine=config.engine,
            batch_size=config.batch_size or (128 if on_gpu else 16),
            decode_threads=_count_threads(resources),
            limits=limits,
            image_timeout_s=config.image_timeout_s,
            top_k_classes=info.layout.top_k_classes,
            embedding_dtype=info.layout.embedding_dtype,
        ),
    )
