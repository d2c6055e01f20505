"""A night's draft: a delta of what is new, deletions, and everything else by reference."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from pipeline.index.build.changes import Changes, Owner, Range, make_owners
from pipeline.index.build.draft import Build, Draft, count_rows, cut_sources, make_task, run_tasks
from pipeline.index.build.kinds import LONG_LIST_ROWS
from pipeline.index.build.merge_policy import Relocation, choose_merges
from pipeline.index.build.plotting import take_over_map
from pipeline.index.build.row_diff import Comparison, compare_rows
from pipeline.index.build.rows import PartSource, SegmentSource, list_parts
from pipeline.index.build.segment_writer import BuiltSegment
from pipeline.index.files import FileStore
from pipeline.index.manifest import Manifest, SegmentInfo, ShardRows
from pipeline.index.vectors import Flags, pack_bits, read_bits

_NONE = np.zeros(0, bool)


def draft_increment(build: Build, parent: Manifest, changes: Changes) -> Draft:
    """Build one segment of what is new, mark what is gone, and take over everything else."""
    segments = {segment.id: segment for segment in parent.segments}
    dead = read_tombstones(build.files, parent)
    before = count_dead(dead)
    compared = mark_dead(build, changes, segments=segments, dead=dead)
    points = take_over_map(build.files, parent, dead)
    parts = [part for item in compared for part in item.sources] + list_parts(changes.added)
    live = {s.id: s.rows - int(dead.get(s.id, _NONE).sum()) for s in parent.segments}
    new_rows = sum(map(count_rows, parts))
    merged = choose_merges(parent.segments, live, new_rows)
    built, relocation = build_new(build, parent, parts, merged=merged, dead=dead)
    left = [s for s in parent.segments if live[s.id] and s not in merged]
    return Draft(
        codec=parent.codec,
        segments=(*left, *(item.info for item in built if item.info.rows)),
        dead={s.id: dead[s.id] for s in left if s.id in dead and dead[s.id].any()},
        owners=tuple(make_new_owners(changes, compared, built=built, relocation=relocation)),
        queries=parent.queries,
        map=points,
        built=tuple(built),
        written=(),
        added=sum(item.info.rows for item in built) - sum(live[s.id] for s in merged),
        removed=count_dead(dead) - before,
        reason=_explain_increment(merged, new_rows),
    )


def read_tombstones(files: FileStore, parent: Manifest) -> dict[str, Flags]:
    """Return the deleted rows of a generation by segment id."""
    rows = {segment.id: segment.rows for segment in parent.segments}
    return {
        name: read_bits(files, item.file, rows[name]) for name, item in parent.tombstones.items()
    }


def count_dead(dead: Mapping[str, Flags]) -> int:
    """Return the number of deleted rows."""
    return sum(int(bits.sum()) for bits in dead.values())


def mark_dead(
    build: Build,
    changes: Changes,
    *,
    segments: Mapping[str, SegmentInfo],
    dead: dict[str, Flags],
) -> list[Comparison]:
    """Mark what is gone in ``dead``; return how replaced shards compare."""
    kill_owners(changes.gone, segments, dead)
    compared = [
        compare_rows(
            item, embeddings=build.source.uri, segments=segments, dead=dead, files=build.files
        )
        for item in changes.replaced
    ]
    kill_rows(compared, segments, dead)
    return compared


def make_new_owners(
    changes: Changes,
    compared: Sequence[Comparison],
    *,
    built: Sequence[BuiltSegment],
    relocation: Relocation,
) -> Iterator[Owner]:
    """Yield who owns which rows now."""
    ranges = [(item.info.id, item.shards) for item in built]
    yield from map(relocation.apply, changes.kept)
    yield from (relocation.apply(_own(item, ranges)) for item in compared)
    yield from make_owners(changes.added, ranges)


def _explain_increment(merged: Sequence[SegmentInfo], new_rows: int) -> str:
    if merged:
        return f"{len(merged)} segments merged with {new_rows:,} new rows"
    return f"{new_rows:,} new rows as a delta" if new_rows else "nothing new; deletions only"


def kill_owners(
    owners: Iterable[Owner], segments: Mapping[str, SegmentInfo], dead: dict[str, Flags]
) -> None:
    """Mark all rows of owners as deleted."""
    for owner in owners:
        for item in owner.ranges:
            bits = dead.setdefault(item.segment, np.zeros(segments[item.segment].rows, bool))
            bits[item.first : item.first + item.rows] = True


def kill_rows(
    compared: Iterable[Comparison], segments: Mapping[str, SegmentInfo], dead: dict[str, Flags]
) -> None:
    """Mark the rows that are no longer there as deleted."""
    for item in compared:
        for segment, rows in item.dead.items():
            dead.setdefault(segment, np.zeros(segments[segment].rows, bool))[rows] = True


def _own(item: Comparison, built: Iterable[tuple[str, Sequence[ShardRows]]]) -> Owner:
    ranges, skipped = list(item.ranges), 0
    for segment, shards in built:
        for rows in shards:
            if rows.shard_id in item.shards:
                ranges.append(Range(segment, rows.first, rows.rows))
                skipped += rows.skipped
    return Owner(item.shards, tuple(r for r in ranges if r.rows), skipped)


def build_new(
    build: Build,
    parent: Manifest,
    parts: Sequence[PartSource],
    *,
    merged: Sequence[SegmentInfo],
    dead: Mapping[str, Flags],
) -> tuple[list[BuiltSegment], Relocation]:
    """Build the new rows, and the merged segments with them; note where the latter's have gone."""
    bits = {s.id: dead.get(s.id, np.zeros(s.rows, bool)) for s in merged}
    sources: list[PartSource | SegmentSource] = [
        SegmentSource(s, pack_bits(bits[s.id]) if bits[s.id].any() else b"") for s in merged
    ]
    sources += parts
    rows = sum(map(count_rows, sources))
    limit = max(1, -(-build.plan.rows // build.plan.segments))
    packed = bool(merged) and rows >= LONG_LIST_ROWS * parent.codec.lists
    tasks = [
        make_task(
            build,
            parent.codec,
            queries=parent.queries,
            sources=run,
            packed=packed,
            delta=not merged,
        )
        for run in cut_sources(sources, -(-rows // limit))
    ]
    built = run_tasks(build, tasks)
    relocation = Relocation()
    for task, item in zip(tasks, built, strict=True):
        base = 0
        for source in task.sources:
            if isinstance(source, SegmentSource):
                segment = source.segment.id
                base = relocation.move(segment, item.info.id, base=base, dead=bits[segment])
    return built, relocation
