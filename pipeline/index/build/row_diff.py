"""Replaced shards, row by row: what stays where it is, what is new, what is gone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import CorruptionError
from pipeline.index.build.changes import Range, Replaced, digest_commit
from pipeline.index.build.rows import PartSource, list_parts, read_ahead, read_part
from pipeline.index.files import FileStore
from pipeline.index.manifest import SegmentInfo
from pipeline.index.vectors import Flags
from pipeline.storage import Storage, join_uri


@dataclass(frozen=True, slots=True)
class Comparison:
    """Outcome of comparing rows.

    Attributes:
        shards: Content digests of the shards that own the rows now.
        ranges: Where the rows that stay lie.
        dead: Rows that are no longer there, by segment, (n,) each.
        sources: The rows to add.
    """

    shards: Mapping[str, str]
    ranges: tuple[Range, ...]
    dead: Mapping[str, np.ndarray]
    sources: tuple[PartSource, ...]


def compare_rows(
    replaced: Replaced,
    *,
    embeddings: str,
    segments: Mapping[str, SegmentInfo],
    dead: Mapping[str, Flags],
    files: FileStore,
) -> Comparison:
    """Tell which rows stay, which are to be added and which are gone.

    A row stays if all that is stored of it, its place in the source included, is as it was.

    Args:
        replaced: What to compare.
        embeddings: URI of the embeddings.
        segments: The generation's segments by id.
        dead: Rows that are deleted already, by segment id.
        files: How to reach the index.
    """
    ranges = tuple(r for owner in replaced.owners for r in owner.ranges)
    old, segment_of, row_of = read_ranges(ranges, segments=segments, dead=dead, files=files)
    stays = np.zeros(len(old), bool)
    sources: list[PartSource] = []
    parts = list_parts(replaced.commits)
    for source, table in zip(parts, _read_parts(embeddings, parts, files.storage), strict=True):
        same, positions = match_rows(table, old)
        stays[positions[same]] = True
        usable = pc.is_valid(table.column("embedding")).to_numpy()
        take = np.flatnonzero(usable & ~same)
        if len(take):
            sources.append(source.choose(take))
    gone = {
        segment: row_of[~stays & (segment_of == segment)] for segment in {r.segment for r in ranges}
    }
    shards = {commit.shard_id: digest_commit(commit) for commit in replaced.commits}
    return Comparison(shards, ranges, {s: r for s, r in gone.items() if len(r)}, tuple(sources))


def _read_parts(
    embeddings: str, parts: Sequence[PartSource], storage: Storage
) -> Iterator[pa.Table]:
    return read_ahead(lambda part: read_part(embeddings, part, storage), parts)


def match_rows(new: pa.Table, old: pa.Table) -> tuple[Flags, np.ndarray]:
    """Look for each new row among the old ones.

    Returns:
        Whether it is there unchanged, and where the old row of its key is (-1 if nowhere).
    """
    found = pc.index_in(new.column("key").cast(pa.large_string()), value_set=old.column("key"))
    positions = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    same = positions >= 0
    if not same.any():
        return same, positions
    candidates = old.take(pa.array(np.maximum(positions, 0)))
    for name in old.column_names:
        if name in ("key", "norm"):
            continue
        same &= _equal_values(new.column(name), candidates.column(name))
    for name in ("embedding", "sha256"):
        same &= pc.is_valid(new.column(name)).to_numpy()
    return same, positions


def _equal_values(left: pa.ChunkedArray, right: pa.ChunkedArray) -> Flags:
    """Tell which rows hold the same value: the same bits, so NaN is NaN, and -0.0 is not 0.0."""
    kind = right.type if pa.types.is_null(left.type) else left.type
    left, right = (side.cast(kind).combine_chunks() for side in (left, right))
    if pa.types.is_floating(kind):
        bits = {16: pa.uint16(), 32: pa.uint32(), 64: pa.uint64()}[kind.bit_width]
        left, right = left.view(bits), right.view(bits)
    if pa.types.is_nested(kind) or pa.types.is_null(kind):
        pairs = zip(left.to_pylist(), right.to_pylist(), strict=True)
        return np.fromiter((a == b for a, b in pairs), bool, len(left))
    equal = pc.equal(left, right).fill_null(False)
    both_null = pc.and_(pc.is_null(left), pc.is_null(right))
    return np.asarray(pc.or_(equal, both_null).to_numpy(zero_copy_only=False), bool)


def read_ranges(
    ranges: Sequence[Range],
    *,
    segments: Mapping[str, SegmentInfo],
    dead: Mapping[str, Flags],
    files: FileStore,
) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Return the stored keys of the live rows of some ranges, reading no more than their groups.

    Returns:
        The rows, the id of each one's segment, and its number there.
    """
    tables, owners, numbers = [], [], []
    for item in ranges:
        segment = segments[item.segment]
        table = read_key_rows(segment, item.first, item.rows, files=files)
        rows = np.arange(item.first, item.first + item.rows)
        live = np.ones(len(rows), bool)
        if item.segment in dead:
            live = ~dead[item.segment][rows]
        tables.append(table.filter(pa.array(live)))
        owners.append(np.full(int(live.sum()), item.segment))
        numbers.append(rows[live])
    if not tables:
        return (
            pa.table({"key": pa.array([], pa.large_string())}),
            np.zeros(0, "U1"),
            np.zeros(0, int),
        )
    joined = pa.concat_tables(tables, promote_options="default")  # nulls only take any type
    return joined, np.concatenate(owners), np.concatenate(numbers)


def read_key_rows(segment: SegmentInfo, first: int, rows: int, *, files: FileStore) -> pa.Table:
    """Return the stored keys of consecutive rows of a segment.

    Raises:
        CorruptionError: The file is damaged.
    """
    uri = join_uri(files.index, segment.files["keys"].path)
    try:
        with files.storage.open_random(uri) as stream:
            reader = pq.ParquetFile(stream, page_checksum_verification=True)
            groups, start = _find_groups(reader.metadata, first, rows)
            table = reader.read_row_groups(groups).slice(first - start, rows)
    except (pa.ArrowException, OSError) as error:
        raise CorruptionError(f"{uri} cannot be read: {error}; build again with --full") from error
    keys = table.column("key").cast(pa.large_string())
    return table.set_column(0, "key", keys).replace_schema_metadata(None)


def _find_groups(metadata: pq.FileMetaData, first: int, rows: int) -> tuple[list[int], int]:
    groups: list[int] = []
    start = position = 0
    for number in range(metadata.num_row_groups):
        following = position + metadata.row_group(number).num_rows
        if position < first + rows and following > first:
            if not groups:
                start = position
            groups.append(number)
        position = following
    return groups, start
