"""The actors of a run: decode a load, embed it, write its parts."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import torch

from pipeline.config import EmbedConfig
from pipeline.embed_job.crop_table import CROPS_SCHEMA, pack_crops, unpack_crops
from pipeline.embed_job.deaths import count_deaths
from pipeline.embed_job.efficiency import IdleClock
from pipeline.embed_job.metrics import ActorMetrics, LoadSample
from pipeline.embed_job.prepare import make_read_options
from pipeline.embed_job.resources import Resources
from pipeline.embed_job.wire import FailedShard, Load, Receipt, pack_receipts, unpack_loads
from pipeline.errors import AbortError, CredentialsError, SettingsError, StorageError
from pipeline.images.buffers import SharedBuffers
from pipeline.images.decode import ImageLimits
from pipeline.images.host import Crop
from pipeline.inference.embedder import Embedder, EmbedderOptions, make_host_crop_maker
from pipeline.inference.engines import EngineOptions, check_engine_options
from pipeline.input.container import ReadOptions
from pipeline.output.info import OutputInfo
from pipeline.output.parts import build_part, write_part
from pipeline.records import Chunk, Embedding, PartInfo, Shard, count_statuses
from pipeline.storage import Storage, join_uri

_WRITE_THREADS = 8  # a load of many small shards has many parts
_WRITE_ROUNDS = 3
"""How often a part is written, with all of storage's attempts each time: embedding costs more."""


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


def make_embedder(settings: FlowSettings) -> Embedder:
    """Build the embedder of this process."""
    return Embedder.load(
        settings.info.space,
        weights=settings.weights,
        options=settings.embedder,
        storage=settings.storage,
    )


class DecodeActor:
    """A process that turns loads into loads of crops, for embedders on other nodes."""

    def __init__(self, settings: FlowSettings) -> None:
        space = settings.info.space
        options = replace(settings.embedder, device="cpu", decode_processes=1)
        buffers = SharedBuffers(options.batch_size, space.image_size)
        self._crops = make_host_crop_maker(space, options, buffers)
        self._run_id = settings.run_id

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Map a table of loads to one of crops."""
        return pa.concat_tables([self._decode(load) for load in unpack_loads(batch)])

    def _decode(self, load: Load) -> pa.Table:
        with count_deaths(self._run_id, load):
            return pack_crops(load, list(self._crops.make(load.records)))


class EmbedActor:
    """A process with an embedder; turns loads into parts and receipts.

    Args:
        settings: The run's settings.
        make: Builds the embedder.
    """

    _embedder: Embedder

    def __init__(
        self, settings: FlowSettings, *, make: Callable[[FlowSettings], Embedder] = make_embedder
    ) -> None:
        self._settings = settings
        self._failure: AbortError | None = None
        try:
            self._embedder = make(settings)
        except AbortError as error:
            self._failure = error
        self._metrics = ActorMetrics(settings.run_id)
        self._idle = IdleClock()
        self._writers = ThreadPoolExecutor(_WRITE_THREADS, "write")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Map a table of loads, or of crops, to one of receipts."""
        loads: Iterable[tuple[Load, list[Crop | Embedding] | None]]
        if batch.schema.equals(CROPS_SCHEMA):
            loads = unpack_crops(batch)
        else:
            loads = ((load, None) for load in unpack_loads(batch))
        receipts = [receipt for item in loads for receipt in self._try_load(*item)]
        return pack_receipts(receipts)

    def _try_load(self, load: Load, crops: list[Crop | Embedding] | None) -> list[Receipt]:
        start_s = time.perf_counter()
        try:
            if self._failure is not None:
                raise self._failure
            with self._idle.interrupted() as idle_s, count_deaths(self._settings.run_id, load):
                receipts = list(self._embed_load(load, crops))
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
        own = [[next(embeddings) for _ in chunk.records] for _, chunk in load.chunks]
        parts = self._writers.map(self._write, load.chunks, own)
        for shard, chunk in load.chunks:
            start_s = time.perf_counter()
            part = next(parts)
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
                absent=chunk.absent,
            )

    def _write(
        self, place: tuple[Shard, Chunk], embeddings: Sequence[Embedding]
    ) -> PartInfo | None:
        shard, chunk = place
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
    """Credentials that are lost concern all shards; any other fault may be of this one alone."""
    if isinstance(failed.error, CredentialsError):
        return Receipt(failed.shard_id, -1, True, fatal=failed.error)
    return Receipt(failed.shard_id, -1, True, error=failed.error)


def depends_on_device(config: EmbedConfig) -> bool:
    """Return whether some device cannot do what the settings ask for."""
    for device in ("cpu", "cuda"):
        try:
            check_device(config, device)
        except SettingsError:
            return True
    return False


def check_device(config: EmbedConfig, device: str) -> None:
    """Refuse what the actors' device cannot do, before any of them is started.

    Raises:
        SettingsError: It cannot do it.
    """
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
        max_image_bytes=config.max_image_bytes.nbytes,
    )
    on_gpu = resources.gpus > 0
    cores = max(1, round(resources.cpus))
    check_device(config, resources.device)
    return FlowSettings(
        run_id=run_id,
        output=config.output,
        info=info,
        weights=join_uri(config.output, info.weights),
        storage=Storage(config.storage),
        read=replace(make_read_options(info), max_image_bytes=limits.max_image_bytes),
        embedder=EmbedderOptions(
            device=resources.device,
            engine=config.engine,
            batch_size=config.batch_size or (128 if on_gpu else 16),
            decode_processes=cores,
            torch_threads=None if on_gpu else cores,
            limits=limits,
            image_timeout_s=config.image_timeout_s,
            top_k_classes=info.layout.top_k_classes,
            embedding_dtype=info.layout.embedding_dtype,
        ),
    )
