"""Types of carried columns over several files, as other writers leave them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import make_jpeg, make_shard, write_parquet, write_tar

from pipeline.errors import SettingsError
from pipeline.input.container import ReadOptions
from pipeline.input.footers import find_carried_schema
from pipeline.records import Shard
from pipeline.storage import Storage


def write_shards(folder: Path, *columns: dict[str, pa.Array]) -> list[Shard]:
    image = [make_jpeg(0)]
    paths = [
        write_parquet(folder / f"{i}.parquet", image, **values) for i, values in enumerate(columns)
    ]
    return [make_shard(path) for path in paths]


def find(shards: list[Shard], *carry: str, check_names: bool = False) -> list[pa.DataType]:
    options = ReadOptions(carry=carry)
    return find_carried_schema(
        shards, storage=Storage(), options=options, check_names=check_names
    ).types


def test_types_are_united_over_all_files(tmp_path: Path):
    shards = write_shards(
        tmp_path,
        {"score": pa.array([1]), "caption": pa.nulls(1), "day": pa.array([1], pa.date32())},
        {"score": pa.array([0.5]), "caption": pa.array(["a"]), "day": pa.array([1], pa.date32())},
        {"day": pa.array([1], pa.timestamp("us"))},
    )
    expected = [pa.float64(), pa.string(), pa.timestamp("us")]
    assert find(shards, "score", "caption", "day", check_names=True) == expected


def test_types_that_nothing_holds_together_are_those_of_the_first_file(tmp_path: Path):
    shards = write_shards(tmp_path, {"id": pa.array([1])}, {"id": pa.array(["x"])})
    assert find(shards, "id") == [pa.int64()]


def test_files_without_images_and_damaged_ones_have_no_say(tmp_path: Path):
    (shard,) = write_shards(tmp_path, {"n": pa.array([1], pa.int8())})
    pq.write_table(pa.table({"n": ["text"], "url": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no footer")
    others = [make_shard(tmp_path / f"{name}.parquet") for name in "ab"]
    assert find([*others, shard], "n", check_names=True) == [pa.int8()]


def test_a_name_that_no_file_has_is_refused_with_the_nearest(tmp_path: Path):
    shards = write_shards(tmp_path, {"caption": pa.array(["a"])}, {"label": pa.array(["b"])})
    words = (
        r"carry names 'captoin', which no Parquet .* did you mean 'caption'\?; their columns are"
    )
    with pytest.raises(SettingsError, match=words):
        find(shards, "captoin", check_names=True)
    assert find(shards, "captoin") == [pa.null()]


def test_an_archive_may_have_any_sidecar_and_sidecars_are_text(tmp_path: Path):
    shards = write_shards(tmp_path, {"n": pa.array([1])})
    shards.append(make_shard(write_tar(tmp_path / "a.tar", [("a.jpg", make_jpeg(0))])))
    assert find(shards, "n", "txt", check_names=True) == [pa.int64(), pa.string()]
