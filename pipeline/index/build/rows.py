"""Rows on their way into a segment: from committed parts, or from segments that are merged."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import CorruptionError, ObjectMissingError
from pipeline.index.faiss.codes import Floats
from pipeline.index.files import FileStore
from pipeline.index.manifest import SegmentInfo, ShardRows
from pipeline.index.search.keys import complete_columns
from pipeline.index.vectors import MIN_NORM, Flags, normalise_rows, open_vectors, unpack_bits
from pipeline.output.info import read_output_info
from pipeline.records import Commit
from pipeline.storage import Storage, join_uri

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK_ROWS = 8192

READ_THREADS = 8
_DROPPED_COLUMNS = ("status", "error", "embedding", "class_prob")


@dataclass(frozen=True, slots=True)
class PartSource:
    """Rows of one committed part.

    Attributes:
        shard_id: Its shard.
        path: Path under the embeddings.
        rows: Number of rows by its commit.
        rows_sha256: Digest of its rows by its commit.
        size_bytes: Size by its commit.
        take: The positions to take; None for every row with a vector.
    """

    shard_id: str
    path: str
    rows: int
    rows_sha256: str
    size_bytes: int
    take: tuple[int, ...] | None = None

    def choose(self, positions: npt.NDArray[np.int64]) -> "PartSource":
        """Return the same part, of which only these positions are taken."""
        return replace(self, take=tuple(map(int, positions)))


@dataclass(frozen=True, slots=True)
class SegmentSource:
    """The live rows of an existing segment.

    Attributes:
        segment: The segment.
        dead: One bit a row, lowest first, 1 for deleted; empty if all are live.
    """

    segment: SegmentInfo
    dead: bytes = b""


@dataclass(frozen=True, slots=True)
class Block:
    """Some thousand rows, ready to be indexed.

    Attributes:
        vectors: Unit vectors, float32, (n, dim).
        keys: What is known of each row besides its vector; row-aligned.
        shards: Shard, number of rows, number of rows left out, in row order; an empty name
            for rows that come from another segment.
        skipped: Number of rows left out by reason.
    """

    vectors: Floats
    keys: pa.Table
    shards: tuple[tuple[str, int, int], ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)


def read_part(embeddings: str, source: PartSource, storage: Storage) -> pa.Table:
    """Return all rows of a part, whatever their status.

    Raises:
        CorruptionError: It is missing, damaged, or not what its commit recorded.
    """
    uri = join_uri(embeddings, source.path)
    try:
        data = pa.BufferReader(storage.read(uri))
        table = pq.ParquetFile(data, page_checksum_verification=True).read(use_threads=False)
    except ObjectMissingError as error:
        raise CorruptionError(f"{uri} is missing; {_explain(embeddings, source)}") from error
    except (pa.ArrowException, OSError) as error:
        raise CorruptionError(
            f"{uri} cannot be read: {error}; {_explain(embeddings, source)}"
        ) from error
    if table.num_rows != source.rows:
        raise CorruptionError(
            f"{uri} has {table.num_rows} rows, its commit says {source.rows}; "
            f"{_explain(embeddings, source)}"
        )
    return table


def _explain(embeddings: str, source: PartSource) -> str:
    """Return what to do about a damaged part."""
    commit = join_uri(embeddings, "commits", f"{source.shard_id}.json")
    return f"delete {commit} and run the embed job again, which makes that shard's parts anew"


def read_part_rows(embeddings: str, source: PartSource, *, storage: Storage) -> Block:
    """Return the rows of a part that go into the index, normalised."""
    table = read_part(embeddings, source, storage)
    if source.take is not None:
        table = table.take(pa.array(source.take, pa.int64()))
    table = table.filter(pc.is_valid(table.column("embedding")))
    kept, norms, skipped = split_usable(read_vectors(table, join_uri(embeddings, source.path)))
    table = table.filter(pa.array(kept))
    vectors = read_vectors(table, source.path) / norms[:, None]
    names = [name for name in table.column_names if name not in _DROPPED_COLUMNS]
    keys = table.select(names).append_column(
        pa.field("norm", pa.float32(), nullable=False), pa.array(norms)
    )
    counts = (source.shard_id, len(vectors), sum(skipped.values()))
    return Block(vectors, keys, (counts,), skipped)


def read_vectors(table: pa.Table, shown_as: str) -> Floats:
    """Return the ``embedding`` column, which must have no nulls, as float32 (n, dim).

    Raises:
        CorruptionError: The column is missing or no list of fixed size.
    """
    if "embedding" not in table.column_names:
        raise CorruptionError(f"{shown_as} has no embedding column; is it an embeddings output?")
    column = table.column("embedding")
    if not pa.types.is_fixed_size_list(column.type):
        raise CorruptionError(f"{shown_as} has embeddings of type {column.type}")
    flat = pc.list_flatten(column.combine_chunks()).to_numpy(zero_copy_only=False)
    wide: Floats = flat.astype(np.float32, copy=False)
    return wide.reshape(len(column), column.type.list_size)


def split_usable(vectors: Floats) -> tuple[Flags, Floats, dict[str, int]]:
    """Tell rows with a direction from those without.

    Returns:
        Which rows to keep (bool), the norms of those kept, and the number of others by reason.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    finite = np.isfinite(norms)
    zero = finite & (norms < MIN_NORM)
    kept = finite & ~zero
    counts = {"non_finite": int((~finite).sum()), "zero": int(zero.sum())}
    return kept, norms[kept], {reason: number for reason, number in counts.items() if number}


