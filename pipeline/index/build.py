"""Committed embeddings become a generation: planned, built, measured, gated, published."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import IndexConfig, parse_size
from pipeline.errors import ObjectMissingError, SettingsError
from pipeline.index import engine
from pipeline.index.files import FileStore, default_cache_dir
from pipeline.index.manifest import EmbeddingsInfo, Manifest, read_manifest, read_pointer
from pipeline.index.publish import Version, name_generation, publish
from pipeline.index.rows import PartSource
from pipeline.index.segments import SegmentTask, build_segment
from pipeline.index.selection import Plan, make_plan
from pipeline.index.tasks import Workers, open_workers
from pipeline.index.training import Draw, train
from pipeline.parts import OutputInfo, list_commits, read_output_info
from pipeline.records import Commit, count_statuses
from pipeline.storage import Storage, join_uri, normalise_uri

LOG = logging.getLogger("pipeline.index")


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What an index job did.

    Attributes:
        action: ``"built"``, ``"added"``, ``"unchanged"``, ``"planned"``, ``"rolled back"``,
            ``"collected"``.
        index: URI of the index.
        generation: The generation that serves now.
        rows: Its live rows.
        kind: Its kind.
        reason: Why that kind, in one line.
        details: What else there is to know; by action.
    """

    action: str
    index: str
    generation: str | None
    rows: int
    kind: str | None
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        values = {"job": "index"} | asdict(self)
        return values | dict(values.pop("details"))


@dataclass(frozen=True, slots=True)
class Source:
    """The embeddings, as they are when a build begins.

    Attributes:
        uri: The embeddings output.
        info: Its space and layout.
        commits: Its live commits, by the names of their shards.
    """

    uri: str
    info: OutputInfo
    commits: tuple[Commit, ...]

    @property
    def ok_rows(self) -> int:
        """Rows with a vector."""
        return sum(commit.statuses.get("ok", 0) for commit in self.commits)

    def describe(self) -> EmbeddingsInfo:
        """Return what the manifest records."""
        times = [c.modified_s for c in self.commits if c.modified_s is not None]
        return EmbeddingsInfo(
            uri=self.uri,
            space=self.info.space,
            weights=join_uri(self.uri, self.info.weights),
            statuses=count_statuses(commit.statuses for commit in self.commits),
            newest_image_s=max(times, default=None),
        )


def build_index(config: IndexConfig) -> IndexReport:
    """Bring an index up to date with its embeddings; what ``jobs/index.py`` calls.

    Raises:
        SettingsError: A setting is missing or does not fit.
        SpaceMismatchError: The index holds vectors of another space.
        CorruptionError: The embeddings or the index are damaged.
        PublishError: A gate refused, or another publisher was first.
    """
    started = time.monotonic()
    storage = Storage(config.storage)
    index = normalise_uri(config.index)
    cache = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
    files = FileStore(index, storage, cache)
    before = read_pointer(index, storage)
    source = read_source(config, storage)
    plan = make_plan(
        source.ok_rows,
        source.info.space.dim,
        kind=config.kind,
        memory_bytes=parse_size(config.memory_budget, setting="memory_budget"),
        target_recall=config.target_recall,
    )
    with open_workers(use_ray=False, address=config.ray_address, tasks=plan.segments) as workers:
        manifest = build_full(config, source, plan, files=files, workers=workers, before=before)
    publish(index, manifest, before, storage)
    return IndexReport(
        "built",
        index,
        manifest.generation,
        manifest.rows,
        plan.kind,
        plan.reason,
        {"seconds": round(time.monotonic() - started, 3), "skipped": dict(manifest.skipped)},
    )


def read_source(config: IndexConfig, storage: Storage) -> Source:
    """Read what is committed.

    Raises:
        SettingsError: No embeddings were given, or they hold no vector.
        ObjectMissingError: There are no embeddings at that URI.
    """
    if config.embeddings is None:
        raise SettingsError("no embeddings given; pass --embeddings with the embed job's output")
    uri = normalise_uri(config.embeddings)
    info = read_output_info(uri, storage)
    if info is None:
        raise ObjectMissingError(
            f"no embeddings at {uri!r}: space.json is missing; check the URI, or run embed first"
        )
    commits = list_commits(uri, storage).values()
    source = Source(uri, info, tuple(sorted(commits, key=lambda c: (c.root, c.name, c.shard_id))))
    if not source.ok_rows:
        raise SettingsError(f"the embeddings at {uri!r} hold no committed vector; run embed first")
    return source


def list_parts(commits: Sequence[Commit]) -> list[PartSource]:
    """Return the parts of commits that hold a vector, in order."""
    return [
        PartSource(commit.shard_id, part.path, part.rows, part.rows_sha256, part.size_bytes)
        for commit in commits
        for part in commit.parts
        if part.statuses.get("ok")
    ]


def build_full(
    config: IndexConfig,
    source: Source,
    plan: Plan,
    *,
    files: FileStore,
    workers: Workers,
    before: Version,
) -> Manifest:
    """Build all segments anew and return the generation, not yet published."""
    parts = list_parts(source.commits)
    draw = Draw(config.queries, config.seed)
    training = train(plan, parts, embeddings=source.uri, files=files, workers=workers, draw=draw)
    task = SegmentTask(
        index=files.index,
        embeddings=source.uri,
        dim=source.info.space.dim,
        codec=training.codec,
        sources=tuple(parts),
        delta=False,
        packed=plan.packed,
        queries=training.queries,
        storage=files.storage,
        cache_dir=files.cache_dir,
        threads=workers.threads,
    )
    built = workers.run(build_segment, [task])
    parent = read_manifest(files.index, before[0], files.storage) if before else None
    seq = before[0].seq + 1 if before else 1
    return Manifest(
        generation=name_generation(seq),
        seq=seq,
        parent=parent.generation if parent else None,
        created_s=time.time(),
        embeddings=source.describe(),
        dim=source.info.space.dim,
        rows=sum(item.info.rows for item in built),
        codec=training.codec,
        segments=tuple(item.info for item in built),
        reason=plan.reason,
        queries=training.queries,
        skipped=dict(built[0].info.skipped),
        faiss_version=engine.describe_engine().version,
    )
