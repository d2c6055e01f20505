"""What has changed since a generation was built: by shard first, by row only where it must be.

A shard's id and content digest say whether its rows are still what was indexed, so an untouched
shard costs a comparison of two strings. Only where a shard was replaced are its rows compared, by
key and content: those that are equal stay where they are.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import CorruptionError
from pipeline.index.files import FileStore
from pipeline.index.manifest import SegmentInfo, ShardRows
from pipeline.index.rows import Flags, PartSource, list_parts, read_ahead, read_part
from pipeline.records import Commit, digest_json
from pipeline.storage import Storage, join_uri


@dataclass(frozen=True, slots=True)
class Range:
    """Consecutive rows of a segment.

    Attributes:
        segment: Id of the segment.
        first: Number of the first row.
        rows: How many.
    """

    segment: str
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Owner:
    """Shards, and where their rows lie; usually one shard and one range.

    Rows of a replaced shard that its successor still has belong to the successor, without being
    written again; so an owner may have several ranges, and of those only the live rows.

    Attributes:
        shards: Content digests by shard id.
        ranges: Where their rows lie.
        skipped: How many of their rows have no usable vector.
    """

    shards: Mapping[str, str]
    ranges: tuple[Range, ...]
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Replaced:
    """Rows to compare: what an owner had, and the commits that have its rows now.

    Attributes:
        owners: The owners concerned.
        commits: Live commits that hold what is left of their rows, and more.
    """

    owners: tuple[Owner, ...]
    commits: tuple[Commit, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """How commits differ from what a generation holds.

    Attributes:
        kept: Owners whose shards are all as they were.
        gone: Owners of whose shards nothing is left.
        replaced: Owners whose rows have to be compared.
        added: Commits that replace nothing.
    """

    kept: tuple[Owner, ...]
    gone: tuple[Owner, ...]
    replaced: tuple[Replaced, ...]
    added: tuple[Commit, ...]

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.gone or self.replaced or self.added)


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


def digest_commit(commit: Commit) -> str:
    """Return the digest of a commit's rows: the same shard embedded again may have others."""
    return digest_json([part.rows_sha256 for part in commit.parts])


def encode_owners(owners: Iterable[Owner]) -> bytes:
    """Serialise for ``generations/<generation>/owners.json``."""
    values = [
        [dict(owner.shards), [[r.segment, r.first, r.rows] for r in owner.ranges], owner.skipped]
        for owner in owners
    ]
    return json.dumps(values, separators=(",", ":")).encode()


def decode_owners(data: bytes) -> tuple[Owner, ...]:
    """Read ``encode_owners``."""
    return tuple(
        Owner(shards, tuple(Range(*item) for item in ranges), skipped)
        for shards, ranges, skipped in json.loads(data)
    )


def make_owners(
    commits: Sequence[Commit], built: Iterable[tuple[str, Sequence[ShardRows]]]
) -> list[Owner]:
    """Return one owner for each commit, given the ranges of new segments by segment id."""
    ranges: dict[str, list[Range]] = {}
    skipped: dict[str, int] = {}
    for segment, items in built:
        for item in items:
            if item.rows:
                ranges.setdefault(item.shard_id, []).append(Range(segment, item.first, item.rows))
            skipped[item.shard_id] = skipped.get(item.shard_id, 0) + item.skipped
    return [
        Owner(
            {commit.shard_id: digest_commit(commit)},
            tuple(ranges.get(commit.shard_id, ())),
            skipped.get(commit.shard_id, 0),
        )
        for commit in commits
    ]


def find_changes(owners: Sequence[Owner], commits: Sequence[Commit]) -> Changes:
    """Compare what a generation holds with the live commits. Pure: reads nothing."""
    live = {commit.shard_id: commit for commit in commits}
    by_shard = {shard: number for number, owner in enumerate(owners) for shard in owner.shards}
    changed = {
        number
        for number, owner in enumerate(owners)
        for shard, digest in owner.shards.items()
        if shard not in live or digest_commit(live[shard]) != digest
    }
    known = {shard for n, owner in enumerate(owners) if n not in changed for shard in owner.shards}
    groups = _Groups(changed)
    added: list[Commit] = []
    for commit in commits:
        if commit.shard_id in known:
            continue
        hit = [by_shard[s] for s in (commit.shard_id, *commit.supersedes) if s in by_shard]
        hit = [number for number in hit if number in changed]
        if hit:
            groups.join(hit, commit)
        else:
            added.append(commit)
    gone: list[Owner] = []
    replaced: list[Replaced] = []
    for numbers, group_commits in groups.list_groups():
        members = tuple(owners[number] for number in numbers)
        if group_commits:
            replaced.append(Replaced(members, group_commits))
        else:
            gone += members
    kept = tuple(owner for number, owner in enumerate(owners) if number not in changed)
    return Changes(kept, tuple(gone), tuple(replaced), tuple(added))


class _Groups:
    """Owners that a commit links belong together: their rows may have moved between them."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._parent = {number: number for number in numbers}
        self._commits: list[tuple[int, Commit]] = []

    def _find(self, number: int) -> int:
        while self._parent[number] != number:
            number = self._parent[number]
        return number

    def join(self, numbers: Sequence[int], commit: Commit) -> None:
        """Put owners into one group, to be compared with ``commit`` among others."""
        root = self._find(numbers[0])
        for number in numbers[1:]:
            self._parent[self._find(number)] = root
        self._commits.append((root, commit))

    def list_groups(self) -> Iterator[tuple[list[int], tuple[Commit, ...]]]:
        """Yield the owners of each group, and the commits they are to be compared with."""
        members: dict[int, list[int]] = {}
        for number in sorted(self._parent):
            members.setdefault(self._find(number), []).append(number)
        linked: dict[int, list[Commit]] = {}
        for number, commit in self._commits:
            linked.setdefault(self._find(number), []).append(commit)
        for root, numbers in members.items():
            yield numbers, tuple(linked.get(root, ()))


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
    if pa.types.is_nested(left.type):
        pairs = zip(left.to_pylist(), right.to_pylist(), strict=True)
        return np.fromiter((a == b for a, b in pairs), bool, len(left))
    equal = pc.equal(left, right.cast(left.type)).fill_null(False)
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
    return pa.concat_tables(tables), np.concatenate(owners), np.concatenate(numbers)


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
