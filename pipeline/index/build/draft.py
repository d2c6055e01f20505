"""Drafts: the segments, deletions and owners of a generation that is not measured yet."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.config import IndexConfig
from pipeline.errors import SettingsError
from pipeline.index.build.changes import Owner, make_owners
from pipeline.index.build.ground_truth import DEPTH, Truth, find_floors, merge_truths, read_queries
from pipeline.index.build.kinds import Plan, code_bytes
from pipeline.index.build.merge_policy import compute_imbalance
from pipeline.index.build.rows import PartSource, SegmentSource, list_parts
from pipeline.index.build.segment_writer import BuiltSegment, SegmentTask, build_segment
from pipeline.index.build.source import Source
from pipeline.index.build.training import Draw, train
from pipeline.index.files import FileStore
from pipeline.index.manifest import CodecInfo, FileInfo, Manifest, SegmentInfo, put_file
from pipeline.index.map import MapPoints
from pipeline.index.vectors import Flags
from pipeline.index.workers import Workers

Sources = Sequence[PartSource | SegmentSource]


@dataclass(frozen=True, slots=True)
class Build:
    """The inputs of a build: configuration, files, source, workers.

    Attributes:
        config: The settings.
        source: The embeddings.
        plan: How so many rows are to be indexed.
        files: The index.
        workers: Who does the work.
        parent: The generation that serves, or None.
    """

    config: IndexConfig
    source: Source
    plan: Plan
    files: FileStore
    workers: Workers
    parent: Manifest | None


@dataclass(frozen=True, slots=True)
class Draft:
    """A generation before it is measured.

    Attributes:
        codec: What its segments share.
        segments: Its segments.
        dead: Deleted rows, for segments that have any.
        owners: Which shards own which rows.
        queries: Held-out queries and floors.
        map: The map of the collection, stored or still to be written; None to draw one.
        built: Segments that this run built or found built.
        written: Other files that this run wrote.
        added: Rows that were added.
        removed: Rows that were deleted.
        reason: Why it was built like this, in one line.
    """

    codec: CodecInfo
    segments: tuple[SegmentInfo, ...]
    dead: Mapping[str, Flags]
    owners: tuple[Owner, ...]
    queries: Mapping[str, FileInfo]
    map: FileInfo | MapPoints | None
    built: tuple[BuiltSegment, ...]
    written: tuple[FileInfo, ...]
    added: int
    removed: int
    reason: str

    @property
    def rows(self) -> int:
        """Live rows."""
        return sum(s.rows for s in self.segments) - sum(int(d.sum()) for d in self.dead.values())

    @property
    def skipped(self) -> int:
        """Committed vectors that are not usable."""
        return sum(owner.skipped for owner in self.owners)


def draft_full(build: Build, reason: str) -> Draft:
    """Train, and build all segments from committed parts."""
    source, plan = build.source, build.plan
    parts = list_parts(source.commits)
    draw = Draw(build.config.queries, build.config.seed)
    training = train(
        plan, parts, embeddings=source.uri, files=build.files, workers=build.workers, draw=draw
    )
    tasks = [
        make_task(
            build, training.codec, queries=training.queries, sources=sources, packed=plan.packed
        )
        for sources in cut_sources(parts, plan.segments)
    ]
    built = tuple(run_tasks(build, tasks))
    segments = tuple(item.info for item in built if item.info.rows)
    if not segments:
        raise SettingsError(f"{source.uri!r} holds no usable vector; look at its rows' status")
    queries, floors = add_floors(build.files, training.queries, segments=segments, dim=source.dim)
    return Draft(
        codec=describe_codec(build.files, training.codec, segments),
        segments=segments,
        dead={},
        owners=tuple(make_owners(source.commits, ((b.info.id, b.shards) for b in built))),
        queries=queries,
        map=training.map,
        built=built,
        written=(*training.list_written(), floors),
        added=sum(segment.rows for segment in segments),
        removed=build.parent.rows if build.parent else 0,
        reason=reason,
    )


def make_task(
    build: Build,
    codec: CodecInfo,
    *,
    queries: Mapping[str, FileInfo],
    sources: Sources,
    packed: bool,
    delta: bool = False,
) -> SegmentTask:
    """Return the task of building one segment from ``sources``."""
    return SegmentTask(
        files=build.files,
        embeddings=build.source.uri,
        dim=build.source.dim,
        codec=codec,
        sources=tuple(sources),
        delta=delta,
        packed=packed,
        queries=queries,
        threads=build.workers.threads,
    )


def run_tasks(build: Build, tasks: Sequence[SegmentTask]) -> list[BuiltSegment]:
    """Build segments, on as many workers as there are."""
    rows = max((sum(map(count_rows, task.sources)) for task in tasks), default=0)
    memory_bytes = 2 * rows * code_bytes(build.plan.kind, build.source.dim) + (1 << 29)
    return build.workers.run(build_segment, tasks, memory_bytes=memory_bytes)


def count_rows(source: PartSource | SegmentSource) -> int:
    """Return how many rows a source has at most."""
    if isinstance(source, SegmentSource):
        return source.segment.rows
    return source.rows if source.take is None else len(source.take)


def cut_sources(sources: Sources, number: int) -> list[Sources]:
    """Cut sources into ``number`` runs of about equal rows, none empty."""
    sizes = np.cumsum([count_rows(source) for source in sources])
    if not len(sizes):
        return []
    owner = np.minimum((sizes - 1) * number // sizes[-1], number - 1)
    runs = [[s for s, o in zip(sources, owner, strict=True) if o == n] for n in range(number)]
    return [run for run in runs if run]


def add_floors(
    files: FileStore, queries: Mapping[str, FileInfo], *, segments: Sequence[SegmentInfo], dim: int
) -> tuple[dict[str, FileInfo], FileInfo]:
    """Note below which scores later segments need not look for the queries' neighbours."""
    truths = [Truth.from_bytes(files.fetch(s.files["truth"]).read_bytes()) for s in segments]
    count = len(read_queries(files, queries, dim).keys)
    floors = find_floors(merge_truths(truths, count, DEPTH)).tobytes()
    folder = queries["queries"].path.rsplit("/", 1)[0]
    path = f"{folder}/floors-{uuid.uuid4().hex[:8]}.f32"
    stored = put_file(files.index, path, data=floors, storage=files.storage)
    return dict(queries) | {"floors": stored}, stored


def describe_codec(
    files: FileStore, codec: CodecInfo, segments: Sequence[SegmentInfo]
) -> CodecInfo:
    """Return a codec with how its rows lie right after training, to measure drift against."""
    weighted = [(s.mean_cosine, s.rows) for s in segments if s.mean_cosine is not None]
    rows = sum(segment.rows for segment in segments)
    cosine = sum(c * n for c, n in weighted) / sum(n for _, n in weighted) if weighted else None
    imbalance = compute_imbalance(read_list_sizes(files, segments))
    return replace(codec, trained_rows=rows, imbalance=imbalance, mean_cosine=cosine)


def read_list_sizes(files: FileStore, segments: Iterable[SegmentInfo]) -> list[np.ndarray]:
    """Return the rows in each inverted list, by segment; nothing for kinds without lists."""
    return [
        np.fromfile(files.fetch(segment.files["lists"]), np.uint32)
        for segment in segments
        if "lists" in segment.files
    ]
