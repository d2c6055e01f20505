"""Loads, which read tasks send to embedders: encoded images of some chunks as one Ray Data row.

Read tasks run this and nothing heavier: every process that reads would pay for an import of torch
in seconds and in hundreds of megabytes.
"""

import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import AbortError, StorageError
from pipeline.input.container import ReadOptions
from pipeline.input.reader import read_chunks
from pipeline.records import Chunk, PartInfo, Record, Shard
from pipeline.storage import Storage

_TASK_BYTES = 256 * 2**20
_LOAD_BYTES = 128 * 2**20
_LOAD_CHUNKS = 16
_LOADS_PER_ACTOR = 8

LOAD_SCHEMA = pa.schema(
    [
        pa.field("header", pa.binary()),
        pa.field("images", pa.list_(pa.large_binary())),
    ]
)


@dataclass(frozen=True, slots=True)
class LoadBounds:
    """How much may travel together; a chunk beyond that travels alone.

    Attributes:
        images: Most images in a load.
        nbytes: Most encoded bytes in a load.
    """

    images: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FailedShard:
    """A shard that could not be read; travels in place of its chunks."""

    shard_id: str
    error: AbortError


@dataclass(frozen=True, slots=True)
class Load:
    """Chunks that travel together.

    Attributes:
        chunks: Each with its shard, whose members stay behind.
        failed: Shards that could not be read.
        read_s: Time that a read task spent on it.
    """

    chunks: Sequence[tuple[Shard, Chunk]]
    failed: Sequence[FailedShard] = ()
    read_s: float = 0.0

    @property
    def records(self) -> list[Record]:
        """The records of all chunks, in order."""
        return [record for _, chunk in self.chunks for record in chunk.records]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an actor reports to the driver about a chunk; sending it twice does no harm.

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
        error: Why the shard could not be read: it stays uncommitted, and all others are done.
        fatal: Why the whole run has to stop. Sent rather than raised: what a worker raises, Ray
            wraps in exceptions of its own.
        batch_size: The embedder's batch size by then.
        absent: Images of the chunk that could not be had: row and reason.
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
    error: AbortError | None = None
    fatal: AbortError | None = None
    batch_size: int = 0
    absent: tuple[tuple[int, str], ...] = ()


def bound_loads(
    shards: Sequence[Shard], options: ReadOptions, *, actors: int, to_gpu: bool
) -> LoadBounds:
    """Return how much may travel together to one of ``actors`` embedders.

    Every load costs the driver milliseconds. A CPU takes seconds for a chunk, so that hardly
    matters, and small loads keep all busy to the end. A GPU takes a tenth of a second for one:
    it is sent many, yet no more than an eighth of its share of the input.
    """
    if not to_gpu:
        return LoadBounds(options.chunk_images, options.chunk_bytes)
    share = sum(shard.size_bytes for shard in shards) // (_LOADS_PER_ACTOR * actors)
    nbytes = min(_LOAD_BYTES, _LOAD_CHUNKS * options.chunk_bytes, share)
    return LoadBounds(_LOAD_CHUNKS * options.chunk_images, nbytes)