def read_segment_rows(source: SegmentSource, files: FileStore, dim: int) -> Iterator[Block]:
    """Yield the live rows of a segment in blocks, in row order."""
    segment = source.segment
    vectors = open_vectors(files.fetch(segment.files["vectors"]), segment, dim)
    live = ~unpack_bits(source.dead, segment.rows)
    reader = pq.ParquetFile(files.fetch(segment.files["keys"]))
    first = 0
    for batch in reader.iter_batches(BLOCK_ROWS):
        keep = live[first : first + batch.num_rows]
        chosen = vectors[first : first + batch.num_rows][keep].astype(np.float32)
        keys = pa.Table.from_batches([batch]).filter(pa.array(keep))
        first += batch.num_rows
        yield Block(normalise_rows(chosen), keys, (("", len(chosen), 0),))


def list_parts(commits: Iterable[Commit]) -> list[PartSource]:
    """Return the parts of commits that hold a vector, in order."""
    return [
        PartSource(commit.shard_id, part.path, part.rows, part.rows_sha256, part.size_bytes)
        for commit in commits
        for part in commit.parts
        if part.statuses.get("ok")
    ]


def iter_blocks(
    sources: Sequence[PartSource | SegmentSource],
    *,
    embeddings: str,
    files: FileStore,
    dim: int,
) -> Iterator[Block]:
    """Yield the rows of all sources in order, about ``BLOCK_ROWS`` at a time.

    All keys have the columns' types as the embeddings record them now: a column that held nothing
    but nulls may have got its type since some of the sources were written.
    """
    parts = [source for source in sources if isinstance(source, PartSource)]
    segments = [source for source in sources if isinstance(source, SegmentSource)]
    info = read_output_info(embeddings, files.storage)
    schema = info.schema if info is not None else pa.schema([])
    for segment in segments:
        for block in read_segment_rows(segment, files, dim):
            yield replace(block, keys=complete_columns(block.keys, schema))
    read = partial(read_part_rows, embeddings, storage=files.storage)
    waiting: list[Block] = []
    for block in read_ahead(read, parts):
        block = replace(block, keys=complete_columns(block.keys, schema))
        waiting.append(block)
        if sum(len(item.vectors) for item in waiting) >= BLOCK_ROWS:
            yield merge_blocks(waiting)
            waiting = []
    if waiting:
        yield merge_blocks(waiting)


def read_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield ``function(item)`` in order, a few items ahead, in threads that wait for storage."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * READ_THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def merge_blocks(blocks: Sequence[Block]) -> Block:
    """Put blocks one after another."""
    skipped: dict[str, int] = {}
    for block in blocks:
        for reason, number in block.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + number
    vectors = np.concatenate([block.vectors for block in blocks])
    keys = pa.concat_tables([block.keys for block in blocks])
    return Block(vectors, keys, tuple(s for block in blocks for s in block.shards), skipped)


def sum_shards(counts: Iterable[tuple[str, int, int]]) -> tuple[ShardRows, ...]:
    """Turn runs of rows by shard into ranges of row numbers, one for each run of one shard."""
    ranges: list[ShardRows] = []
    first = 0
    for shard_id, rows, skipped in counts:
        if ranges and ranges[-1].shard_id == shard_id:
            last = ranges.pop()
            ranges.append(ShardRows(shard_id, last.first, last.rows + rows, last.skipped + skipped))
        else:
            ranges.append(ShardRows(shard_id, first, rows, skipped))
        first += rows
    return tuple(item for item in ranges if item.shard_id)
