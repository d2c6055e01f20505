"""Changes since a generation was built: by shard first, by row where a shard was replaced.

A shard's id and content digest say whether its rows are still what was indexed, so an untouched
shard costs a comparison of two strings. Only where a shard was replaced are its rows compared, by
key and content: those that are equal stay where they are.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.index.manifest import ShardRows
from pipeline.records import Commit, digest_json


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
