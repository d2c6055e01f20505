"""Ways to write an input besides a folder: patterns, lists, keys with empty parts."""

from pathlib import Path

import pytest
from pictures import make_jpeg, write_loose, write_tar
from s3.servers import S3Server

from pipeline.embed_job.plan import plan_shards
from pipeline.errors import NoShardsError
from pipeline.input.listing import Listing, list_sources
from pipeline.input.reader import ReadOptions, read_chunks
from pipeline.records import Commit, Layout
from pipeline.storage import Storage

JPEG = make_jpeg()
LAYOUT = Layout(chunk_images=8, chunk_bytes=1 << 20)


def list_input(text: Path | str, storage: Storage | None = None) -> Listing:
    return list_sources([str(text)], "auto", storage or Storage())


def kinds_of(listing: Listing) -> dict[str, str]:
    return {source.name: source.kind for source in listing.sources}


def write_tars(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        write_tar(folder / name, [("x.jpg", JPEG)])


def test_wildcards_and_braces_name_shards_as_their_folder_would(tmp_path: Path):
    write_tars(tmp_path, *(f"{i:03}.tar" for i in range(4)), "other.tar")
    folder = list_input(tmp_path)
    expected = [source.info for source in folder.sources if source.name != "other.tar"]
    for pattern in ("[0-9]*.tar", "{000..003}.tar", "00{0..1}.tar"):
        listing = list_input(tmp_path / pattern)
        number = 2 if pattern.startswith("00") else 4
        assert [source.info for source in listing.sources] == expected[:number]
        assert kinds_of(listing) == {f"{i:03}.tar": "tar" for i in range(number)}
        assert listing.listed == number


def test_a_pattern_that_finds_less_than_it_names_says_so(tmp_path: Path):
    write_tars(tmp_path, "000.tar")
    with pytest.raises(NoShardsError, match=r"no image shards under '.*/\*\.parquet'"):
        list_input(tmp_path / "*.parquet")
    with pytest.raises(NoShardsError, match=r"there is no '.*/001\.tar', which"):
        list_input(tmp_path / "{000..001}.tar")


def test_a_name_that_is_there_is_no_pattern(tmp_path: Path):
    write_loose(tmp_path, {"*.jpg": JPEG, "a.jpg": JPEG, "{a,b}/[1].jpg": JPEG, "1.jpg": JPEG})
    assert kinds_of(list_input(tmp_path / "*.jpg")) == {"*.jpg": "image"}
    assert kinds_of(list_input(tmp_path / "{a,b}")) == {"[1].jpg": "image"}


def test_a_shard_that_a_pattern_finds_no_more_is_removed_and_others_stay(tmp_path: Path):
    write_tars(tmp_path, "0.tar", "1.tar", "x.tar")

    def plan(text: str, commits: dict) -> tuple[set[str], set[str]]:
        found = plan_shards(
            list_input(tmp_path / text), space_id="s", layout=LAYOUT, commits=commits, retired={}
        )
        return {s.name for s in found.embed}, {c.name for c in found.removed}

    shards = plan_shards(
        list_input(tmp_path / "[0-9].tar"), space_id="s", layout=LAYOUT, commits={}, retired={}
    ).embed
    commits = {
        s.id: Commit(s.id, s.kind, s.source, s.root, s.name, s.version, s.size_bytes, "s", ())
        for s in shards
    }
    assert plan("[0-9].tar", commits) == (set(), set())
    assert plan("*.tar", commits) == ({"x.tar"}, set())
    (tmp_path / "1.tar").unlink()
    assert plan("[0-9].tar", commits) == (set(), {"1.tar"})
    assert plan("x.tar", commits) == ({"x.tar"}, set())


def test_a_list_names_shards_and_images_relative_to_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_tars(tmp_path / "data", "0.tar", "1.tgz")
    write_loose(tmp_path / "data", {"a.jpg": JPEG, "odd": JPEG})
    (tmp_path / "data" / "shards.txt").write_text(f"0.tar\n./1.tgz\n{tmp_path}/data/a.jpg\nodd\n")
    monkeypatch.chdir(tmp_path)
    listing = list_input("data/shards.txt")
    base = str(tmp_path / "data").lstrip("/")
    kinds = {"0.tar": "tar", "1.tgz": "tar", "a.jpg": "image", "odd": "image"}
    assert kinds_of(listing) == {f"{base}/{name}": kind for name, kind in kinds.items()}
    assert listing.failed == ()
    plan = plan_shards(listing, space_id="s", layout=LAYOUT, commits={}, retired={})
    assert len(plan.embed) == 3  # two archives, one bundle


def test_keys_with_empty_parts_are_objects_of_their_own(s3_server: S3Server, tmp_path: Path):
    storage = s3_server.storage()
    write_tars(tmp_path, "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    uri = s3_server.make_bucket()
    for key in ("a.tar", "/a.tar", "b//c.tar"):
        storage.put(f"{uri}/{key}", data)
    listing = list_input(uri, storage)
    assert {source.name for source in listing.sources} == {"a.tar", "/a.tar", "b//c.tar"}
    shards = plan_shards(listing, space_id="s", layout=LAYOUT, commits={}, retired={}).embed
    keys = {
        record.key: record.data
        for shard in shards
        for chunk in read_chunks(shard, storage=storage, options=ReadOptions())
        for record in chunk.records
    }
    assert keys == {f"{name}/x.jpg": JPEG for name in ("a.tar", "/a.tar", "b//c.tar")}
    (one,) = list_input(f"{uri}/b//c.tar", storage).sources
    assert one.info.uri == f"{uri}/b//c.tar"
    assert kinds_of(list_input(f"{uri}/**/*.tar", storage)) == kinds_of(listing)
