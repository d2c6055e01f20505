"""The dry run: it says what a run would take, and writes nothing."""

from pathlib import Path

import pytest
from pictures import make_jpeg, write_loose, write_tar
from runs import make_config

from pipeline.embed_job.dry_run import DryRunReport
from pipeline.embed_job.run import embed

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_a_dry_run_estimates_images_and_hours_and_writes_nothing(
    tmp_path: Path, weights: Path
) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "a.tar", [(f"{i}.jpg", make_jpeg(i)) for i in range(40)])
    write_loose(tmp_path / "in", {f"loose/{i}.jpg": make_jpeg(i) for i in range(10)})
    report = embed(make_config(tmp_path / "in", tmp_path / "out", weights, dry_run=True))
    assert isinstance(report, DryRunReport)
    assert report.shards["embed"] == 2
    assert 40 <= report.images <= 60
    assert report.images_per_s > 0
    assert report.hours > 0
    assert report.gpu_hours == 0
    assert not (tmp_path / "out").exists()


def test_a_dry_run_over_unchanged_input_has_nothing_to_estimate(
    tmp_path: Path, weights: Path
) -> None:
    write_loose(tmp_path / "in", {"a.jpg": make_jpeg(1)})
    config = make_config(tmp_path / "in", tmp_path / "out", weights)
    embed(config)
    report = embed(make_config(tmp_path / "in", tmp_path / "out", weights, dry_run=True))
    assert isinstance(report, DryRunReport)
    assert (report.shards["embed"], report.shards["carried_over"]) == (0, 1)
    assert (report.images, report.hours) == (0, 0)
