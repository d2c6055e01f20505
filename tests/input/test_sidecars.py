"""Sidecars and their images, in every order that programs write them."""

import posixpath
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import make_jpeg, make_shard, write_tar

from pipeline.errors import ShardError
from pipeline.input.container import ReadOptions
from pipeline.input.reader import read_chunks
from pipeline.records import Record
from pipeline.storage import Storage

IMAGE = make_jpeg(0)


def read(
    folder: Path, names: Sequence[str], carry: Sequence[str] = ("txt",), **options: object
) -> tuple[list[Record], dict[str, int]]:
    """Read an archive of these members; a sidecar's text is its name."""
    members = [(name, IMAGE if name.endswith(".jpg") else name.encode()) for name in names]
    shard = make_shard(write_tar(folder / "a.tar", members))
    read_options = ReadOptions(carry=tuple(carry), **options)
    chunks = list(read_chunks(shard, storage=Storage(), options=read_options))
    return [record for chunk in chunks for record in chunk.records], dict(chunks[-1].notes)


def carried(records: Sequence[Record], column: str = "txt") -> dict[str, str | None]:
    return {record.key.removeprefix("a.tar/"): record.carried[column] for record in records}


def test_sidecars_before_their_pictures_are_carried_however_far_and_later_ones_counted(
    tmp_path: Path,
):
    names = ["0.jpg", "1.txt", "2.txt", "1.jpg", "0.txt", "2.jpg", "2.cls"]
    records, notes = read(tmp_path, names)
    assert carried(records) == {"0.jpg": None, "1.jpg": "1.txt", "2.jpg": "2.txt"}
    assert notes == {"sidecars_without_image": 1}


def test_pictures_first_and_all_texts_after_them_is_counted_and_said(tmp_path: Path):
    records, notes = read(tmp_path, ["0.jpg", "1.jpg", "0.txt", "1.txt"])
    assert carried(records) == {"0.jpg": None, "1.jpg": None}
    assert notes == {"sidecars_without_image": 2, "missing_columns": 1, "without 'txt'": 1}


def test_names_with_dots_find_their_own_sidecar_first_then_that_of_their_sample(tmp_path: Path):
    names = [
        *("IMG.2024.01.jpg", "IMG.2024.01.txt", "IMG.2024.02.jpg", "IMG.2024.02.txt"),
        *("x/a.left.jpg", "x/a.right.jpg", "x/a.right.txt", "x/a.txt"),
    ]
    records, notes = read(tmp_path, names)
    assert carried(records) == {
        "IMG.2024.01.jpg": "IMG.2024.01.txt",
        "IMG.2024.02.jpg": "IMG.2024.02.txt",
        "x/a.left.jpg": "x/a.txt",
        "x/a.right.jpg": "x/a.right.txt",
    }
    assert notes == {}


def test_a_name_may_be_a_long_extension_and_its_case_does_not_matter(tmp_path: Path):
    records, notes = read(tmp_path, ["a.jpg", "a.meta.JSON", "a.TXT"], ("meta.json", "Txt"))
    assert [dict(record.carried) for record in records] == [
        {"meta.json": "a.meta.JSON", "Txt": "a.TXT"}
    ]
    assert notes == {}


def test_a_misspelt_sidecar_is_counted_with_the_nearest_that_is_there(tmp_path: Path):
    records, notes = read(tmp_path, ["a.jpg", "a.json", "b.caption"], ("jsn", "captoin", "zz"))
    assert [set(record.carried.values()) for record in records] == [{None}]
    assert notes == {
        "ignored_members": 1,
        "missing_columns": 3,
        "without 'captoin'; did you mean 'caption'?": 1,
        "without 'jsn'; did you mean 'json'?": 1,
        "without 'zz'": 1,
    }


def test_a_sidecar_for_a_column_of_numbers_fails_its_shard_by_name(tmp_path: Path):
    schema = pa.schema([("cls", pa.int64())])
    with pytest.raises(ShardError, match=r"column 'cls' of .*a\.tar .* the output's is int64"):
        read(tmp_path, ["a.jpg", "a.cls"], ("cls",), carried=schema)
    records, _ = read(tmp_path, ["a.jpg"], ("cls",), carried=schema)
    assert records[0].carried == {"cls": None}


NAMES = st.sampled_from(
    [f"{base}.{rest}" for base in "abc" for rest in ("jpg", "x.jpg", "txt", "x.txt", "json")]
)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, unique=True, max_size=10), room=st.sampled_from([1, 1 << 20]))
def test_every_sidecar_is_carried_or_counted_and_only_its_own_images_have_it(
    names: list[str], room: int, tmp_path_factory: pytest.TempPathFactory
):
    records, notes = read(tmp_path_factory.mktemp("tar"), names, ("txt", "json"), chunk_images=room)
    images = [name for name in names if name.endswith(".jpg")]
    assert [record.key.removeprefix("a.tar/") for record in records] == images
    used = {text for record in records for text in record.carried.values() if text}
    sidecars = {name for name in names if name not in images}
    assert len(used) + notes.get("sidecars_without_image", 0) == len(sidecars)
    for column in ("txt", "json"):
        for image, text in carried(records, column).items():
            assert text in (None, *list_owners(image, column))
            before = [name for name in names[: names.index(image)] if name in sidecars]
            best = [name for name in list_owners(image, column) if name in before]
            assert text is not None or used.issuperset(best)  # by an image before this one


def list_owners(image: str, column: str) -> list[str]:
    """Return the sidecars that an image may have, the nearest first."""
    base = posixpath.basename(image).partition(".")[0]
    return list(dict.fromkeys([image.removesuffix("jpg") + column, f"{base}.{column}"]))
