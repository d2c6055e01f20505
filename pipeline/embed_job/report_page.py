"""The run report as one self-contained HTML page."""

import base64
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import PipelineError
from pipeline.input.reader import read_record_bytes
from pipeline.records import Commit
from pipeline.storage import Storage, join_uri

MAX_FAILURES_SHOWN = 24
_MAX_PICTURE_BYTES = 200_000
_MAGIC = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG": "image/png",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
}
_STAGES = ("list", "read", "decode", "transform", "transfer", "forward", "write", "wait", "idle")


@dataclass(frozen=True, slots=True)
class FailureSample:
    """One failed image, as far as it can be shown.

    Attributes:
        key: Its key.
        status: Its status.
        reason: Why.
        picture: The encoded image as a data URI, for the browser to show what it can; or None.
        first_bytes: The first bytes in hexadecimal where there is no picture.
    """

    key: str
    status: str
    reason: str
    picture: str | None
    first_bytes: str


@dataclass(frozen=True, slots=True)
class ShownImage:
    """A picture on the page: a neighbour with its score, or a point of the map.

    Attributes:
        key: Its key.
        picture: Thumbnail as a data URI, or None.
        score: Cosine to the query.
        x: Place on the map, 0 to 1000.
        y: Place on the map, 0 to 700.
    """

    key: str
    picture: str | None
    score: float = 0.0
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True, slots=True)
class IndexSection:
    """The index section of the page: kind, recall, neighbours, map.

    Attributes:
        generation: Its name.
        kind: How it is searched.
        rows: Its rows.
        recall: Recall@10 on held-out queries; None where search is exact.
        curve: Points of latency in milliseconds, recall@10, and whether it was chosen.
        neighbours: Some images, each followed by its neighbours.
        map: A sample of the collection in two dimensions.
    """

    generation: str
    kind: str
    rows: int
    recall: float | None
    curve: Sequence[tuple[float, float, bool]] = ()
    neighbours: Sequence[Sequence[ShownImage]] = ()
    map: Sequence[ShownImage] = ()


def render_report(
    report: Mapping[str, Any],
    *,
    failures: Sequence[FailureSample] = (),
    index: IndexSection | None = None,
) -> str:
    """Return the page of a run.

    Args:
        report: ``EmbedReport.to_dict()``.
        failures: Some of the failed images.
        index: What became of the index, where the run had one.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.embed_job", "pages"),
        autoescape=True,
        trim_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        failed=sum(report["images"]["failed"].values()),
        live=sum(report["rows"].values()),
        started=time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(report["started_s"])),
        throughput=_draw_throughput(report.get("timeline", ())),
        stages=_share_stages(report["stage_seconds"]),
        failures=failures,
        index=None if index is None else _draw_index(index),
        raw=json.dumps(report, indent=2, ensure_ascii=False),
        duration=_format_duration,
    )


def sample_failures(
    output: str, commits: Sequence[Commit], storage: Storage
) -> list[FailureSample]:
    """Return some of the failed rows of ``commits``, with their bytes where they can be had."""
    found: list[FailureSample] = []
    for row in _iterate_failures(output, commits, storage):
        found.append(_show_failure(row, storage))
        if len(found) == MAX_FAILURES_SHOWN:
            break
    return found


def _iterate_failures(
    output: str, commits: Sequence[Commit], storage: Storage
) -> Iterator[dict[str, Any]]:
    columns = ["key", "shard", "row", "status", "error", "offset", "nbytes", "sha256"]
    for commit in commits:
        for part in commit.parts:
            if set(part.statuses) - {"ok"}:
                with storage.open_random(join_uri(output, part.path)) as file:
                    table = pq.read_table(file, columns=columns)
                yield from table.filter(pc.not_equal(table.column("status"), "ok")).to_pylist()


def _show_failure(row: Mapping[str, Any], storage: Storage) -> FailureSample:
    data = b""
    if 0 < row["nbytes"] <= _MAX_PICTURE_BYTES:
        try:
            data = read_record_bytes(
                row["shard"],
                offset=row["offset"],
                nbytes=row["nbytes"],
                row=row["row"],
                sha256=row["sha256"],
                storage=storage,
            )
        except PipelineError:
            data = b""  # the page shows the reason all the same
    kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    return FailureSample(
        key=row["key"],
        status=row["status"],
        reason=row["error"] or "",
        picture=None if kind is None else encode_picture(data, kind),
        first_bytes=data[:96].hex(" "),
    )


def encode_picture(data: bytes, kind: str = "image/jpeg") -> str:
    """Return an encoded image as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _share_stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    total = sum(seconds.values())
    known = [name for name in _STAGES if seconds.get(name, 0) > 0]
    other = sorted(set(seconds) - set(_STAGES))
    return [
        {"name": name, "seconds": seconds[name], "share": seconds[name] / total}
        for name in known + other
        if total > 0
    ]


def _draw_throughput(timeline: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Return a line of images per second over time from (seconds, images so far)."""
    if len(timeline) < 3 or timeline[-1][0] <= 0:
        return None
    seconds = timeline[-1][0]
    edges = np.linspace(0, seconds, min(60, len(timeline)) + 1)
    times, images = [0.0, *(t for t, _ in timeline)], [0.0, *(n for _, n in timeline)]
    rates = np.diff(np.interp(edges, times, images)) / np.diff(edges)
    peak = float(np.max(rates)) or 1.0
    points = " ".join(
        f"{50 + 930 * middle / seconds:.1f},{190 - 170 * rate / peak:.1f}"
        for middle, rate in zip((edges[1:] + edges[:-1]) / 2, rates, strict=True)
    )
    return {"peak": peak, "seconds": seconds, "points": points}


def _draw_index(index: IndexSection) -> dict[str, Any]:
    values = asdict(index) | {"curve": None}
    if len(index.curve) > 1:
        curve = sorted(index.curve)
        low = max(0.0, min(recall for _, recall, _ in curve) - 0.02)
        span = max(1e-9, curve[-1][0] - curve[0][0])
        dots = [
            {
                "x": round(60 + 920 * (latency - curve[0][0]) / span, 1),
                "y": round(220 - 200 * (recall - low) / max(1e-9, 1 - low), 1),
                "chosen": chosen,
                "label": f"{recall:.3f} at {latency:.2f} ms",
            }
            for latency, recall, chosen in curve
        ]
        values["curve"] = {
            "low": low,
            "first_ms": curve[0][0],
            "last_ms": curve[-1][0],
            "points": " ".join(f"{dot['x']},{dot['y']}" for dot in dots),
            "dots": dots,
        }
    return values


def _format_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