def group_shards(shards: Sequence[Shard], *, num_groups: int) -> list[list[Shard]]:
    """Deal shards out to read tasks: a large one alone, many small ones together.

    Keeps the order. Groups hold at most 256 MiB, and less where that would leave fewer than
    ``num_groups`` of them.
    """
    total = sum(shard.size_bytes for shard in shards)
    most = min(_TASK_BYTES, max(1, total // max(1, num_groups)))
    groups: list[list[Shard]] = []
    size = 0
    for shard in shards:
        if not groups or size + shard.size_bytes > most:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.size_bytes
    return groups


def read_loads(
    shards: Iterable[Shard], *, storage: Storage, options: ReadOptions, bounds: LoadBounds
) -> Iterator[pa.Table]:
    """Read shards as loads, tables of one row: chunks travel together as far as bounds allow."""
    items: list[tuple[Shard, Chunk] | FailedShard] = []
    num_images = nbytes = 0
    start_s = time.perf_counter()
    for item in _read_shards(shards, storage, options):
        records = [] if isinstance(item, FailedShard) else item[1].records
        size = sum(len(record.data) for record in records)
        full = num_images + len(records) > bounds.images or nbytes + size > bounds.nbytes
        if items and full:
            load = _pack_load(items, time.perf_counter() - start_s)
            items, num_images, nbytes = [], 0, 0
            yield load
            del load  # nothing that was sent stays in memory while the next is read
            start_s = time.perf_counter()
        items.append(item)
        num_images += len(records)
        nbytes += size
    if items:
        yield _pack_load(items, time.perf_counter() - start_s)


def _read_shards(
    shards: Iterable[Shard], storage: Storage, options: ReadOptions
) -> Iterator[tuple[Shard, Chunk] | FailedShard]:
    for shard in shards:
        try:
            for chunk in read_chunks(shard, storage=storage, options=options):
                yield shard, chunk
        except AbortError as error:
            yield FailedShard(shard.id, error)
        except (OSError, MemoryError) as error:  # this machine's: it says nothing of the shard
            reason = f"cannot read {shard.source!r} here: {error or type(error).__name__}"
            fault = StorageError(f"{reason}; look at the machine's memory and disks, run again")
            yield FailedShard(shard.id, fault)


def _pack_load(items: Sequence[tuple[Shard, Chunk] | FailedShard], read_s: float) -> pa.Table:
    """Return a table of one row: the chunks without their image bytes, and the bytes."""
    chunks = [item for item in items if not isinstance(item, FailedShard)]
    failed = [item for item in items if isinstance(item, FailedShard)]
    images = [record.data for _, chunk in chunks for record in chunk.records]
    bare = [(replace(shard, members=()), _strip(chunk)) for shard, chunk in chunks]
    header = pickle.dumps(Load(bare, failed, read_s))
    columns = [pa.array([header], pa.binary()), _join_images(images)]
    return pa.table(columns, schema=LOAD_SCHEMA)


def _join_images(images: Sequence[bytes | memoryview]) -> pa.Array:
    """Return a list of one row, in a buffer of just its size; a builder's may be twice that."""
    offsets = np.cumsum([0, *map(len, images)], dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(images))]
    values = pa.Array.from_buffers(pa.large_binary(), len(images), buffers)
    return pa.ListArray.from_arrays(pa.array([0, len(images)], pa.int32()), values)


def _strip(chunk: Chunk) -> Chunk:
    return replace(chunk, records=[replace(record, data=b"") for record in chunk.records])


def unpack_loads(table: pa.Table) -> Iterator[Load]:
    """Yield the loads of a table, with the image bytes back in their records.

    The bytes stay where the table holds them: copies would cost an actor the interpreter's lock.
    """
    images: Any = table.column("images")
    for row, header in enumerate(table.column("header").to_pylist()):
        load: Load = pickle.loads(header)
        views = _view_images(images[row].values)
        chunks = [(shard, _fill(chunk, views)) for shard, chunk in load.chunks]
        yield replace(load, chunks=chunks)


def _view_images(values: pa.LargeBinaryArray) -> Iterator[memoryview]:
    """Yield the bytes of each value, in place."""
    _, offsets, data = values.buffers()
    starts = np.frombuffer(offsets, np.int64)[values.offset :][: len(values) + 1].tolist()
    view = memoryview(b"" if data is None else data).cast("B")
    return (view[start:end] for start, end in pairwise(starts))


def _fill(chunk: Chunk, values: Iterator[bytes | memoryview]) -> Chunk:
    return replace(chunk, records=[replace(r, data=next(values)) for r in chunk.records])


def pack_receipts(receipts: Sequence[Receipt]) -> pa.Table:
    """Return a table of one row: a row is a block of its own to Ray, which takes ten a second."""
    return pa.table({"receipts": pa.array([pickle.dumps(tuple(receipts))], pa.binary())})


def unpack_receipts(table: pa.Table) -> Iterator[Receipt]:
    """Yield what ``pack_receipts`` packed."""
    for data in table.column("receipts").to_pylist():
        yield from pickle.loads(data)
