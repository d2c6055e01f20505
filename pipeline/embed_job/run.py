"""The embed job: plan, claim the output, run the flow, commit, account for every image."""

import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import islice

from pipeline.backbones import find_backbone
from pipeline.config import EmbedConfig
from pipeline.embed_job import dataflow
from pipeline.embed_job.absence import keep_rows, rename_bundle, settle_members
from pipeline.embed_job.actors import (
    FlowSettings,
    check_device,
    depends_on_device,
    make_flow_settings,
)
from pipeline.embed_job.dry_run import DryRunReport, estimate_run
from pipeline.embed_job.efficiency import judge_run
from pipeline.embed_job.lease import Lease
from pipeline.embed_job.ledger import OpenShard
from pipeline.embed_job.metrics import DriverMetrics
from pipeline.embed_job.objects import (
    MAX_FAILED_SHOWN,
    account_objects,
    check_images_found,
    describe_objects,
)
from pipeline.embed_job.plan import (
    Plan,
    count_shards,
    guard_removal,
    list_again,
    list_chunking,
    plan_shards,
)
from pipeline.embed_job.prepare import (
    complete_output,
    describe_columns,
    describe_output,
    make_output,
)
from pipeline.embed_job.report import (
    Counters,
    EmbedReport,
    ImageCounts,
    describe_carried,
    show_progress,
)
from pipeline.embed_job.report_page import render_report, sample_failures
from pipeline.embed_job.resources import Resources
from pipeline.embed_job.wire import Receipt
from pipeline.errors import (
    AbortError,
    CorruptionError,
    IncompleteError,
    RemovalError,
    SettingsError,
    TooManyFailuresError,
)
from pipeline.input.listing import Listing, list_sources
from pipeline.log import LOG
from pipeline.output.commits import (
    find_damaged,
    list_commits,
    list_doomed,
    list_present_commits,
    list_retired,
    prune_output,
    renew_commit,
    restore_commit,
    retire_commit,
    write_commit,
)
from pipeline.output.info import OutputInfo, read_output_info
from pipeline.output.verify import VerifyReport, verify_output
from pipeline.records import Commit, PartInfo, Shard, count_statuses
from pipeline.storage import Storage, join_uri, normalise_uri

_COMMIT_THREADS = 16


def embed(
    config: EmbedConfig, *, stand_in: type | None = None
) -> EmbedReport | DryRunReport | VerifyReport:
    """Bring an output up to date with its input: every image one row, exactly once.

    Args:
        config: The settings.
        stand_in: Takes the place of the embedder actors; see ``dataflow.run_flow``.

    Returns:
        The report; of the check with ``verify``, of the plan with ``dry_run``.

    Raises:
        SettingsError: The settings are wrong, or do not fit the input or the output.
        LeaseError: Another live run writes to the output.
        TooManyFailuresError: More images failed than ``max_failures`` allows.
        StorageError: Storage failed for good; committed shards stay, and a rerun goes on.
        IncompleteError: Everything is done but for some objects; its report names them.
        NoImagesError: Shards were read, and none of an input's has an image.
        CorruptionError: The output is damaged, or the books do not balance.
    """
    started_s = time.time()
    config = replace(config, output=normalise_uri(config.output))
    storage = Storage(config.storage)
    if config.verify:
        return _verify(config, storage)
    config = replace(config, model=_name_backbone(config.model))
    listing_started_s = time.perf_counter()
    listing = _list_input(config, storage)
    list_s = time.perf_counter() - listing_started_s
    info, weights = describe_output(config, storage)
    info = describe_columns(info, listing, storage)
    if config.dry_run:
        return estimate_run(config, info, listing, storage)
    _check_cluster(config, storage)
    run_id = time.strftime("%Y%m%d-%H%M%S", time.gmtime(started_s)) + f"-{uuid.uuid4().hex[:6]}"
    with Lease(config.output, run_id, storage=storage) as lease:
        claimed = make_output(config, info, weights, storage)
        run = _Run(config, run_id, started_s, claimed, lease)
        return run.execute(listing, list_s=list_s, stand_in=stand_in)


def _name_backbone(model: str) -> str:
    """Return the name under which a space records a backbone."""
    name = find_backbone(model).name  # a misspelt one needs no listing to be found
    if name != model:
        LOG.info("model %s is taken to be %s, which is built in", model, name)
    return name


