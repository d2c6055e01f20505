"""Bringing an index up to date: what to do, and why, in one line."""

import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.config import IndexConfig
from pipeline.errors import CorruptionError, SpaceMismatchError
from pipeline.index.build.changes import Changes, decode_owners, find_changes
from pipeline.index.build.draft import Build, draft_full, read_list_sizes
from pipeline.index.build.gates import check_gates
from pipeline.index.build.increment import draft_increment
from pipeline.index.build.kinds import Plan, make_plan, outgrew, show_bytes
from pipeline.index.build.merge_policy import MAX_REPLACED_SHARE, compute_imbalance, explain_drift
from pipeline.index.build.seal import Finished, finish
from pipeline.index.build.source import Source, read_source
from pipeline.index.export.export import export
from pipeline.index.faiss.package import describe_engine
from pipeline.index.files import FileStore
from pipeline.index.health import Base, find_base
from pipeline.index.manifest import Manifest
from pipeline.index.publish import publish, serve_again
from pipeline.index.report import IndexReport, make_report
from pipeline.index.workers import open_workers, wants_ray

LOG = logging.getLogger("pipeline.index")


@dataclass(frozen=True, slots=True)
class Decision:
    """The planned action of an index job, and the reason for it.

    Attributes:
        full: Build everything anew.
        changes: What is new and what is gone; None where everything is built anew anyway.
        reason: Why, in one line.
        redraw: Draw the map of the collection again, whatever else there is to do.
    """

    full: bool
    changes: Changes | None
    reason: str
    redraw: bool = False

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        unchanged = self.changes is not None and not self.changes.any
        return unchanged and not self.full and not self.redraw


def update_index(config: IndexConfig, files: FileStore) -> IndexReport:
    """Build what has changed, or everything, and publish it.

    What is damaged is not built on: the newest whole generation is, or everything is built anew.

    Raises:
        CorruptionError: The embeddings are damaged; or the index is, and is pinned.
    """
    started = time.monotonic()
    base = find_base(files, digests=config.verify)
    if base.damage is not None:
        LOG.warning("the index is damaged: %s", base.damage)
    if is_pinned(config, base):
        return leave_pinned(config, files, base)
    files = replace(files, doomed=base.stock.doomed)
    source = read_source(config.embeddings, files.storage)
    plan = make_plan(
        source.ok_rows,
        source.dim,
        kind=config.kind,
        memory_bytes=config.memory_budget.nbytes,
        target_recall=config.target_recall,
    )
    decision = decide(config, source, plan, base=base, files=files)
    LOG.info("plan rows=%d kind=%s why=%r", plan.rows, plan.kind, decision.reason)
    if config.dry_run or (decision.idle and base.manifest is not None):
        return _report_idle(config, files, base, _describe_plan(plan, decision))
    parent = base.known if decision.full else base.manifest
    use_ray = wants_ray(config, plan.rows)
    with open_workers(use_ray=use_ray, address=config.ray_address, tasks=plan.segments) as workers:
        build = Build(config, source, plan, files, workers, parent)
        finished = make_generation(build, decision, base.stock.next_seq)
    return _publish(build, finished, base=base, started=started)


def _publish(build: Build, finished: Finished, *, base: Base, started: float) -> IndexReport:
    """Publish a generation that passes the gates, export what is asked for, and report."""
    config, files, manifest = build.config, build.files, finished.manifest
    check_gates(finished.gates, force=config.force)
    publish(files, manifest, before=base.stock.current)
    new_codec = build.parent is None or manifest.codec != build.parent.codec
    details = describe_outcome(finished, time.monotonic() - started) | describe_damage(base)
    details |= export(config, files, manifest)
    action = "built" if new_codec else "added"
    return make_report(action, files.index, manifest=manifest, details=details)


def is_pinned(config: IndexConfig, base: Base) -> bool:
    """Tell whether a roll-back keeps this run from publishing."""
    pointer = base.stock.current.pointer
    asked = config.full or config.force or config.unpin
    return pointer is not None and pointer.pinned and not asked


def leave_pinned(config: IndexConfig, files: FileStore, base: Base) -> IndexReport:
    """Say that a generation is pinned, and change nothing.

    Raises:
        CorruptionError: It is damaged.
    """
    pointer = base.stock.current.pointer
    name = pointer.generation if pointer else ""
    if base.damage is not None or base.manifest is None:
        raise CorruptionError(
            f"generation {name} is pinned by a roll-back, and damaged: {base.damage}; roll back to "
            "another with --roll-back, or build again with --full"
        )
    why = (
        f"generation {name} is pinned by a roll-back; pass --unpin once to go on from it, or "
        "--full to build everything anew"
    )
    LOG.warning(why)
    details = {"why": why, "newest_image_s": base.manifest.embeddings.newest_image_s}
    details |= export(config, files, base.manifest)
    return make_report("pinned", files.index, manifest=base.manifest, details=details)


