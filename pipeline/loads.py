"""What travels from read tasks to embedders: loads, rows with the encoded images of some chunks.

Read tasks run this and nothing heavier: every process that reads would pay for an import of torch
in seconds and in hundreds of megabytes.
"""

import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.containers.found import ReadOptions
from pipeline.errors import AbortError
from pipeline.readers import read_chunks
from pipeline.records import Chunk, Record, Shard
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


def _pack_load(items: Sequence[tuple[Shard, Chunk] | FailedShard], read_s: float) -> pa.Table:
    """Return a table of one row: the chunks without their image bytes, and the bytes."""
    chunks = [item for item in items if not isinstance(item, FailedShard)]
    failed = [item for item in items if isinstance(item, FailedShard)]
    images = [record.data for _, chunk in chunks for record in chunk.records]
    bare = [(replace(shard, members=()), _strip(chunk)) for shard, chunk in chunks]
    header = pickle.dumps(Load(bare, failed, read_s))
    columns = [pa.array([header], pa.binary()), _join_images(images)]
    return pa.table(columns, schema=LOAD_SCHEMA)


def _join_images(images: Sequence[bytes]) -> pa.Array:
    """Return a list of one row, in a buffer of just its size; a builder's may be twice that."""
    offsets = np.cumsum([0, *map(len, images)], dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(images))]
    values = pa.Array.from_buffers(pa.large_binary(), len(images), buffers)
    return pa.ListArray.from_arrays(pa.array([0, len(images)], pa.int32()), values)


def _strip(chunk: Chunk) -> Chunk:
    return replace(chunk, records=[replace(record, data=b"") for record in chunk.records])


def unpack_loads(table: pa.Table) -> Iterator[Load]:
    """Yield the loads of a table, with the image bytes back in their records."""
    images: Any = table.column("images")
    for row, header in enumerate(table.column("header").to_pylist()):
        load: Load = pickle.loads(header)
        values = (value.as_py() for value in images[row].values)
        chunks = [(shard, _fill(chunk, values)) for shard, chunk in load.chunks]
        yield replace(load, chunks=chunks)


def _fill(chunk: Chunk, values: Iterator[bytes]) -> Chunk:
    return replace(chunk, records=[replace(r, data=next(values)) for r in chunk.records])