def _check_cluster(config: EmbedConfig, storage: Storage) -> None:
    """Refuse what the cluster cannot do before the output is made for it, and for nothing else.

    Raises:
        SettingsError: Its actors cannot do it.
    """
    if depends_on_device(config) and read_output_info(config.output, storage) is None:
        with dataflow.cluster(config.ray_address):
            check_device(config, dataflow.choose_resources(config).device)


def _list_input(config: EmbedConfig, storage: Storage) -> Listing:
    known = partial(_list_known_images, config.output, storage)
    listing = list_sources(config.input, config.input_kind, storage, known=known)
    _refuse_overlap(config.output, listing)
    return listing


def _list_known_images(output: str, storage: Storage) -> frozenset[tuple[str, str]]:
    """Return URI and version of the loose images that are committed."""
    commits = list_commits(output, storage).values()
    return frozenset((m.uri, m.version) for commit in commits for m in commit.members)


def _refuse_overlap(output: str, listing: Listing) -> None:
    for root in listing.roots:
        if f"{output}/".startswith(f"{root.rstrip('/')}/"):
            raise SettingsError(
                f"the output {output!r} lies inside the input {root!r}, so the next run would read "
                "its parts as shards; choose an --output beside the input"
            )
    inside = next((s for s in listing.sources if s.info.uri.startswith(f"{output}/")), None)
    if inside is not None:
        raise SettingsError(
            f"the input takes {inside.info.uri} out of the output {output!r}; choose an --output "
            "that no --input names"
        )


def _verify(config: EmbedConfig, storage: Storage) -> VerifyReport:
    report = verify_output(config.output, storage)
    if report.problems:
        error = CorruptionError(
            f"{len(report.problems)} problems in {config.output!r}, the first: "
            f"{report.problems[0]}; delete the commits of the shards concerned, and run again"
        )
        error.report = report
        raise error
    return report


