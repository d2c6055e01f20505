"""Counters and progress of a run while it goes, and its report when it is done."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.embed_job.efficiency import Efficiency
from pipeline.embed_job.objects import ObjectCounts
from pipeline.errors import CorruptionError, TooManyFailuresError
from pipeline.input.listing import SetAside
from pipeline.log import LOG
from pipeline.records import describe_job

_LOG_EVERY_S = 10.0
_MIN_ROWS_FOR_SHARE = 1000
_MAX_MARKS = 400


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """What became of the images; ``listed`` is the sum of the others.

    Attributes:
        listed: Images of this input, or of the last one, that this run had to account for.
        embedded: Embedded by this run.
        failed: Rows of this run without an embedding, by status.
        carried_over: Rows of unchanged shards, among them those brought back unchanged.
        removed: Rows that left because their source is gone.
    """

    listed: int
    embedded: int
    failed: Mapping[str, int]
    carried_over: int
    removed: int

    def __post_init__(self) -> None:
        total = self.embedded + sum(self.failed.values()) + self.carried_over + self.removed
        if total != self.listed:
            raise CorruptionError(
                f"the run's books do not balance: {self.listed} images listed, {total} accounted "
                "for; run with --verify, and report this with the run's report"
            )


@dataclass(frozen=True, slots=True)
class EmbedReport:
    """The report of a run of the embed job.

    Attributes:
        run_id: Name of the run.
        output: Where the embeddings are.
        space_id: Their space.
        settings: The effective settings.
        started_s: Start, in seconds since 1970.
        seconds: Wall-clock time of the whole run.
        embed_seconds: From the first images in an actor to the last commit; start-up apart.
        startup_seconds: Weights, listing, cluster and actors, until then.
        images: What became of the images.
        shards: Number of shards by what became of them.
        rows: Live rows of the output after the run, by status.
        images_per_s: Images embedded or failed per second of ``embed_seconds``.
        encoded_bytes: Size of the images that were read.
        stage_seconds: Time by stage, summed over actors and their threads: ``list`` (the driver),
            ``read``, ``decode`` and ``transform`` (CPU time), ``transfer`` (to a GPU and back),
            ``forward``, ``wait`` (for crops), ``write``, ``idle`` (without images).
        efficiency: How close this is to what the machines can do, and what binds; None where
            nothing was embedded.
        notes: Counts that make no row: ignored members, duplicate keys.
        actors: Number and kind of embedder actors.
        batch_size: Smallest batch size that was in use; smaller than asked after memory ran out.
        failed_shards: Shards that could not be read, with the reason; they are not committed.
        objects: What became of everything that was listed.
        set_aside: What is not read: by reason, how many objects, and the URIs of the first.
        failed_objects: The first objects that could not be listed or read, with the reason.
        newest_image_s: Time of the newest source behind the live rows, in seconds since 1970.
        timeline: Rows written by then, at some moments: (seconds since the first shard was sent,
            rows).
    """

    run_id: str
    output: str
    space_id: str
    settings: Mapping[str, Any]
    started_s: float
    seconds: float
    embed_seconds: float
    startup_seconds: float
    images: ImageCounts
    shards: Mapping[str, int]
    rows: Mapping[str, int]
    images_per_s: float
    encoded_bytes: int
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    efficiency: Efficiency | None = None
    notes: Mapping[str, int] = field(default_factory=dict)
    actors: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 0
    failed_shards: Mapping[str, str] = field(default_factory=dict)
    objects: ObjectCounts = field(default_factory=ObjectCounts)
    set_aside: Mapping[str, SetAside] = field(default_factory=dict)
    failed_objects: Mapping[str, str] = field(default_factory=dict)
    newest_image_s: float | None = None
    timeline: Sequence[tuple[float, int]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return describe_job("embed") | asdict(self)


def describe_carried(notes: Mapping[str, int], *, shards: int) -> Iterator[str]:
    """Yield a line for each carried column or sidecar that was not found where it should be.

    Args:
        notes: The readers' counts over this run.
        shards: Shards that this run embedded.
    """
    for note, number in notes.items():
        if note.startswith("without "):
            yield f"carry: {number} of {shards} shards are {note}"
    if lone := notes.get("sidecars_without_image"):
        yield (
            f"carry: {lone} sidecars have no image before their archive goes on to another; "
            "pack every sidecar right beside its image"
        )
    if odd := notes.get("sidecars_not_utf8"):
        yield f"carry: {odd} sidecars are not UTF-8; their other bytes are written as \\xff"


class Counters:
    """Running totals of a run, fed by receipts."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.encoded_bytes = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.notes: Counter[str] = Counter()
        self.batch_size = 0
        self.timeline: list[tuple[float, int]] = []
        self._mark_every_s = 0.0

    def mark(self, seconds: float) -> None:
        """Note how far the run is; the notes stay few, and evenly spread, however long it goes."""
        line = self.timeline
        if len(line) > 1 and seconds - line[-2][0] < self._mark_every_s:
            line.pop()
        line.append((round(seconds, 2), self.rows))
        if len(line) > _MAX_MARKS:
            del line[1:-1:2]
            self._mark_every_s = 2 * (line[-1][0] - line[0][0]) / _MAX_MARKS

    @property
    def rows(self) -> int:
        """Rows written so far."""
        return sum(self.statuses.values())

    @property
    def failures(self) -> int:
        """Rows without an embedding so far."""
        return self.rows - self.statuses["ok"]

    def check_limit(self, count: int | None, share: float | None, *, final: bool = False) -> None:
        """Stop a run gone wrong.

        Args:
            count: Most failures allowed.
            share: Largest share of failures allowed; judged from 1,000 rows on, or at the end.
            final: True when no more rows will come.

        Raises:
            TooManyFailuresError: There are more failures than that.
        """
        too_many = count is not None and self.failures > count
        if share is not None and (final or self.rows >= _MIN_ROWS_FOR_SHARE):
            too_many = too_many or self.failures > share * self.rows
        if too_many:
            reasons = ", ".join(f"{n} {s}" for s, n in self.statuses.items() if s != "ok")
            raise TooManyFailuresError(
                f"{self.failures} of {self.rows} images failed ({reasons}), more than "
                "--max-failures allows; committed shards stay. Look at the rows' error column, "
                "then run again, with a higher limit if the failures are to be expected"
            )


