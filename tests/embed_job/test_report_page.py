"""The run report as a page: what it shows, and that hostile names stay text."""

import base64
import json
import re
from pathlib import Path

import pytest
from pictures import make_jpeg, write_loose
from runs import make_config

from pipeline.embed_job.report import EmbedReport, ImageCounts
from pipeline.embed_job.report_page import (
    _STAGES,
    FailureSample,
    IndexSection,
    ShownImage,
    render_report,
)
from pipeline.embed_job.run import embed


def make_report(**changes: object) -> dict[str, object]:
    values = {
        "run_id": "20260101-000000-abcdef",
        "output": "s3://bucket/out",
        "space_id": "0" * 16,
        "settings": {"model": "fbnetv3_b.ra2_in1k"},
        "started_s": 1.7e9,
        "seconds": 75.0,
        "embed_seconds": 60.0,
        "startup_seconds": 15.0,
        "images": ImageCounts(106, 90, {"truncated": 10}, 5, 1),
        "shards": {"embedded": 2, "carried_over": 1, "restored": 0, "removed": 1},
        "rows": {"ok": 95, "truncated": 10},
        "images_per_s": 1.7,
        "encoded_bytes": 10**6,
        "stage_seconds": {"decode": 3.0, "forward": 7.0},
        "timeline": [(1.0, 10), (2.0, 60), (4.0, 100)],
    }
    return EmbedReport(**values | changes).to_dict()


def test_the_page_tells_what_went_in_and_out() -> None:
    page = render_report(make_report())
    for text in ("Run 20260101-000000-abcdef", "s3://bucket/out", "truncated", "10.00%", "70%"):
        assert text in page
    assert "1 min 15 s" in page


def test_one_thing_has_one_number() -> None:
    page = render_report(make_report())
    table = page[page.index("In and out") : page.index("</table>")]
    rows = re.findall(r"<tr><td>([^<]*)</td><td[^>]*>[^<]*</td><td[^>]*>([^<]*)</td></tr>", table)
    numbers = dict(rows)
    assert numbers["embedded by this run"] == "90"  # as the card above says
    assert numbers["failed in this run, rows with a reason"] == "10"


def test_every_stage_has_a_colour_of_its_own() -> None:
    stages = dict.fromkeys([*_STAGES, "something new"], 1.0)
    page = render_report(make_report(stage_seconds=stages))
    used = re.findall(r'<i class="(c\d+)"></i>', page)
    assert len(used) == len(set(used)) == len(stages)
    colours = dict(re.findall(r"\.(c\d+) \{ background: (\S+);", page))
    assert len({colours[name] for name in used}) == len(stages)


def test_names_and_reasons_stay_text() -> None:
    hostile = "<script>alert(1)</script>"
    sample = FailureSample(hostile, "unreadable", hostile, None, "00 01")
    page = render_report(make_report(output=hostile), failures=[sample])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_page_draws_the_recall_curve_the_neighbours_and_the_map() -> None:
    picture = "data:image/jpeg;base64," + base64.b64encode(make_jpeg(1)).decode()
    shown = ShownImage("a.jpg", picture, score=0.75, x=10, y=20)
    section = IndexSection(
        generation="000001-abc",
        kind="rabitq",
        rows=1000,
        recall=0.963,
        curve=[(0.4, 0.91, False), (0.8, 0.963, True)],
        neighbours=[[shown, shown]],
        map=[shown],
    )
    page = render_report(make_report(), index=section)
    for text in ("000001-abc", "0.963", "0.91", "0.750", "Map of the collection"):
        assert text in page


def test_a_page_needs_nothing_from_elsewhere() -> None:
    page = render_report(make_report())
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_writes_its_report_with_the_failed_pictures(tmp_path: Path, weights: Path) -> None:
    whole = make_jpeg(3)
    write_loose(tmp_path / "in", {"good.jpg": whole, "cut.jpg": whole[: len(whole) // 2]})
    report = embed(make_config(tmp_path / "in", tmp_path / "out", weights))
    base = tmp_path / "out" / "runs" / report.run_id
    assert json.loads(base.with_suffix(".json").read_text())["images"]["failed"] == {"truncated": 1}
    page = base.with_suffix(".html").read_text()
    assert base64.b64encode(whole[: len(whole) // 2]).decode() in page
