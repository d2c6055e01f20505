"""Bringing an index up to date: what to do, and why, in one line."""

import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import IndexConfig, parse_size
from pipeline.errors import SpaceMismatchError
from pipeline.index.build.changes import Changes, decode_owners, find_changes
from pipeline.index.build.merge_policy import MAX_REPLACED_SHARE, compute_imbalance, explain_drift
from pipeline.index.pointer import read_manifest, read_pointer
from pipeline.index.build.draft import Build, draft_full, read_list_sizes
from pipeline.index.files import FileStore
from pipeline.index.build.seal import Finished, finish
from pipeline.index.build.gates import check_gates
from pipeline.index.export.neighbours import TASK_ROWS, write_neighbours
from pipeline.index.build.increment import draft_increment
from pipeline.index.faiss.package import describe_engine
from pipeline.index.manifest import Manifest
from pipeline.index.publish import Version, publish
from pipeline.index.report import IndexReport, make_report
from pipeline.index.build.kinds import Plan, make_plan, outgrew, show_bytes
from pipeline.index.build.source import Source, read_source
from pipeline.index.workers import is_on_cluster, open_workers
from pipeline.index.export.export import export
from pipeline.index.workers import wants_ray


LOG = logging.getLogger("pipeline.index")


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done.

    Attributes:
        full: Build everything anew.
        changes: What is new and what is gone; None where everything is built anew anyway.
        reason: Why, in one line.
    """

    full: bool
    changes: Changes | None
    reason: str

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.full and self.changes is not None and not self.changes.any


def update_index(config: IndexConfig, files: FileStore) -> IndexReport:
    """Build what has changed, or everything, and publish it."""
    started = time.monotonic()
    before = read_pointer(files.index, files.storage)
    parent = read_manifest(files.index, before[0], files.storage) if before else None
    source = read_source(config.embeddings, files.storage)
    plan = make_plan(
        source.ok_rows,
        source.dim,
        kind=config.kind,
        memory_bytes=parse_size(config.memory_budget, setting="memory_budget"),
        target_recall=config.target_recall,
    )
    decision = decide(config, source, plan, parent=parent, files=files)
    LOG.info("plan rows=%d kind=%s why=%r", plan.rows, plan.kind, decision.reason)
    if config.dry_run or (decision.idle and parent is not None):
        action = "planned" if config.dry_run else "unchanged"
        exported = {} if config.dry_run or parent is None else export(config, files, parent)
        details = _describe_plan(plan, decision) | exported
        return make_report(action, files.index, manifest=parent, details=details)
    use_ray = wants_ray(config, plan.rows)
    with open_workers(use_ray=use_ray, address=config.ray_address, tasks=plan.segments) as workers:
        build = Build(config, source, plan, files, workers, parent)
        finished = make_generation(build, decision, before)
    check_gates(finished.gates, force=config.force)
    publish(files.index, finished.manifest, before=before, storage=files.storage)
    action = "built" if finished.manifest.codec != (parent and parent.codec) else "added"
    details = describe_outcome(finished, time.monotonic() - started)
    details |= export(config, files, finished.manifest)
    return make_report(action, files.index, manifest=finished.manifest, details=details)


def decide(
    config: IndexConfig, source: Source, plan: Plan, *, parent: Manifest | None, files: FileStore
) -> Decision:
    """Decide between building everything anew, adding what has changed, and doing nothing.

    Raises:
        SpaceMismatchError: The index holds vectors of another space.
    """
    if parent is None:
        return Decision(True, None, "first generation")
    check_space(parent, source)
    if config.full:
        return Decision(True, None, "asked for with --full")
    kind = parent.codec.kind
    if config.kind not in ("auto", kind):
        return Decision(True, None, f"asked for {config.kind} instead of {kind}")
    if config.kind == "auto" and outgrew(kind, plan.rows, source.dim, planned_kind=plan.kind):
        return Decision(True, None, f"{plan.rows:,} rows are too many for {kind}")
    assert parent.owners is not None
    owners = decode_owners(files.fetch(parent.owners).read_bytes())
    changes = find_changes(owners, source.commits)
    touched = [*changes.gone, *(owner for item in changes.replaced for owner in item.owners)]
    share = sum(r.rows for owner in touched for r in owner.ranges) / max(1, parent.rows)
    if share > MAX_REPLACED_SHARE:
        return Decision(True, None, f"{share:.0%} of the rows are in shards that were replaced")
    if not changes.any:
        return Decision(False, changes, "nothing has changed")
    return Decision(
        False,
        changes,
        f"{len(changes.added)} shards are new, {len(changes.replaced)} replaced, "
        f"{len(changes.gone)} gone",
    )


def check_space(parent: Manifest, source: Source) -> None:
    """Refuse embeddings of another space.

    Raises:
        SpaceMismatchError: The spaces differ; names the fields.
    """
    there, here = parent.embeddings.space.to_dict(), source.info.space.to_dict()
    differing = [name for name in there if there[name] != here[name]]
    if differing:
        details = "; ".join(f"{n} is {there[n]!r} there and {here[n]!r} here" for n in differing)
        raise SpaceMismatchError(
            f"the index holds vectors of another space: {details}; use another --index"
        )


def make_generation(build: Build, decision: Decision, before: Version) -> Finished:
    """Return the new generation; an increment that drifted too far is given up for a full build."""
    seq = before[0].seq + 1 if before else 1
    if decision.full or build.parent is None or decision.changes is None:
        return finish(build, draft_full(build, decision.reason), seq)
    draft = draft_increment(build, build.parent, decision.changes)
    imbalance = compute_imbalance(read_list_sizes(build.files, draft.segments))
    new = [item.info for item in draft.built]
    drift = explain_drift(draft.codec, rows=draft.rows, imbalance=imbalance, new=new)
    if drift is None:
        finished = finish(build, draft, seq)
        failed = [gate for gate in finished.gates if not gate.passed]
        if [gate.name for gate in failed] != ["recall"]:
            return finished
        drift = failed[0].detail
    LOG.info("training anew: %s", drift)
    return finish(build, draft_full(build, f"trained anew: {drift}"), seq)


def _describe_plan(plan: Plan, decision: Decision) -> dict[str, Any]:
    return {"why": decision.reason, "plan": asdict(plan)}


def describe_outcome(finished: Finished, seconds: float) -> dict[str, Any]:
    """Return what a report says about a generation that was built."""
    manifest = finished.manifest
    return {
        "why": manifest.change,
        "dim": manifest.dim,
        "segments": len(manifest.segments),
        "deltas": sum(segment.delta for segment in manifest.segments),
        "deleted": sum(item.rows for item in manifest.tombstones.values()),
        "skipped": manifest.skipped,
        "search": asdict(manifest.search),
        "measured": dict(manifest.measured),
        "curve": list(manifest.curve),
        "gates": [asdict(gate) for gate in finished.gates],
        "written_bytes": finished.written_bytes,
        "written": show_bytes(finished.written_bytes),
        "size_bytes": sum(file.size_bytes for file in manifest.list_files()),
        "newest_image_s": manifest.embeddings.newest_image_s,
        "statuses": dict(manifest.embeddings.statuses),
        "engine": asdict(describe_engine()),
        "seconds": round(seconds, 3),
    }
