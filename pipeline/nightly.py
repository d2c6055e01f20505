"""The nightly job: embed, index, report; one at a time, fit to be watched."""

import json
import time
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import IndexConfig, NightlyConfig
from pipeline.errors import AbortError, SettingsError
from pipeline.index.build import IndexReport, build_index
from pipeline.lease import Lease
from pipeline.parts import list_commits
from pipeline.report import LOG, EmbedReport
from pipeline.report_page import render_report, sample_failures
from pipeline.run import embed
from pipeline.showcase import describe_index
from pipeline.storage import Storage, join_uri, normalise_uri


@dataclass(frozen=True, slots=True)
class Freshness:
    """How up to date an index is.

    Attributes:
        newest_image_s: Time of the newest source behind the rows, in seconds since 1970.
        age_s: Age of that at the end of the run, seconds.
        finished_s: When the run ended, in seconds since 1970.
        generation: The generation that serves.
        indexed_rows: Rows in it.
        rows: Live rows of the embeddings, by status.
    """

    newest_image_s: float | None
    age_s: float | None
    finished_s: float
    generation: str
    indexed_rows: int
    rows: dict[str, int]

    def to_prometheus(self) -> str:
        """Return the figures in Prometheus' text format."""
        lines = [
            "# HELP image_embedding_last_success_timestamp_seconds End of the last good night.",
            "# TYPE image_embedding_last_success_timestamp_seconds gauge",
            f"image_embedding_last_success_timestamp_seconds {self.finished_s:.3f}",
            "# HELP image_embedding_indexed_rows Rows in the generation that serves.",
            "# TYPE image_embedding_indexed_rows gauge",
            f"image_embedding_indexed_rows {self.indexed_rows}",
            "# HELP image_embedding_rows Live rows of the embeddings, by status.",
            "# TYPE image_embedding_rows gauge",
            *(f'image_embedding_rows{{status="{s}"}} {n}' for s, n in self.rows.items()),
        ]
        if self.newest_image_s is not None:
            lines += [
                "# HELP image_embedding_newest_image_timestamp_seconds Newest image indexed.",
                "# TYPE image_embedding_newest_image_timestamp_seconds gauge",
                f"image_embedding_newest_image_timestamp_seconds {self.newest_image_s:.3f}",
            ]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class NightlyReport:
    """The report of a night.

    Attributes:
        embed: Report of the embed job.
        index: Report of the index job.
        freshness: How up to date the index is now.
    """

    embed: EmbedReport
    index: IndexReport
    freshness: Freshness

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        freshness = {name: getattr(self.freshness, name) for name in Freshness.__slots__}
        return {
            "job": "nightly",
            "embed": self.embed.to_dict(),
            "index": self.index.to_dict(),
            "freshness": freshness,
        }


def run_nightly(config: NightlyConfig) -> NightlyReport:
    """Embed what is new, try again once what failed last night, index, report.

    Returns:
        The report; also written to ``<output>/runs/latest.json``, where monitoring finds it.

    Raises:
        LeaseError: Last night's run is still going.
        PublishError: A gate refused the new generation; the old one goes on serving.
        AbortError: The newest image is older than ``max_age_hours``, or a job failed.
    """
    output = normalise_uri(config.embed.output)
    storage = Storage(config.embed.storage)
    with Lease(output, "nightly", storage=storage, name="nightly.json") as lease:
        embedded = embed(replace(config.embed, retry_failed_once=True))
        if not isinstance(embedded, EmbedReport):
            raise SettingsError("dry_run and verify are of the embed job; run jobs/embed.py")
        lease.check()
        indexed = build_index(_point_at(config.index, output))
        report = NightlyReport(embedded, indexed, _measure_freshness(embedded, indexed))
        _write(config, report, storage=storage)
    _check_age(config, report)
    return report


def _point_at(config: IndexConfig, output: str) -> IndexConfig:
    given = config.embeddings
    if given is not None and normalise_uri(given) != output:
        raise SettingsError(
            f"the index is to be built from {given!r}, but the embeddings go to {output!r}; "
            "leave --embeddings out"
        )
    return replace(config, embeddings=output)


def _measure_freshness(embedded: EmbedReport, indexed: IndexReport) -> Freshness:
    now_s = time.time()
    newest_s = embedded.newest_image_s
    return Freshness(
        newest_image_s=newest_s,
        age_s=None if newest_s is None else now_s - newest_s,
        finished_s=now_s,
        generation=indexed.generation or "",
        indexed_rows=indexed.rows,
        rows=dict(embedded.rows),
    )


def _write(config: NightlyConfig, report: NightlyReport, *, storage: Storage) -> None:
    runs = join_uri(report.embed.output, "runs")
    data = json.dumps(report.to_dict(), indent=2, ensure_ascii=False).encode()
    storage.put(join_uri(runs, "latest.json"), data)
    page = _render_page(config, report.embed, storage)
    storage.put(join_uri(runs, f"{report.embed.run_id}.html"), page.encode())
    if config.nightly.metrics_file is not None:
        target = normalise_uri(config.nightly.metrics_file)
        storage.put(target, report.freshness.to_prometheus().encode())
    LOG.info(
        "night generation=%s rows=%d action=%s",
        report.freshness.generation,
        report.freshness.indexed_rows,
        report.index.action,
    )


def _render_page(config: NightlyConfig, embedded: EmbedReport, storage: Storage) -> str:
    """Return the run's page, now with the index it led to."""
    commits = list_commits(embedded.output, storage).values()
    own = [commit for commit in commits if commit.run_id == embedded.run_id]
    failures = sample_failures(embedded.output, own, storage)
    index = describe_index(config.index)
    return render_report(embedded.to_dict(), failures=failures, index=index)


def _check_age(config: NightlyConfig, report: NightlyReport) -> None:
    limit_h, age_s = config.nightly.max_age_hours, report.freshness.age_s
    if limit_h is not None and age_s is not None and age_s > 3600 * limit_h:
        error = AbortError(
            f"the newest image indexed is {age_s / 3600:.1f} hours old, more than "
            f"--max-age-hours {limit_h:g}; look at what should bring new images"
        )
        error.report = report
        raise error
