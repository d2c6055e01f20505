"""The nightly job: embed, index, report; one at a time, fit to be watched."""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from pipeline.config import EmbedConfig, IndexConfig, NightlyConfig
from pipeline.embed_job.lease import Lease
from pipeline.embed_job.report import EmbedReport
from pipeline.embed_job.report_page import (
    IndexSection,
    ShownImage,
    encode_picture,
    render_report,
    sample_failures,
)
from pipeline.embed_job.run import embed
from pipeline.errors import AbortError, IncompleteError, PipelineError, SettingsError
from pipeline.images.decode import ImageLimits
from pipeline.images.thumbnails import make_thumbnail
from pipeline.index.faiss.codes import Floats
from pipeline.index.job import IndexReport, build_index
from pipeline.index.manifest import Manifest
from pipeline.index.pointer import read_current
from pipeline.index.search.search_index import Neighbour, SearchIndex
from pipeline.input.reader import read_record_bytes
from pipeline.log import LOG
from pipeline.output.commits import list_commits
from pipeline.records import describe_job
from pipeline.storage import Storage, join_uri, normalise_uri

Made = TypeVar("Made")

_QUERIES = 4
_NEIGHBOURS = 7
_MAP_POINTS = 800
_MAP_PICTURES = 60
_MAP_SIZE = (1000, 700)
_MAP_MARGIN_PX = 18  # a picture there is 34 wide
_THUMBNAIL_PX = 124
_LAST_SUCCESS = "image_embedding_last_success_timestamp_seconds"


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

    def to_prometheus(self, last_success_s: float | None) -> str:
        """Return the figures in Prometheus' text format.

        Args:
            last_success_s: End of the last good night, in seconds since 1970; None for none yet.
        """
        lines = [
            "# HELP image_embedding_indexed_rows Rows in the generation that serves.",
            "# TYPE image_embedding_indexed_rows gauge",
            f"image_embedding_indexed_rows {self.indexed_rows}",
            "# HELP image_embedding_rows Live rows of the embeddings, by status.",
            "# TYPE image_embedding_rows gauge",
            *(f'image_embedding_rows{{status="{s}"}} {n}' for s, n in self.rows.items()),
        ]
        if last_success_s is not None:
            lines += [
                f"# HELP {_LAST_SUCCESS} End of the last good night.",
                f"# TYPE {_LAST_SUCCESS} gauge",
                f"{_LAST_SUCCESS} {last_success_s:.3f}",
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
        return describe_job("nightly") | {
            "embed": self.embed.to_dict(),
            "index": self.index.to_dict(),
            "freshness": freshness,
        }


def run_nightly(config: NightlyConfig) -> NightlyReport:
    """Embed what is new, try again once what failed last night, index, report.

    Objects that cannot be read do not keep the index from what all others gave.

    Returns:
        The report; also written to ``<output>/runs/latest.json``, where monitoring finds it.

    Raises:
        LeaseError: Last night's run is still going.
        PublishError: A gate refused the new generation; the old one goes on serving.
        IncompleteError: Some objects could not be read; all else is embedded, indexed, reported.
        AbortError: The newest image is older than ``max_age_hours``, or a job failed.
    """
    output = normalise_uri(config.embed.output)
    storage = Storage(config.embed.storage)
    with Lease(output, "nightly", storage=storage, name="nightly.json") as lease:
        embedded, incomplete = _embed(replace(config.embed, retry_failed_once=True))
        lease.check()
        indexed = build_index(_point_at(config.index, output))
        report = NightlyReport(embedded, indexed, _measure_freshness(embedded, indexed))
        failure = incomplete or _find_staleness(config, report)
        _write(config, report, good=failure is None, storage=storage)
    if failure is not None:
        failure.report = report
        raise failure
    return report


def _embed(config: EmbedConfig) -> tuple[EmbedReport, IncompleteError | None]:
    """Run the embed job; return its report, and the error of a run that lacks some objects."""
    incomplete = None
    try:
        report: object = embed(config)
    except IncompleteError as error:
        report, incomplete = error.report, error
    assert isinstance(report, EmbedReport)  # the settings allow neither dry_run nor verify
    return report, incomplete


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
    # A generation that a roll-back pins may be older than what was embedded.
    newest_s = indexed.details.get("newest_image_s", embedded.newest_image_s)
    return Freshness(
        newest_image_s=newest_s,
        age_s=None if newest_s is None else now_s - newest_s,
        finished_s=now_s,
        generation=indexed.generation or "",
        indexed_rows=indexed.rows,
        rows=dict(embedded.rows),
    )


def _write(config: NightlyConfig, report: NightlyReport, *, good: bool, storage: Storage) -> None:
    runs = join_uri(report.embed.output, "runs")
    data = json.dumps(report.to_dict(), indent=2, ensure_ascii=False).encode()
    storage.put(join_uri(runs, "latest.json"), data)
    if config.nightly.metrics_file is not None:
        target = normalise_uri(config.nightly.metrics_file)
        write = partial(_write_metrics, target, report.freshness, good=good, storage=storage)
        _try("the metrics file", write, None)
    page = join_uri(runs, f"{report.embed.run_id}.html")
    _try(
        "the page",
        lambda: storage.put(page, _render_page(config, report.embed, storage).encode()),
        None,
    )
    LOG.info(
        "night generation=%s rows=%d action=%s",
        report.freshness.generation,
        report.freshness.indexed_rows,
        report.index.action,
    )


def _write_metrics(target: str, freshness: Freshness, *, good: bool, storage: Storage) -> None:
    """Write the figures; a night that failed keeps the time of the last good one."""
    last_success_s: float | None = freshness.finished_s
    if not good:
        before = storage.read(target).decode() if storage.exists(target) else ""
        found = re.search(rf"^{_LAST_SUCCESS} (\S+)$", before, re.MULTILINE)
        last_success_s = float(found[1]) if found else None
    storage.put(target, freshness.to_prometheus(last_success_s).encode())


def _try(what: str, make: Callable[[], Made], instead: Made) -> Made:
    """Return what is made, or ``instead``, and a warning, if that fails for any reason.

    For what a night shows but does not need: its images are embedded and its generation serves.
    """
    try:
        return make()
    except Exception as error:
        LOG.warning("the night goes on without %s: %s: %s", what, type(error).__name__, error)
        return instead


def _render_page(config: NightlyConfig, embedded: EmbedReport, storage: Storage) -> str:
    """Return the run's page, now with the index it led to."""
    commits = list_commits(embedded.output, storage).values()
    own = [commit for commit in commits if commit.run_id == embedded.run_id]
    failures = sample_failures(embedded.output, own, storage)
    index = describe_index(config.index)
    return render_report(embedded.to_dict(), failures=failures, index=index)


def _find_staleness(config: NightlyConfig, report: NightlyReport) -> AbortError | None:
    limit_h, age_s = config.nightly.max_age_hours, report.freshness.age_s
    if limit_h is None or age_s is None or age_s <= 3600 * limit_h:
        return None
    return AbortError(
        f"the newest image indexed is {age_s / 3600:.1f} hours old, more than "
        f"--max-age-hours {limit_h:g}; look at what should bring new images"
    )


def describe_index(config: IndexConfig) -> IndexSection | None:
    """Return what there is to show of the generation that serves; None without one."""
    storage = Storage(config.storage)
    uri = normalise_uri(config.index)
    manifest = read_current(uri, storage)
    if manifest is None:
        return None
    index = SearchIndex.open(
        uri,
        storage,
        generation=manifest.generation,
        cache_dir=config.cache_dir,
        cache_bytes=config.cache_size.nbytes,
    )
    shown = partial(_show_query, index, storage=storage)
    return IndexSection(
        generation=manifest.generation,
        kind=manifest.codec.kind,
        rows=manifest.rows,
        recall=manifest.measured.get("recall"),
        curve=_try("its curve", lambda: _list_curve(manifest), []),
        neighbours=_try("its neighbours", lambda: [shown(query) for query in _sample(index)], []),
        map=_try("its map", lambda: _show_map(index, storage), []),
    )


def _list_curve(manifest: Manifest) -> list[tuple[float, float, bool]]:
    chosen = manifest.measured.get("params")
    return [
        (point["latency_ms"]["p50"], point["recall"], point["params"] == chosen)
        for point in manifest.curve
        if point.get("latency_ms")
    ]


def _sample(index: SearchIndex) -> Sequence[Neighbour]:
    return index.snapshot.sample(_QUERIES, seed=0)


def _show_query(index: SearchIndex, query: Neighbour, *, storage: Storage) -> list[ShownImage]:
    found = index.snapshot.neighbours_of(query.key, _NEIGHBOURS)
    return [ShownImage(n.key, _show_picture(n, storage), n.score) for n in [query, *found]]


def _show_picture(neighbour: Neighbour, storage: Storage) -> str | None:
    try:
        data = read_record_bytes(
            neighbour.shard,
            row=neighbour.row,
            offset=neighbour.offset,
            nbytes=neighbour.nbytes,
            sha256=neighbour.columns["sha256"],
            storage=storage,
        )
        return encode_picture(make_thumbnail(data, _THUMBNAIL_PX, limits=ImageLimits()))
    except PipelineError:  # the page does without; the image may be gone since
        return None


def place_on_page(xy: Floats) -> Floats:
    """Return places on the drawn map, in pixels, of points in [0, 1]; the page's way up.

    Pictures at the edge stay whole: half their side is kept free.
    """
    width, height = (side - 2 * _MAP_MARGIN_PX for side in _MAP_SIZE)
    upright = np.column_stack([xy[:, 0], 1 - xy[:, 1]])
    return np.asarray(upright * (width, height) + _MAP_MARGIN_PX)


def _show_map(index: SearchIndex, storage: Storage) -> list[ShownImage]:
    points = index.snapshot.opened.map
    if points is None:
        return []
    step = max(1, len(points.keys) // _MAP_POINTS)
    keys, places = points.keys[::step], place_on_page(points.xy[::step])
    pictured = set(keys[:: max(1, len(keys) // _MAP_PICTURES)])
    shown = [
        ShownImage(
            key,
            _show_picture(index.snapshot.find(key), storage) if key in pictured else None,
            x=round(float(x), 1),
            y=round(float(y), 1),
        )
        for key, (x, y) in zip(keys, places, strict=True)
    ]
    return sorted(shown, key=lambda image: image.picture is not None)  # pictures on top
