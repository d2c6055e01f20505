"""Estimates the work and the hours of a run without doing it: ``--dry-run``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from pipeline.config import EmbedConfig
from pipeline.embed_job import dataflow
from pipeline.embed_job.actors import FlowSettings, make_flow_settings
from pipeline.embed_job.plan import Plan, count_shards, guard_removal, list_again, plan_shards
from pipeline.errors import SettingsError, StorageError
from pipeline.input.listing import Listing
from pipeline.input.reader import read_chunks
from pipeline.log import LOG
from pipeline.output.commits import list_commits, list_retired
from pipeline.output.info import OutputInfo
from pipeline.records import Record, Shard, describe_job
from pipeline.storage import Storage

_SAMPLE_SHARDS = 4
_SAMPLE_IMAGES = 32


@dataclass(frozen=True, slots=True)
class DryRunReport:
    """Report of a dry run: shards to embed, images, hours.

    Attributes:
        output: The output.
        space_id: The space it would be of.
        shards: Number of shards by what would become of them.
        embed_bytes: Size of the shards that would be read.
        listed_bytes: Size of everything listed.
        images: Images to embed, estimated from the sample; exact for loose images.
        sampled_images: Images in the sample.
        images_per_s: What one actor embedded of the sample in a second, warmed up.
        actors: Actors the cluster has room for now.
        hours: Estimated time with that many actors; start-up apart.
        gpu_hours: GPUs times hours; 0 on CPUs.
    """

    output: str
    space_id: str
    shards: Mapping[str, int]
    embed_bytes: int
    listed_bytes: int
    images: int = 0
    sampled_images: int = 0
    images_per_s: float = 0.0
    actors: int = 0
    hours: float = 0.0
    gpu_hours: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return describe_job("embed") | {"dry_run": True} | asdict(self)


def estimate_run(
    config: EmbedConfig, info: OutputInfo, listing: Listing, storage: Storage
) -> DryRunReport:
    """Plan without doing, and time one actor on a sample; writes nothing."""
    commits = list_commits(config.output, storage)
    make_plan = partial(
        plan_shards,
        listing,
        space_id=info.space.id,
        layout=info.layout,
        commits=commits,
        retired=list_retired(config.output, storage),
        again=list_again(config, commits),
    )
    plan = guard_removal(make_plan, max_removed=config.max_removed)
    report = DryRunReport(
        output=config.output,
        space_id=info.space.id,
        shards=count_shards(plan),
        embed_bytes=sum(shard.size_bytes for shard in plan.embed),
        listed_bytes=plan.listed_bytes,
    )
    return _add_estimate(report, config, info, plan) if plan.embed else report


def _add_estimate(
    report: DryRunReport, config: EmbedConfig, info: OutputInfo, plan: Plan
) -> DryRunReport:
    with dataflow.cluster(config.ray_address):
        resources = dataflow.choose_resources(config)
        settings = replace(
            make_flow_settings(config, info, resources, run_id="dry-run"),
            weights=config.weights,
        )
        samples = [_sample_shard(shard, settings) for shard in _spread(plan.embed)]
        records = [record for sample in samples for record in sample]
        rate = dataflow.time_sample(records, settings, resources) if records else 0.0
    images = _count_images(plan.embed, records)
    hours = images / rate / resources.actors / 3600 if rate else 0.0
    gpu_hours = hours * resources.actors * resources.gpus
    LOG.info(
        "dry run images=%d bytes=%d actors=%d images_per_s=%.1f hours=%.2f gpu_hours=%.2f",
        images,
        report.embed_bytes,
        resources.actors,
        rate * resources.actors,
        hours,
        gpu_hours,
    )
    return replace(
        report,
        images=images,
        sampled_images=len(records),
        images_per_s=rate,
        actors=resources.actors,
        hours=hours,
        gpu_hours=gpu_hours,
    )


def _spread(shards: Sequence[Shard]) -> list[Shard]:
    """Return a few shards from all over the plan: large, middling and small ones."""
    step = max(1, len(shards) // _SAMPLE_SHARDS)
    return list(shards[::step][:_SAMPLE_SHARDS])


def _sample_shard(shard: Shard, settings: FlowSettings) -> list[Record]:
    options = replace(settings.read, chunk_images=_SAMPLE_IMAGES)
    try:
        chunk = next(read_chunks(shard, storage=settings.storage, options=options))
    except (SettingsError, StorageError) as error:  # a run would name it and do the others
        LOG.warning("dry run cannot read source=%s error=%s", shard.source, error)
        return []
    return [record for record in chunk.records if record.status == "ok"]


def _count_images(shards: Sequence[Shard], records: Sequence[Record]) -> int:
    """Estimate the images in shards from the mean size of a sampled one."""
    loose = sum(len(shard.members) for shard in shards)
    packed_bytes = sum(shard.size_bytes for shard in shards if not shard.members)
    if not records or not packed_bytes:
        return loose
    # A tar pads each member to 512 bytes and gives it a header of as much.
    mean_bytes = sum(len(record.data) for record in records) / len(records) + 768
    return loose + round(packed_bytes / mean_bytes)
