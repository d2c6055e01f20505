"""Carried columns over files and nights whose types drift, as pandas and DuckDB write them."""

from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from pictures import make_jpeg, write_parquet, write_tar
from runs import make_config, read_rows

from pipeline.embed_job.report import EmbedReport
from pipeline.embed_job.run import embed
from pipeline.errors import SettingsError, StorageError
from pipeline.output.info import read_output_info
from pipeline.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")


def write_night(folder: Path, name: str, **columns: list[Any] | pa.Array) -> None:
    folder.mkdir(exist_ok=True)
    arrays = {key: pa.array(values) for key, values in columns.items()}
    images = [make_jpeg(i) for i in range(len(next(iter(arrays.values()))))]
    write_parquet(folder / f"{name}.parquet", images, **arrays)


def test_types_that_drift_between_files_are_united_and_every_value_is_kept(
    tmp_path: Path, weights: Path
):
    source = tmp_path / "in"
    write_night(source, "a", score=[3, None], day=[date(2026, 1, 1), None])
    write_night(source, "b", score=[0.97, 1e300], day=[datetime(2026, 1, 2, 13, 45)] * 2)
    config = make_config(source, tmp_path / "out", weights, carry=("score", "day"))
    embed(config)
    found = {(row["score"], row["day"]) for row in read_rows(config.output).values()}
    query = f"select score, day from read_parquet('{source}/*.parquet', union_by_name=true)"
    assert found == set(duckdb.sql(query).fetchall())
    assert embed(replace(config, verify=True)).problems == ()


@pytest.mark.slow
def test_a_column_of_nulls_takes_the_type_of_the_first_night_that_has_values(
    tmp_path: Path, weights: Path
):
    source = tmp_path / "in"
    config = make_config(source, tmp_path / "out", weights, carry=("caption", "score"))
    write_night(source, "a", caption=pa.nulls(2), score=pa.nulls(2))
    embed(config)
    assert read_output_info(config.output, Storage()).carried.types == [pa.null()] * 2
    write_night(source, "b", caption=["x", None], score=pa.nulls(2))
    embed(config)
    write_night(source, "c", caption=["y"], score=[0.5])
    embed(config)
    kinds = read_output_info(config.output, Storage()).carried.types
    assert kinds == [pa.string(), pa.float64()]
    rows = {key: (row["caption"], row["score"]) for key, row in read_rows(config.output).items()}
    assert rows == {
        "a.parquet/0": (None, None),
        "a.parquet/1": (None, None),
        "b.parquet/0": ("x", None),
        "b.parquet/1": (None, None),
        "c.parquet/0": ("y", 0.5),
    }
    assert embed(replace(config, verify=True)).problems == ()


@pytest.mark.slow
def test_a_file_that_does_not_fit_is_refused_by_name_and_all_others_are_done(
    tmp_path: Path, weights: Path
):
    source = tmp_path / "in"
    config = make_config(source, tmp_path / "out", weights, carry=("n",))
    write_night(source, "a", n=[1])
    embed(config)
    write_night(source, "b", n=[0.97])
    write_night(source, "c", n=[2.0])
    with pytest.raises(StorageError, match=r"1 objects .*b\.parquet.* 0\.97") as told:
        embed(config)
    report = told.value.report
    assert isinstance(report, EmbedReport)
    (reason,) = report.failed_shards.values()
    assert "write it there as the output has it, or give it one type" in reason
    assert "or leave it out of --carry" in reason
    rows = read_rows(config.output)
    assert {key: row["n"] for key, row in rows.items()} == {"a.parquet/0": 1, "c.parquet/0": 2}
    # each remedy
    embed(replace(config, output=str(tmp_path / "out2")))
    assert sorted(row["n"] for row in read_rows(tmp_path / "out2").values()) == [0.97, 1.0, 2.0]
    embed(replace(config, output=str(tmp_path / "out3"), carry=()))
    assert len(read_rows(tmp_path / "out3")) == 3
    write_night(source, "b", n=[97])
    embed(config)
    assert sorted(row["n"] for row in read_rows(config.output).values()) == [1, 2, 97]


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_misspelt_column_is_an_error_before_anything_runs(
    tmp_path: Path, weights: Path, dry_run: bool
):
    write_night(tmp_path / "in", "a", caption=["x"])
    config = make_config(
        tmp_path / "in", tmp_path / "out", weights, carry=("captoin",), dry_run=dry_run
    )
    with pytest.raises(SettingsError, match=r"'captoin'.* did you mean 'caption'"):
        embed(config)
    assert not (tmp_path / "out").exists()


def test_sidecars_that_were_not_found_are_said_in_a_line_and_the_remedy_carries_them(
    tmp_path: Path, weights: Path, caplog: pytest.LogCaptureFixture
):
    images = [(f"{i}.jpg", make_jpeg(i)) for i in range(2)]
    texts = [(f"{i}.txt", b"text") for i in range(2)]
    source = tmp_path / "in"
    source.mkdir()
    write_tar(source / "a.tar", [*images, *texts])
    config = make_config(source, tmp_path / "out", weights, carry=("txt", "txd"))
    embed(config)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == [
        "carry: 1 of 1 shards are without 'txt'",
        "carry: 1 of 1 shards are without 'txd'",
        "carry: 2 sidecars have no image before their archive goes on to another; "
        "pack every sidecar right beside its image",
    ]
    write_tar(source / "a.tar", sorted([*images, *texts]))
    embed(config)
    assert {row["txt"] for row in read_rows(config.output).values()} == {"text"}