class _Run:
    """One run of the embed job, the sole committer of its output."""

    def __init__(
        self, config: EmbedConfig, run_id: str, started_s: float, info: OutputInfo, lease: Lease
    ) -> None:
        self._config = config
        self._run_id = run_id
        self._started_s = started_s
        self._info = info
        self._lease = lease
        self._storage = Storage(config.storage)
        self._stand_in: type | None = None
        self._counters = Counters()
        self._sequence = 1
        self._committed: dict[str, Commit] = {}
        self._failed: dict[str, tuple[Shard, AbortError]] = {}
        self._unmended: dict[str, str] = {}
        self._absent: dict[str, str] = {}
        self._present: Mapping[str, Commit] = {}
        self._before: Mapping[str, Commit] = {}
        self._live: Mapping[str, Commit] = {}
        self._damaged: Mapping[str, str] = {}
        self._kept: list[PartInfo] = []
        self._resources = Resources(0, 0.0, 0.0)
        self._embed_started_s = self._embed_ended_s = started_s

    def execute(self, listing: Listing, *, list_s: float, stand_in: type | None) -> EmbedReport:
        """Bring the output up to date and report."""
        self._stand_in = stand_in
        self._counters.seconds["list"] = list_s
        plan, commits = self._plan(listing)
        if plan.takes_away:  # by a listing of before the lease: another run may have embedded since
            listing = _list_input(self._config, self._storage)
            plan, commits = self._plan(listing)
        self._lease.check()
        self._info = complete_output(self._config.output, self._info, plan.embed, self._storage)
        self._apply_changes(plan)
        if plan.embed:
            try:
                self._embed_shards(plan.embed)
            except TooManyFailuresError as error:  # the report says which, and counts what is done
                error.report = self._finish(plan, commits, listing, stopped=True)
                raise
        if self._config.prune:
            pruned = prune_output(self._config.output, self._storage, check=self._lease.check)
            LOG.info("pruned files=%d", pruned)
        report = self._finish(plan, commits, listing)
        if report.failed_objects or report.failed_shards:
            raise self._explain_failures(report)
        if plan.withheld_rows:
            raise _explain_withheld(plan, report)
        check_images_found(listing, self._live.values())
        return report

    def _plan(self, listing: Listing) -> tuple[Plan, Mapping[str, Commit]]:
        """Return what is to be done, and the commits that are live before it."""
        output = self._config.output
        commits, superseded = list_present_commits(output, self._storage)
        self._present = commits | superseded
        self._retire(superseded)  # left by a run that was killed between commit and clean-up
        retired = list_retired(output, self._storage)
        doomed = list_doomed(output, self._storage)
        known = [*commits.values(), *retired.values()]
        # Who was paused and lost the lease may still commit: as an earlier run than this one.
        self._sequence = 1 + self._lease.takeovers
        self._sequence += max((commit.sequence for commit in known), default=0)
        damaged = find_damaged(output, commits | retired, self._storage)
        for shard_id, problem in damaged.items():
            if shard_id in commits:
                LOG.warning("damaged run=%s %s; its shard is embedded again", self._run_id, problem)
        self._damaged = {key: damaged[key] for key in damaged if key in commits}
        self._before = commits
        make_plan = partial(
            plan_shards,
            listing,
            space_id=self._info.space.id,
            layout=self._info.layout,
            commits=commits,
            retired={
                key: commit
                for key, commit in retired.items()
                if key not in damaged and doomed.isdisjoint(part.path for part in commit.parts)
            },
            doomed=doomed,
            again=list_again(self._config, commits) | self._damaged.keys(),
            sequence=self._sequence,
        )
        plan = guard_removal(make_plan, max_removed=self._config.max_removed)
        if plan.withheld_rows:
            rows = (plan.withheld_rows, plan.covered_rows)
            LOG.warning("removal withheld run=%s rows=%d of=%d", self._run_id, *rows)
        left = {commit.shard_id for commit in plan.carried} & self._damaged.keys()
        for shard_id in left:  # of an input that this run was not given, or whose source is gone
            self._unmended[shard_id] = f"{commits[shard_id].source}: {damaged[shard_id]}"
        LOG.info(
            "plan run=%s shards_to_embed=%d carried_over=%d restored=%d removed=%d",
            self._run_id,
            len(plan.embed),
            len(plan.carried),
            len(plan.restored),
            len(plan.removed),
        )
        return plan, commits

    def _apply_changes(self, plan: Plan) -> None:
        """Bring back shards whose source is back, take out those whose source is gone."""
        for commit, supersedes in plan.restored:
            renewed = renew_commit(
                commit, sequence=self._sequence, run_id=self._run_id, supersedes=supersedes
            )
            self._lease.check()
            restore_commit(self._config.output, renewed, self._storage)
            self._retire(supersedes)
        self._retire(commit.shard_id for commit in plan.removed)

    def _retire(self, shard_ids: Iterable[str]) -> None:
        for shard_id in shard_ids:
            self._lease.check()
            expected = self._present.get(shard_id)
            retire_commit(self._config.output, shard_id, self._storage, expected=expected)

    def _embed_shards(self, shards: Sequence[Shard]) -> None:
        limit = self._config.max_failures
        limits = (None, None) if limit is None else (limit.images, limit.share)
        open_shards = {shard.id: OpenShard(shard) for shard in shards}
        total_bytes = sum(shard.size_bytes for shard in shards)
        with (
            dataflow.cluster(self._config.ray_address),
            ThreadPoolExecutor(_COMMIT_THREADS, "commit") as pool,
            show_progress(total_bytes) as progress,
            DriverMetrics(self._run_id) as metrics,
            closing(self._start_flow(shards)) as receipts,
        ):
            metrics.start(total_bytes)
            pending: list[Future[None]] = []
            sent_s = time.time()
            self._embed_started_s = math.inf
            for receipt in receipts:
                self._lease.check()
                self._embed_started_s = min(self._embed_started_s, time.time() - receipt.load_s)
                opened = open_shards.get(receipt.shard_id)
                if opened is None or receipt.chunk in opened.parts:
                    continue  # sent once more after a fault
                if self._take(receipt, opened):
                    del open_shards[receipt.shard_id]
                    self._failed.pop(receipt.shard_id, None)  # read after all, by a second try
                    pending.append(pool.submit(self._commit, opened))
                    metrics.count_commit()
                pending = _drop_finished(pending)
                self._embed_ended_s = time.time()
                self._counters.mark(self._embed_ended_s - sent_s)
                self._counters.check_limit(*limits)
                progress.update(
                    images=self._counters.rows,
                    failures=self._counters.failures,
                    done_bytes=self._counters.encoded_bytes,
                    seconds=self._embed_ended_s - self._embed_started_s,
                )
            _ = [future.result() for future in pending]
        self._counters.check_limit(*limits, final=True)
        if unfinished := set(open_shards) - set(self._failed):
            raise CorruptionError(
                f"{len(unfinished)} shards sent no final receipt, e.g. "
                f"{open_shards[unfinished.pop()].shard.source}; run again"
            )

    def _start_flow(self, shards: Sequence[Shard]) -> Generator[Receipt, None, None]:
        self._resources = dataflow.choose_resources(self._config)
        settings: FlowSettings = make_flow_settings(
            self._config, self._info, self._resources, run_id=self._run_id
        )
        return dataflow.run_flow(shards, settings, self._resources, stand_in=self._stand_in)

    def _take(self, receipt: Receipt, opened: OpenShard) -> bool:
        """Book a receipt; return whether its shard is complete."""
        if receipt.error is not None:
            self._failed[receipt.shard_id] = (opened.shard, receipt.error)
            return False
        counters = self._counters
        counters.encoded_bytes += receipt.nbytes
        for stage, seconds in receipt.seconds.items():
            counters.seconds[stage] += seconds
        counters.notes.update(receipt.notes)
        if receipt.part is not None:
            counters.statuses.update(receipt.part.statuses)
        if receipt.batch_size:
            counters.batch_size = min(counters.batch_size or receipt.batch_size, receipt.batch_size)
        return opened.add(receipt)

    def _commit(self, opened: OpenShard) -> None:
        self._lease.check()  # it may have waited for its turn
        if opened.absent and not self._settle(opened):
            return
        commit = opened.make_commit(
            space_id=self._info.space.id, sequence=self._sequence, run_id=self._run_id
        )
        replaced = self._before.get(commit.shard_id)
        write_commit(self._config.output, commit, self._storage, replaces=replaced)
        self._committed[commit.shard_id] = commit
        LOG.debug(
            "commit run=%s shard=%s source=%s rows=%d",
            self._run_id,
            commit.shard_id,
            commit.source,
            commit.rows,
        )
        self._retire(commit.supersedes)

    def _settle(self, opened: OpenShard) -> bool:
        """See to a bundle's absent images; return whether anything is left to commit."""
        shard = opened.shard
        self._absent.update((shard.members[row].uri, why) for row, why in opened.absent.items())
        sound = self._before.keys() - self._damaged.keys()
        older = [self._before[i] for i in (*shard.supersedes, shard.id) if i in sound]
        members, kept = settle_members(shard, opened.absent, older)
        before = {member for commit in older for member in commit.members}
        if not opened.num_records or (set(members) == before and shard.id not in self._before):
            return False  # nothing new: what was committed stays
        if kept:
            opened.kept = keep_rows(
                self._config.output,
                older,
                kept,
                shard=shard,
                chunk=len(opened.parts),
                info=self._info,
                storage=self._storage,
            )
            self._kept.append(opened.kept)
        chunking = list_chunking(self._info.space.id, self._info.layout)
        opened.shard = rename_bundle(shard, members, chunking)
        if shard.id in self._before and shard.id != opened.shard.id:
            supersedes = (*shard.supersedes, shard.id)
            opened.shard = replace(opened.shard, supersedes=supersedes)
        return True

    def _count_removed(self, plan: Plan, before: Mapping[str, Commit]) -> int:
        """Count rows whose source is gone: of whole shards, and out of bundles that live on."""
        shrunk = (
            sum(before[old].rows for old in commit.supersedes if old in before) - commit.rows
            for commit in self._committed.values()
            if commit.kind == "bundle" and commit.supersedes
        )
        return sum(commit.rows for commit in plan.removed) + sum(shrunk)

    def _count_images(
        self, plan: Plan, before: Mapping[str, Commit], live: Mapping[str, Commit]
    ) -> ImageCounts:
        statuses = Counter(count_statuses(c.statuses for c in self._committed.values()))
        statuses.subtract(count_statuses(part.statuses for part in self._kept))
        kept = [before[key] for key in before if key in live and key not in self._committed]
        restored = [commit for commit, _ in plan.restored]
        removed_rows = self._count_removed(plan, before)
        return ImageCounts(
            listed=sum(commit.rows for commit in live.values()) + removed_rows,
            embedded=statuses.get("ok", 0),
            failed={status: n for status, n in statuses.items() if n and status != "ok"},
            carried_over=sum(commit.rows for commit in [*kept, *restored])
            + sum(part.rows for part in self._kept),
            removed=removed_rows,
        )

    def _finish(
        self,
        plan: Plan,
        before: Mapping[str, Commit],
        listing: Listing,
        *,
        stopped: bool = False,
    ) -> EmbedReport:
        """Balance the books against what the output holds now, and write the report."""
        self._embed_started_s = min(self._embed_started_s, self._embed_ended_s)
        live = self._live = list_commits(self._config.output, self._storage)
        self._lease.check()  # what another run has written meanwhile is not this one's to count
        failed = self._list_failures()
        objects, aside = account_objects(listing, live.values(), failed=failed, stopped=stopped)
        failed |= {entry.uri: entry.reason for entry in listing.failed}
        images = self._count_images(plan, before, live)
        report = EmbedReport(
            run_id=self._run_id,
            output=self._config.output,
            space_id=self._info.space.id,
            settings=asdict(self._config),
            started_s=self._started_s,
            seconds=time.time() - self._started_s,
            embed_seconds=self._embed_ended_s - self._embed_started_s,
            startup_seconds=self._embed_started_s - self._started_s,
            images=images,
            shards=count_shards(plan)
            | {"embedded": len(self._committed), "failed": len(self._failed) + len(self._unmended)},
            rows=count_statuses(commit.statuses for commit in live.values()),
            images_per_s=self._counters.rows
            / max(1e-9, self._embed_ended_s - self._embed_started_s),
            efficiency=judge_run(
                images.embedded,
                self._embed_ended_s - self._embed_started_s,
                self._counters.seconds,
                self._resources,
            ),
            encoded_bytes=self._counters.encoded_bytes,
            stage_seconds=dict(self._counters.seconds),
            notes=dict(self._counters.notes),
            actors=asdict(self._resources),
            batch_size=self._counters.batch_size,
            failed_shards=self._unmended
            | {
                shard_id: f"{shard.source}: {error}"
                for shard_id, (shard, error) in self._failed.items()
            },
            objects=objects,
            set_aside=aside,
            failed_objects=dict(islice(failed.items(), MAX_FAILED_SHOWN)),
            newest_image_s=max((c.modified_s or 0.0 for c in live.values()), default=0.0) or None,
            timeline=self._counters.timeline,
        )
        for line in describe_carried(report.notes, shards=len(self._committed)):
            LOG.warning(line)
        self._write_report(report)
        LOG.info("done run=%s %s", self._run_id, describe_objects(objects, aside, report.notes))
        return report

    def _list_failures(self) -> dict[str, str]:
        """Return the sources that could not be read, by URI, with the reasons."""
        return self._absent | {
            uri: str(error)
            for shard, error in self._failed.values()
            for uri in ([member.uri for member in shard.members] or [shard.source])
        }

    def _explain_failures(self, report: EmbedReport) -> AbortError:
        """Return what the run ends with: its own fault only where nothing could be read."""
        error = next((error for _, error in self._failed.values()), None)
        objects = report.objects
        if error is None or objects.images + objects.shards:
            named = [f"{uri}: {reason}" for uri, reason in report.failed_objects.items()]
            first = [*named, *self._unmended.values()][0]
            error = IncompleteError(
                f"{objects.failed + len(self._unmended)} objects could not be read, the first: "
                f"{first}; "
                "everything else is done, and what was committed of them before stays: "
                "mend that, and run again for the rest"
            )
        error.report = report
        return error

    def _write_report(self, report: EmbedReport) -> None:
        base = join_uri(self._config.output, "runs", self._run_id)
        values = report.to_dict()
        self._storage.put(f"{base}.json", json.dumps(values, indent=2, ensure_ascii=False).encode())
        failures = sample_failures(
            self._config.output, list(self._committed.values()), self._storage
        )
        self._storage.put(f"{base}.html", render_report(values, failures=failures).encode())


def _drop_finished(pending: list[Future[None]]) -> list[Future[None]]:
    for future in pending:
        if future.done():
            future.result()  # raises what the commit raised
    return [future for future in pending if not future.done()]


def _explain_withheld(plan: Plan, report: EmbedReport) -> RemovalError:
    share = plan.withheld_rows / max(1, plan.covered_rows)
    error = RemovalError(
        f"the sources of {plan.withheld_rows} of {plan.covered_rows} committed rows are no longer "
        f"listed, more than --max-removed allows ({share:.1%}); these rows stay, all else is done. "
        "Bring the sources back, or, if they are meant to be gone, run again with "
        f"--max-removed {math.ceil(1000 * share) / 1000:g}"
    )
    error.report = report
    return error
