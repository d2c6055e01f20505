"""From a draft to a generation that may be published: deletions written, measured, gated."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import __version__
from pipeline.index.build.changes import encode_owners
from pipeline.index.build.draft import Build, Draft
from pipeline.index.build.gates import (
    Gate,
    check_files,
    check_keys,
    check_recall,
    check_row_drop,
    check_rows,
    check_self_hits,
)
from pipeline.index.build.ground_truth import read_queries
from pipeline.index.build.kinds import code_bytes
from pipeline.index.build.measure import (
    GATED_RANKS,
    Measured,
    MeasureTask,
    combine,
    measure_segment,
    read_truth,
)
from pipeline.index.build.plotting import settle_map
from pipeline.index.build.tune import Measure, Tuned, tune
from pipeline.index.faiss.package import describe_engine
from pipeline.index.manifest import (
    FileInfo,
    Manifest,
    SearchParams,
    Tombstones,
    digest_bytes,
    put_file,
)
from pipeline.index.publish import name_generation
from pipeline.index.vectors import pack_bits


@dataclass(frozen=True, slots=True)
class Finished:
    """A generation that is ready, and how it came to be.

    Attributes:
        manifest: The generation.
        gates: What was checked.
        written: Files that this run wrote.
    """

    manifest: Manifest
    gates: tuple[Gate, ...]
    written: tuple[FileInfo, ...]

    @property
    def written_bytes(self) -> int:
        """Size of the files that this run wrote."""
        return sum(file.size_bytes for file in self.written)


@dataclass(frozen=True, slots=True)
class Rest:
    """Everything that the manifest of a generation records besides its segments.

    Attributes:
        generation: Its name.
        tombstones: Deleted rows by segment id.
        owners: The file that says which shards own which rows.
        map: The map; None where there is none.
        written: The files that are new.
    """

    generation: str
    tombstones: Mapping[str, Tombstones]
    owners: FileInfo
    map: FileInfo | None
    written: tuple[FileInfo, ...]


def finish(build: Build, draft: Draft, seq: int) -> Finished:
    """Write what is left to write, measure, check the gates; publishes nothing."""
    rest = write_rest(build, draft, name_generation(seq))
    tuned = measure_draft(build, draft, rest.tombstones)
    manifest = make_manifest(build, draft, rest, tuned=tuned, seq=seq)
    new = [f for b in draft.built if not b.reused for f in b.info.files.values()]
    return Finished(
        manifest,
        tuple(list_gates(build, draft, manifest=manifest, measured=tuned.chosen)),
        (*new, *draft.written, *rest.written),
    )


def make_manifest(build: Build, draft: Draft, rest: Rest, *, tuned: Tuned, seq: int) -> Manifest:
    """Return the manifest of a generation whose files are all written."""
    parent = build.parent
    return Manifest(
        generation=rest.generation,
        seq=seq,
        parent=parent.generation if parent else None,
        created_s=time.time(),
        embeddings=build.source.describe(),
        dim=build.source.dim,
        rows=draft.rows,
        codec=draft.codec,
        segments=draft.segments,
        tombstones=rest.tombstones,
        search=tuned.chosen.params,
        reason=build.plan.reason,
        change=draft.reason,
        queries=draft.queries,
        measured=tuned.chosen.to_dict() | {"target": build.config.target_recall},
        curve=make_curve(tuned, parent),
        owners=rest.owners,
        map=rest.map,
        skipped=draft.skipped,
        faiss_version=describe_engine().version,
        version=__version__,
    )


def make_curve(tuned: Tuned, parent: Manifest | None) -> tuple[Mapping[str, Any], ...]:
    """Return what was measured now; of the parent's curve, only settings not measured again."""
    if tuned.curve or parent is None:
        return tuple(item.to_dict() for item in tuned.curve)
    again = tuned.chosen.to_dict()
    return tuple(again if p["params"] == again["params"] else p for p in parent.curve)


def write_rest(build: Build, draft: Draft, generation: str) -> Rest:
    """Write owners, the map, and the deletions that are new; take over those that are not."""
    index, storage = build.files.index, build.files.storage
    path = f"generations/{generation}/owners.json"
    owners = put_file(index, path, data=encode_owners(draft.owners), storage=storage)
    old = build.parent.tombstones if build.parent else {}
    tombstones: dict[str, Tombstones] = {}
    written = [owners]
    for segment, dead in draft.dead.items():
        bits = pack_bits(dead)
        if segment in old and old[segment].file.sha256 == digest_bytes(bits):
            tombstones[segment] = old[segment]
            continue
        path = f"tombstones/{generation}/{segment}.bits"
        stored = put_file(index, path, data=bits, storage=storage)
        tombstones[segment] = Tombstones(stored, int(dead.sum()))
        written.append(tombstones[segment].file)
    plotted = settle_map(build, draft, generation)
    if plotted is not None and plotted != draft.map:
        written.append(plotted)
    return Rest(generation, tombstones, owners, plotted, tuple(written))


def measure_draft(build: Build, draft: Draft, tombstones: Mapping[str, Tombstones]) -> Tuned:
    """Measure with the parent's parameters if they still do; tune otherwise."""
    measure = make_measure(build, draft, tombstones)
    target = build.config.target_recall
    if build.parent is not None and build.parent.codec == draft.codec:
        [again] = measure([build.parent.search], True)
        if all(again.recall[rank][0] >= target for rank in GATED_RANKS):
            return Tuned(again, ())
    return tune(
        draft.codec.kind,
        lists=draft.codec.lists,
        rows=max(segment.rows for segment in draft.segments),
        target=target,
        measure=measure,
    )


def make_measure(build: Build, draft: Draft, tombstones: Mapping[str, Tombstones]) -> Measure:
    """Return what measures settings over all segments of a draft, one task a segment."""
    files, dim = build.files, build.source.dim
    truth = read_truth(
        files,
        draft.segments,
        tombstones=tombstones,
        queries=read_queries(files, draft.queries, dim),
    )
    rows = max(segment.rows for segment in draft.segments)
    memory_bytes = rows * code_bytes(draft.codec.kind, dim) + (1 << 29)

    def measure(settings: Sequence[SearchParams], timed: bool) -> list[Measured]:
        tasks = [
            MeasureTask(
                files=files,
                dim=dim,
                codec=draft.codec,
                segment=segment,
                tombstones=tombstones.get(segment.id),
                queries=draft.queries,
                settings=tuple(settings),
                timed=timed,
            )
            for segment in draft.segments
        ]
        measures = build.workers.run(measure_segment, tasks, memory_bytes=memory_bytes)
        return combine(measures, settings, truth)

    return measure


def list_gates(build: Build, draft: Draft, *, manifest: Manifest, measured: Measured) -> list[Gate]:
    """Check all gates; digests and counts were verified when the segments were measured."""
    config = build.config
    new = {item.info.id for item in draft.built}
    kept = [segment for segment in draft.segments if segment.id not in new]
    before = build.parent.rows if build.parent else 0
    return [
        check_files(build.files, kept),
        check_rows(manifest.rows, manifest.skipped, build.source.ok_rows),
        check_row_drop(before, manifest.rows, config.max_row_drop),
        check_keys(build.files, manifest.segments, manifest.tombstones, new=new),
        check_self_hits(measured),
        check_recall(measured, config.target_recall),
    ]
