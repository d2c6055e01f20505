"""The embed job: plan, claim the output, run the flow, commit, account for every image."""

import json
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import PIL
import pyarrow as pa

from pipeline import dataflow
from pipeline.backbones import (
    LoadedWeights,
    create_backbone,
    find_backbone,
    load_weights,
    save_weights,
    weights_digest,
)
from pipeline.config import EmbedConfig, parse_failure_limit, parse_size
from pipeline.dataflow import FlowSettings, Receipt, Resources
from pipeline.errors import CorruptionError, StorageError
from pipeline.lease import Lease
from pipeline.metrics import DriverMetrics
from pipeline.parts import (
    OutputInfo,
    VerifyReport,
    claim_output,
    list_commits,
    list_present_commits,
    list_retired,
    prune_output,
    read_output_info,
    renew_commit,
    restore_commit,
    retire_commit,
    verify_output,
    write_commit,
)
from pipeline.readers import carried_schema
from pipeline.records import Commit, Layout, PartInfo, Shard, Space, count_statuses
from pipeline.report import LOG, Counters, EmbedReport, ImageCounts, show_progress
from pipeline.report_page import render_report, sample_failures
from pipeline.shards import Listing, Plan, list_sources, make_object_shard, plan_shards
from pipeline.storage import Storage, join_uri, normalise_uri
from pipeline.transforms import resolve_data_config

_COMMIT_THREADS = 16
_PREPROCESSING_VERSION = "1"


@dataclass(frozen=True, slots=True)
class DryRunReport:
    """What a run would do.

    Attributes:
        output: The output.
        space_id: The space it would be of.
        shards: Number of shards by what would become of them.
        embed_bytes: Size of the shards that would be read.
        listed_bytes: Size of everything listed.
    """

    output: str
    space_id: str
    shards: Mapping[str, int]
    embed_bytes: int
    listed_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {"job": "embed", "dry_run": True} | asdict(self)


def embed(config: EmbedConfig) -> EmbedReport | DryRunReport | VerifyReport:
    """Bring an output up to date with its input: every image one row, exactly once.

    Returns:
        The report; of the check with ``verify``, of the plan with ``dry_run``.

    Raises:
        SettingsError: The settings are wrong, or do not fit the input or the output.
        LeaseError: Another live run writes to the output.
        TooManyFailuresError: More images failed than ``max_failures`` allows.
        StorageError: Storage failed for good; committed shards stay, and a rerun goes on.
        CorruptionError: The output is damaged, or the books do not balance.
    """
    started_s = time.time()
    config = replace(config, output=normalise_uri(config.output))
    storage = Storage(config.storage)
    if config.verify:
        return _verify(config, storage)
    info, weights = _describe_output(config, storage)
    listing = list_sources(config.input, config.input_kind, storage)
    if config.dry_run:
        return _describe_plan(config, info, listing, storage)
    run_id = time.strftime("%Y%m%d-%H%M%S", time.gmtime(started_s)) + f"-{uuid.uuid4().hex[:6]}"
    with Lease(config.output, run_id, storage=storage) as lease:
        claimed = _claim(config, info, weights, listing, storage)
        run = _Run(config, run_id, started_s, claimed, lease)
        return run.execute(listing)


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


