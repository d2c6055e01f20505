"""The nightly job: embed, index, report; one at a time."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import make_jpeg, write_loose
from runs import make_config, read_rows

from pipeline import SearchIndex
from pipeline.cli import parse_settings
from pipeline.config import IndexConfig, NightlyConfig, NightlyOptions
from pipeline.embed_job.lease import Lease
from pipeline.errors import (
    AbortError,
    CorruptionError,
    IncompleteError,
    LeaseError,
    SettingsError,
)
from pipeline.index.job import build_index
from pipeline.nightly import place_on_page, run_nightly
from pipeline.output.commits import list_commits
from pipeline.storage import Storage


@pytest.fixture
def night(tmp_path: Path, weights: Path) -> NightlyConfig:
    write_loose(tmp_path / "in", {f"{i}.jpg": make_jpeg(i) for i in range(6)})
    return NightlyConfig(
        embed=make_config(tmp_path / "in", tmp_path / "out", weights),
        index=IndexConfig(index=str(tmp_path / "index"), cache_dir=str(tmp_path / "cache")),
        nightly=NightlyOptions(),
    )


@pytest.mark.usefixtures("ray_cluster")
def test_nights_follow_the_input(night: NightlyConfig, tmp_path: Path) -> None:
    first = run_nightly(night)
    assert (first.embed.images.embedded, first.freshness.indexed_rows) == (6, 6)

    write_loose(tmp_path / "in", {"new.jpg": make_jpeg(7)})
    (tmp_path / "in" / "0.jpg").unlink()
    metrics = tmp_path / "textfile" / "nightly.prom"
    config = replace(night, nightly=NightlyOptions(metrics_file=str(metrics)))
    config = replace(config, index=replace(config.index, max_row_drop=0.5))
    second = run_nightly(config)
    assert second.freshness.indexed_rows == 6
    assert second.freshness.generation != first.freshness.generation
    index = SearchIndex.open(night.index.index)
    assert {n.key for n in index.neighbours_of("new.jpg", 10)} == {f"{i}.jpg" for i in range(1, 6)}

    latest = json.loads((tmp_path / "out" / "runs" / "latest.json").read_text())
    assert latest["freshness"]["rows"] == {"ok": 6}
    assert "image_embedding_indexed_rows 6\n" in metrics.read_text()
    assert 'image_embedding_rows{status="ok"} 6\n' in metrics.read_text()


@pytest.mark.usefixtures("ray_cluster")
def test_a_night_indexes_what_it_could_read_and_fails_for_the_rest(
    night: NightlyConfig, tmp_path: Path
) -> None:
    metrics = tmp_path / "nightly.prom"
    night = replace(night, nightly=NightlyOptions(metrics_file=metrics))
    dead = tmp_path / "in" / "dead.jpg"
    dead.symlink_to("nowhere")
    with pytest.raises(IncompleteError, match=r"1 objects could not be read.*dead\.jpg") as told:
        run_nightly(night)
    assert told.value.exit_code == 1
    assert told.value.report.freshness.indexed_rows == 6
    assert (tmp_path / "out" / "runs" / "latest.json").exists()
    assert "last_success" not in metrics.read_text()
    dead.unlink()
    assert run_nightly(night).freshness.indexed_rows == 6
    good = read_last_success(metrics)
    with pytest.raises(AbortError, match="hours old"):
        run_nightly(replace(night, nightly=replace(night.nightly, max_age_hours=1e-9)))
    assert read_last_success(metrics) == good
    assert "image_embedding_indexed_rows 6\n" in metrics.read_text()


def read_last_success(metrics: Path) -> str:
    [line] = [
        line for line in metrics.read_text().splitlines()
        if line.startswith("image_embedding_last_success_timestamp_seconds ")
    ]  # fmt: skip
    return line


@pytest.mark.usefixtures("ray_cluster")
def test_a_night_tries_failed_images_again_once(night: NightlyConfig, tmp_path: Path) -> None:
    write_loose(tmp_path / "in", {"cut.jpg": make_jpeg(9)[:300]})
    embedded = [run_nightly(night).embed.shards["embedded"] for _ in range(3)]
    assert embedded == [1, 1, 0]
    assert len(list_commits(night.embed.output, Storage())) == 1
    assert read_rows(night.embed.output)["cut.jpg"]["status"] != "ok"


def test_a_night_does_not_overlap_itself(night: NightlyConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    lease = Lease(night.embed.output, "last-night", storage=Storage(), name="nightly.json")
    with lease, pytest.raises(LeaseError, match=r"last-night .* is writing there now"):
        run_nightly(night)


def test_the_index_is_built_from_the_night_s_own_embeddings(night: NightlyConfig) -> None:
    elsewhere = replace(night, index=replace(night.index, embeddings="/elsewhere"))
    with pytest.raises(SettingsError, match="leave --embeddings out"):
        run_nightly(elsewhere)


def test_the_report_draws_the_map_the_page_s_way_up_and_cuts_no_picture() -> None:
    left_low, right_high = place_on_page(np.array([[0, 0], [1, 1]], np.float32))
    assert left_low[0] < right_high[0]
    assert left_low[1] > right_high[1]  # y points down in a drawing, up on the page
    for x, y in (left_low, right_high):
        assert 17 <= x <= 1000 - 17
        assert 17 <= y <= 700 - 17


@pytest.mark.usefixtures("ray_cluster")
def test_stale_input_fails_the_night_after_publishing(night: NightlyConfig) -> None:
    config = replace(night, nightly=NightlyOptions(max_age_hours=1e-9))
    with pytest.raises(AbortError, match=r"newest image indexed is .* hours old"):
        run_nightly(config)
    assert SearchIndex.open(night.index.index).info.rows == 6


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_night_shows_but_does_not_need_never_fails_it(
    night: NightlyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pipeline.nightly.render_report", fail)
    (tmp_path / "nightly.prom").mkdir()  # no file can be written there
    options = NightlyOptions(metrics_file=str(tmp_path / "nightly.prom"))
    report = run_nightly(replace(night, nightly=options))
    assert report.freshness.indexed_rows == 6
    latest = json.loads((tmp_path / "out" / "runs" / "latest.json").read_text())
    assert latest["freshness"]["indexed_rows"] == 6
    for what in ("the metrics file", "the page"):
        assert f"the night goes on without {what}: " in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_what_is_said_of_a_damaged_part_makes_the_night_whole(
    night: NightlyConfig, tmp_path: Path
) -> None:
    run_nightly(night)
    for how in ("lost", "cut"):
        [commit] = list_commits(night.embed.output, Storage()).values()
        part = tmp_path / "out" / commit.parts[0].path
        part.unlink() if how == "lost" else part.write_bytes(part.read_bytes()[:-50])
        config = replace(night.index, index=str(tmp_path / how), embeddings=night.embed.output)
        with pytest.raises(CorruptionError) as caught:
            build_index(config)
        said = re.search(r"; delete (\S+) and run the embed job again", str(caught.value))
        assert said is not None
        Path(said[1]).unlink()
        assert run_nightly(night).freshness.indexed_rows == 6
        assert build_index(config).rows == 6


def test_one_toml_holds_the_settings_of_all(tmp_path: Path) -> None:
    path = tmp_path / "nightly.toml"
    path.write_text(
        '[embed]\ninput = ["s3://b/in"]\noutput = "s3://b/out"\nmodel = "resnetv2_50.a1h_in1k"\n'
        '[embed.storage]\nrequester_pays = true\n[index]\nindex = "s3://b/index"\n'
        "[nightly]\nmax_age_hours = 36\n"
    )
    config = parse_settings(NightlyConfig, ["--config", str(path), "--kind", "flat"])
    assert config.embed.input == ("s3://b/in",)
    assert config.embed.storage.requester_pays
    assert (config.index.index, config.index.kind) == ("s3://b/index", "flat")
    assert config.nightly.max_age_hours == 36


def test_an_unknown_table_is_refused_naming_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "nightly.toml"
    path.write_text("[embde]\n")
    with pytest.raises(SettingsError, match=r"unknown table 'embde' .*did you mean embed\?"):
        parse_settings(NightlyConfig, ["--config", str(path)])