class ProgressLine:
    """Shows how far a run is: a live bar on a terminal, a log line now and then otherwise."""

    def __init__(self, total_bytes: int, bar: Progress | None) -> None:
        self._bar = bar
        self._total_bytes = max(1, total_bytes)
        self._logged_s = 0.0
        self._task = bar.add_task("embedding", total=self._total_bytes, rate="") if bar else None

    def update(self, *, images: int, failures: int, done_bytes: int, seconds: float) -> None:
        """Show the totals so far, and the rate since the first image, ``seconds`` ago."""
        rate = images / max(1e-9, seconds)
        if self._bar is not None and self._task is not None:
            text = f"{images:,} images  {rate:,.1f}/s" + (f"  {failures:,} failed" * bool(failures))
            self._bar.update(self._task, completed=done_bytes, rate=text)
        elif seconds - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = seconds
            left_s = seconds * (self._total_bytes / max(1, done_bytes) - 1)
            LOG.info(
                "progress images=%d failed=%d images_per_s=%.1f done=%.1f%% eta_s=%.0f",
                images,
                failures,
                rate,
                100 * done_bytes / self._total_bytes,
                left_s,
            )


@contextmanager
def show_progress(total_bytes: int) -> Iterator[ProgressLine]:
    """Show progress on standard error until the block is left."""
    if not sys.stderr.isatty():
        yield ProgressLine(total_bytes, None)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        yield ProgressLine(total_bytes, bar)