def _describe_output(
    config: EmbedConfig, storage: Storage
) -> tuple[OutputInfo, LoadedWeights | None]:
    """Return what the output is, or will be, and the weights where they had to be loaded."""
    find_backbone(config.model)  # before anything is read or loaded
    found = read_output_info(config.output, storage)
    source = f"{config.weights} of {config.model}"
    weights = None
    if found is not None and _is_reproducible(config.weights) and found.weights_source == source:
        digest = found.space.weights_sha256
    else:
        weights = load_weights(config.model, config.weights)
        digest = weights_digest(weights.state_dict)
    data_config = resolve_data_config(config.model, use_test_size=config.image_size == "test")
    if config.image_size.isdecimal():
        data_config = data_config.with_size(int(config.image_size))
    space = Space(
        backbone=config.model,
        weights_sha256=digest,
        image_size=data_config.image_size,
        crop_pct=data_config.crop_pct,
        interpolation=data_config.interpolation,
        mean=data_config.mean,
        std=data_config.std,
        exif=config.exif,
        decode=config.decode,
        precision=config.precision,
        dim=create_backbone(config.model, weights=None, num_classes=0).embedding_dim,
        versions={"pillow": PIL.__version__, "preprocessing": _PREPROCESSING_VERSION},
    )
    layout = Layout(
        chunk_images=config.chunk_images,
        chunk_bytes=parse_size(config.chunk_bytes, setting="chunk_bytes"),
        embedding_dtype=config.embedding_dtype,
        top_k_classes=config.top_k_classes,
        carry=config.carry,
        image_column=config.image_column,
        key_column=config.key_column,
    )
    info = OutputInfo(
        space,
        layout,
        found.carried if found else pa.schema([]),
        weights=f"weights/{digest[:16]}.safetensors",
        weights_source=source,
        weights_revision=weights.revision if weights else None,
    )
    return info, weights


def _is_reproducible(weights: str) -> bool:
    """Tell whether the name alone decides the weights, so that a copy of them will do."""
    return weights == "pretrained" or weights.startswith("random:")


def _claim(
    config: EmbedConfig,
    info: OutputInfo,
    weights: LoadedWeights | None,
    listing: Listing,
    storage: Storage,
) -> OutputInfo:
    """Make the output one of this space, with the weights kept there for actors and lookups."""
    if read_output_info(config.output, storage) is None:
        info = replace(info, carried=_find_carried_schema(info.layout, listing, storage))
    else:
        info = claim_output(config.output, info, storage)
    uri = join_uri(config.output, info.weights)
    if not storage.exists(uri):
        weights = weights or load_weights(config.model, config.weights, storage=storage)
        save_weights(weights.state_dict, uri, storage=storage)
    return claim_output(config.output, info, storage)


def _find_carried_schema(layout: Layout, listing: Listing, storage: Storage) -> pa.Schema:
    """Return the types of the carried columns, as the first Parquet shard has them."""
    for source in listing.sources:
        if layout.carry and source.kind == "parquet":
            shard = make_object_shard(source, chunking=())
            return carried_schema(shard, storage=storage, carry=layout.carry)
    return pa.schema([pa.field(name, pa.string()) for name in layout.carry])


def _describe_plan(
    config: EmbedConfig, info: OutputInfo, listing: Listing, storage: Storage
) -> DryRunReport:
    plan = plan_shards(
        listing,
        space_id=info.space.id,
        layout=info.layout,
        commits=(commits := list_commits(config.output, storage)),
        retired=list_retired(config.output, storage),
        again=_list_again(config, commits),
    )
    return DryRunReport(
        output=config.output,
        space_id=info.space.id,
        shards=_count_shards(plan),
        embed_bytes=sum(shard.size_bytes for shard in plan.embed),
        listed_bytes=plan.listed_bytes,
    )


def _list_again(config: EmbedConfig, commits: Mapping[str, Commit]) -> frozenset[str]:
    """Return the committed shards to embed once more for the sake of their failed rows."""
    if not (config.retry_failed or config.retry_failed_once):
        return frozenset()
    return frozenset(
        shard_id
        for shard_id, commit in commits.items()
        if set(commit.statuses) - {"ok"} and (config.retry_failed or not _was_retried(commit))
    )


def _was_retried(commit: Commit) -> bool:
    # Parts of a shard that is embedded once more go to a folder of their own.
    return not all(part.path.startswith(f"parts/{commit.shard_id}/") for part in commit.parts)


def _count_shards(plan: Plan) -> dict[str, int]:
    return {
        "embed": len(plan.embed),
        "carried_over": len(plan.carried),
        "restored": len(plan.restored),
        "removed": len(plan.removed),
        "ignored_objects": plan.ignored,
    }