def _report_idle(
    config: IndexConfig, files: FileStore, base: Base, details: dict[str, Any]
) -> IndexReport:
    """Report a run with nothing to build; make the whole generation serve if it does not."""
    if config.dry_run or base.manifest is None:
        return make_report("planned", files.index, manifest=base.known, details=details)
    pointer, action = base.stock.current.pointer, "unchanged"
    if pointer is None or pointer.pinned or pointer.generation != base.manifest.generation:
        serve_again(files, base.manifest, base.stock)
        action = "mended" if base.damage else "unpinned"
    details |= {"newest_image_s": base.manifest.embeddings.newest_image_s}
    details |= describe_damage(base) | export(config, files, base.manifest)
    return make_report(action, files.index, manifest=base.manifest, details=details)


def decide(
    config: IndexConfig, source: Source, plan: Plan, *, base: Base, files: FileStore
) -> Decision:
    """Decide between building everything anew, adding what has changed, and doing nothing.

    Raises:
        SpaceMismatchError: The index holds vectors of another space.
    """
    if base.known is not None:
        check_space(base.known, source)
    if config.full:
        return Decision(True, None, "asked for with --full")
    parent, damage = base.manifest, base.damage
    if parent is None:
        return Decision(True, None, f"damaged: {damage}" if damage else "first generation")
    kind = parent.codec.kind
    if config.kind not in ("auto", kind):
        return Decision(True, None, f"asked for {config.kind} instead of {kind}")
    if config.kind == "auto" and outgrew(kind, plan.rows, source.dim, planned_kind=plan.kind):
        return Decision(True, None, f"{plan.rows:,} rows are too many for {kind}")
    decision = _compare(parent, source, files)
    if decision.idle and _has_lost_map(parent, config, base=base, files=files):
        return replace(decision, redraw=True, reason="the map was lost and is drawn again")
    if damage is None or decision.full:
        return decision
    return replace(decision, reason=f"damaged: {damage}; {decision.reason}")


def _has_lost_map(parent: Manifest, config: IndexConfig, *, base: Base, files: FileStore) -> bool:
    if parent.map is None:
        return False
    sizes = None if config.verify else base.stock.sizes
    return files.find_damage([parent.map], sizes=sizes) is not None


def _compare(parent: Manifest, source: Source, files: FileStore) -> Decision:
    """Compare what a generation holds with what is committed."""
    assert parent.owners is not None
    try:
        owners = decode_owners(files.fetch(parent.owners).read_bytes())
    except CorruptionError as error:
        return Decision(True, None, f"damaged: {error}")
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


def make_generation(build: Build, decision: Decision, seq: int) -> Finished:
    """Return the new generation; everything is built anew, once, where an increment will not do."""
    if decision.full or build.parent is None or decision.changes is None:
        return finish(build, draft_full(build, decision.reason), seq)
    try:
        finished = _add(build, build.parent, decision.changes, seq)
    except CorruptionError:
        damage = build.files.find_damage(build.parent.list_needed())
        if damage is None:  # it is the embeddings that are damaged: no build can do without them
            raise
        finished = f"damaged: {damage}"
    if isinstance(finished, Finished):
        return finished
    LOG.warning("building everything anew: %s", finished)
    return finish(build, draft_full(build, finished), seq)


def _add(build: Build, parent: Manifest, changes: Changes, seq: int) -> Finished | str:
    """Return a generation of the parent and what has changed, or why everything has to be anew."""
    draft = draft_increment(build, parent, changes)
    imbalance = compute_imbalance(read_list_sizes(build.files, draft.segments))
    new = [item.info for item in draft.built]
    drift = explain_drift(draft.codec, rows=draft.rows, imbalance=imbalance, new=new)
    if drift is not None:
        return f"trained anew: {drift}"
    finished = finish(build, draft, seq)
    failed = [gate for gate in finished.gates if not gate.passed]
    if failed and all(gate.mendable for gate in failed):
        return f"trained anew: {'; '.join(gate.detail for gate in failed)}"
    return finished


def describe_damage(base: Base) -> dict[str, Any]:
    """Return what a report says about damage that was found; nothing where there was none."""
    return {} if base.damage is None else {"damage": base.damage}


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