class _OpenShard:
    """A shard whose parts are coming in."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.parts: dict[int, PartInfo | None] = {}
        self.num_chunks: int | None = None
        self.num_records = 0
        self.notes: dict[str, int] = {}

    def add(self, receipt: Receipt) -> bool:
        """Take a receipt in; return whether the parts now tile the shard."""
        self.parts[receipt.chunk] = receipt.part
        self.num_records += receipt.num_records
        if receipt.last:
            self.num_chunks = receipt.chunk + 1
            self.notes = receipt.notes
        return self.num_chunks == len(self.parts)


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
        self._counters = Counters()
        self._sequence = 1
        self._committed: dict[str, Commit] = {}
        self._failed_shards: dict[str, str] = {}
        self._resources = Resources(0, 0.0, 0.0)
        self._embed_started_s = self._embed_ended_s = started_s

    def execute(self, listing: Listing) -> EmbedReport:
        """Bring the output up to date and report."""
        output = self._config.output
        commits, superseded = list_present_commits(output, self._storage)
        for shard_id in superseded:  # left by a run that was killed between commit and clean-up
            retire_commit(output, shard_id, self._storage)
        retired = list_retired(output, self._storage)
        known = [*commits.values(), *retired.values()]
        self._sequence = 1 + max((commit.sequence for commit in known), default=0)
        plan = plan_shards(
            listing,
            space_id=self._info.space.id,
            layout=self._info.layout,
            commits=commits,
            retired=retired,
            again=_list_again(self._config, commits),
            sequence=self._sequence,
        )
        LOG.info(
            "plan run=%s shards_to_embed=%d carried_over=%d restored=%d removed=%d",
            self._run_id,
            len(plan.embed),
            len(plan.carried),
            len(plan.restored),
            len(plan.removed),
        )
        self._apply_changes(plan)
        if plan.embed:
            self._embed_shards(plan.embed)
        if self._config.prune:
            LOG.info("pruned files=%d", prune_output(output, self._storage))
        return self._finish(plan, commits)

    def _apply_changes(self, plan: Plan) -> None:
        """Bring back shards whose source is back, take out those whose source is gone."""
        output = self._config.output
        for commit, supersedes in plan.restored:
            renewed = renew_commit(
                commit, sequence=self._sequence, run_id=self._run_id, supersedes=supersedes
            )
            restore_commit(output, renewed, self._storage)
            for shard_id in supersedes:
                retire_commit(output, shard_id, self._storage)
        for commit in plan.removed:
            retire_commit(output, commit.shard_id, self._storage)

    def _embed_shards(self, shards: Sequence[Shard]) -> None:
        limits = parse_failure_limit(self._config.max_failures)
        open_shards = {shard.id: _OpenShard(shard) for shard in shards}
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
            self._embed_started_s = time.time()
            for receipt in receipts:
                self._lease.check()
                opened = open_shards.get(receipt.shard_id)
                if opened is None or receipt.chunk in opened.parts:
                    continue  # sent once more after a fault
                if self._take(receipt, opened):
                    del open_shards[receipt.shard_id]
                    pending.append(pool.submit(self._commit, opened))
                    metrics.count_commit()
                pending = _drop_finished(pending)
                self._counters.mark(time.time() - self._embed_started_s)
                self._counters.check_limit(*limits)
                progress.update(
                    images=self._counters.rows,
                    failures=self._counters.failures,
                    done_bytes=self._counters.encoded_bytes,
                )
            _ = [future.result() for future in pending]
        self._embed_ended_s = time.time()
        self._counters.check_limit(*limits, final=True)
        if unfinished := set(open_shards) - set(self._failed_shards):
            raise CorruptionError(
                f"{len(unfinished)} shards sent no final receipt, e.g. "
                f"{open_shards[unfinished.pop()].shard.source}; run again"
            )

    def _start_flow(self, shards: Sequence[Shard]) -> Generator[Receipt, None, None]:
        self._resources = dataflow.choose_resources(self._config)
        settings: FlowSettings = dataflow.make_flow_settings(
            self._config, self._info, self._resources, run_id=self._run_id
        )
        return dataflow.run_flow(shards, settings, self._resources)

    def _take(self, receipt: Receipt, opened: _OpenShard) -> bool:
        """Book a receipt; return whether its shard is complete."""
        if receipt.error is not None:
            self._failed_shards[receipt.shard_id] = f"{opened.shard.source}: {receipt.error}"
            return False
        counters = self._counters
        counters.encoded_bytes += receipt.nbytes
        counters.seconds.update(receipt.seconds)
        counters.notes.update(receipt.notes)
        if receipt.part is not None:
            counters.statuses.update(receipt.part.statuses)
        if receipt.batch_size:
            counters.batch_size = min(counters.batch_size or receipt.batch_size, receipt.batch_size)
        return opened.add(receipt)

    def _commit(self, opened: _OpenShard) -> None:
        shard = opened.shard
        parts = (opened.parts[chunk] for chunk in range(len(opened.parts)))
        commit = Commit(
            shard_id=shard.id,
            kind=shard.kind,
            source=shard.source,
            root=shard.root,
            name=shard.name,
            version=shard.version,
            size_bytes=shard.size_bytes,
            space_id=self._info.space.id,
            parts=tuple(part for part in parts if part is not None),
            members=shard.members,
            supersedes=shard.supersedes,
            notes=opened.notes,
            sequence=self._sequence,
            run_id=self._run_id,
            committed_s=time.time(),
            modified_s=shard.modified_s,
        )
        if commit.rows != opened.num_records:
            raise CorruptionError(
                f"{shard.source}: {opened.num_records} records were read but {commit.rows} rows "
                "written; the shard is not committed; this is a defect, please report it"
            )
        write_commit(self._config.output, commit, self._storage)
        self._committed[shard.id] = commit
        LOG.debug(
            "commit run=%s shard=%s source=%s rows=%d",
            self._run_id,
            shard.id,
            shard.source,
            commit.rows,
        )
        for shard_id in shard.supersedes:
            retire_commit(self._config.output, shard_id, self._storage)

    def _finish(self, plan: Plan, before: Mapping[str, Commit]) -> EmbedReport:
        """Balance the books against what the output holds now, and write the report."""
        live = list_commits(self._config.output, self._storage)
        statuses = count_statuses(commit.statuses for commit in self._committed.values())
        kept = [key for key in before if key in live and key not in self._committed]
        restored = [commit for commit, _ in plan.restored]
        carried_rows = sum(commit.rows for commit in [*map(before.__getitem__, kept), *restored])
        removed_rows = sum(commit.rows for commit in plan.removed)
        report = EmbedReport(
            run_id=self._run_id,
            output=self._config.output,
            space_id=self._info.space.id,
            settings=asdict(self._config),
            started_s=self._started_s,
            seconds=time.time() - self._started_s,
            embed_seconds=self._embed_ended_s - self._embed_started_s,
            startup_seconds=self._embed_started_s - self._started_s,
            images=ImageCounts(
                listed=sum(commit.rows for commit in live.values()) + removed_rows,
                embedded=statuses.get("ok", 0),
                failed={status: n for status, n in statuses.items() if status != "ok"},
                carried_over=carried_rows,
                removed=removed_rows,
            ),
            shards=_count_shards(plan)
            | {"embedded": len(self._committed), "failed": len(self._failed_shards)},
            rows=count_statuses(commit.statuses for commit in live.values()),
            images_per_s=self._counters.rows
            / max(1e-9, self._embed_ended_s - self._embed_started_s),
            encoded_bytes=self._counters.encoded_bytes,
            stage_seconds=dict(self._counters.seconds),
            notes=dict(self._counters.notes),
            actors=asdict(self._resources),
            batch_size=self._counters.batch_size,
            failed_shards=self._failed_shards,
            newest_image_s=max((c.modified_s or 0.0 for c in live.values()), default=0.0) or None,
            timeline=self._counters.timeline,
        )
        self._write_report(report)
        if self._failed_shards:
            raise _describe_failed_shards(report)
        return report

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


def _describe_failed_shards(report: EmbedReport) -> StorageError:
    first = next(iter(report.failed_shards.values()))
    error = StorageError(
        f"{len(report.failed_shards)} shards could not be read and are not committed, "
        f"the first: {first}; all others are done, run again for the rest"
    )
    error.report = report
    return error
