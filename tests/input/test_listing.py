"""What is read of an input, what is left out and why: nothing without a word."""

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from datasets.data_files import resolve_pattern
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import make_jpeg, write_loose, write_parquet, write_tar
from PIL import Image
from s3.faulty_proxy import Fault

from pipeline.config import StorageOptions
from pipeline.errors import CorruptionError, CredentialsError, NoShardsError, StorageError
from pipeline.input.kinds import HEAD_BYTES, SET_ASIDE, SUFFIXES, is_hidden, recognise
from pipeline.input.listing import MAX_NAMES, Listing, list_sources
from pipeline.storage import Storage

JPEG = make_jpeg()


def list_folder(folder: Path, kind: str = "auto") -> Listing:
    return list_sources([str(folder)], kind, Storage())


def names_of(listing: Listing) -> set[str]:
    return {source.name for source in listing.sources}


def reasons_of(listing: Listing) -> dict[str, set[str]]:
    root = listing.roots[0]
    return {
        reason: {name.removeprefix(f"{root}/") for name in aside.names}
        for reason, aside in listing.aside.items()
    }


def test_a_camera_card_gives_its_photographs_and_names_the_rest(tmp_path: Path) -> None:
    images = {
        *("DCIM/_DSC0002.JPG", "DCIM/_MG_0003.JPG", "DCIM/__github.jpg", "DCIM/a.MPO"),
        *("DCIM/b.HEIC", "DCIM/c.jxl", "DCIM/noext", "DCIM/d.jpg_large", "DCIM/photo.jpg~"),
        *("DCIM/web.jpg?w=200", "_private/e.jpg", "x.img"),
    }
    hidden = {
        *("__MACOSX/._a.jpg", "__MACOSX/a.jpg", "DCIM/.thumbnails/1.jpg", ".Trash-1000/b.jpg"),
        *("@eaDir/c.jpg/SYNOPHOTO_THUMB_XL.jpg", "._d.jpg", ".DS_Store", "_temporary/0/e.jpg"),
        *("$RECYCLE.BIN/f.jpg", "#recycle/g.jpg"),
    }
    write_loose(tmp_path, dict.fromkeys([*images, *hidden], JPEG))
    write_loose(tmp_path, {"RAW.NEF": b"II*\0", "LICENSE": b"text", "_SUCCESS": b"", "i.json": b""})
    os.mkfifo(tmp_path / "pipe.jpg")
    listing = list_folder(tmp_path)
    assert names_of(listing) == images
    assert reasons_of(listing) == {
        "hidden": hidden,
        "camera raw": {"RAW.NEF"},
        "not an image": {"LICENSE"},
        "empty": {"_SUCCESS"},
        "text or metadata": {"i.json"},
        "not a file": {"pipe.jpg"},
    }
    assert listing.listed == len(images) + len(hidden) + 5


def test_no_name_that_one_gives_a_photograph_in_its_folder_hides_it_but_a_dot(
    tmp_path: Path,
) -> None:
    for name in ("_x.jpg", "__x.jpg", "x_.jpg", "@x.jpg", "#x.jpg", "~x.jpg", "x.jpg~", "$x.jpg"):
        write_loose(tmp_path, {name: JPEG})
        assert names_of(list_folder(tmp_path)) == {name}
        (tmp_path / name).rename(tmp_path / ".x.jpg")
        with pytest.raises(NoShardsError, match=r"1 hidden\); to read what is hidden, give the"):
            list_folder(tmp_path)
        (tmp_path / ".x.jpg").unlink()


def test_what_is_hidden_is_read_where_the_input_names_it(tmp_path: Path) -> None:
    write_loose(tmp_path, {".cache/a.jpg": JPEG, ".cache/.b/c.jpg": JPEG})
    listing = list_folder(tmp_path / ".cache")
    assert names_of(listing) == {"a.jpg"}
    assert names_of(list_folder(tmp_path / ".cache" / ".b" / "c.jpg")) == {"c.jpg"}
    write_loose(tmp_path, {"d.jpg": JPEG})
    both = list_sources([str(tmp_path), str(tmp_path / ".cache" / ".b")], "auto", Storage())
    assert names_of(both) == {"d.jpg", "c.jpg"}
    assert (both.listed, both.ignored) == (3, 1)


parts = st.sampled_from([*("a", "_b", "__c", ".d", "e=1", "_f=2", "g.h"), "_temporary", ".."])
leaves = st.sampled_from(["x.jpg", "_x.jpg", "__x.png", ".x.jpg", "_SUCCESS", "..x.gif", "x."])
tables = st.sampled_from(["x.parquet", "_x.parquet", ".x.parquet", "_metadata", "__x.pq"])
trees = st.lists(st.tuples(st.lists(parts, max_size=3), leaves | tables), min_size=1, max_size=8)


def write_tree(folder: Path, tree: list[tuple[list[str], str]]) -> set[str]:
    names = {"/".join([*(p for p in folders if p != ".."), leaf]) for folders, leaf in tree}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPEG if "parquet" not in name and "pq" not in name else b"")
    return names


@settings(max_examples=60, deadline=None)
@given(trees)
def test_hidden_is_what_hugging_face_and_arrow_pass_over(tmp_path_factory, tree) -> None:
    folder = tmp_path_factory.mktemp("tree")
    names = write_tree(folder, tree)
    files = [f"{folder}/{name}" for name in names]
    try:
        shown = set(resolve_pattern("**", str(folder)))
    except FileNotFoundError:
        shown = set()
    expected = {uri for uri in files if uri in shown and "/_temporary/" not in uri}
    seen = {f"{folder}/{name}" for name in names if not is_hidden(name)}
    assert seen == expected
    arrow = ds.dataset(str(folder), schema=pa.schema([("x", pa.int8())]), format="parquet").files
    tables = {uri for uri in files if uri.endswith((".parquet", ".pq"))}
    seen = {uri for uri in tables if not is_hidden(uri[len(str(folder)) + 1 :], parquet=True)}
    assert seen == tables.intersection(arrow)


names = st.text(
    st.sampled_from("ab_.~@# ?=é雪") | st.characters(codec="utf-8", exclude_characters="/\0"),
    min_size=1,
    max_size=12,
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 60)
suffixes = st.sampled_from(
    ["", *sum(SUFFIXES.values(), ()), *(each[0] for each in SET_ASIDE.values()), ".jpg_large", ".?"]
)
contents = st.sampled_from([b"", b"x", JPEG, b"PAR1", bytes(600)])
paths = st.tuples(st.lists(names, max_size=2), names, suffixes, contents)


@settings(max_examples=60, deadline=None)
@given(st.lists(paths, min_size=1, max_size=12), st.sampled_from(["auto", "images", "tar"]))
def test_the_accounting_closes_over_any_tree_of_names(tmp_path_factory, tree, kind) -> None:
    folder = tmp_path_factory.mktemp("tree")
    for folders, name, suffix, data in tree:
        path = folder.joinpath(*folders, f"{name}{suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError:  # a file where a folder should be
            continue
    write_loose(folder, {"certain.jpg": JPEG, "certain.tar": b""})
    (folder / "dead.jpg").symlink_to("nowhere")
    listing = list_folder(folder, kind)
    on_disk = {str(path) for path in folder.rglob("*") if not path.is_dir()}
    told = [source.info.uri for source in listing.sources]
    told += [uri for aside in listing.aside.values() for uri in aside.names]
    told += [entry.uri for entry in listing.failed]
    assert sorted(told) == sorted(on_disk)
    assert listing.listed == len(on_disk)
    assert f"{folder}/dead.jpg" in {entry.uri for entry in listing.failed}


def test_a_listing_that_does_not_add_up_is_an_error() -> None:
    with pytest.raises(CorruptionError, match="2 objects were listed, 0 are accounted for"):
        Listing(("/in",), (), listed=2)


def test_no_more_than_some_names_are_kept_of_what_is_set_aside(tmp_path: Path) -> None:
    write_loose(tmp_path, {f"{i:03}.json": b"" for i in range(99)} | {"a.jpg": JPEG})
    aside = list_folder(tmp_path).aside["text or metadata"]
    assert (aside.count, len(aside.names)) == (99, MAX_NAMES)


def test_no_suffix_says_two_things() -> None:
    known = [*sum(SUFFIXES.values(), ()), *sum(SET_ASIDE.values(), ())]
    assert len(known) == len(set(known))
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in known)


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "DDS", "MPO"]
)
def test_images_that_pillow_writes_are_known_by_their_first_bytes(kind: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (40, 30)).save(data, kind)
    assert recognise(data.getvalue()[:HEAD_BYTES]) == "image"


def test_archives_and_tables_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "a.tar", [("a.jpg", JPEG)], kind=form)
        assert recognise(path.read_bytes()[:HEAD_BYTES]) == "tar"
    path = write_parquet(tmp_path / "a.parquet", [JPEG])
    assert recognise(path.read_bytes()[:HEAD_BYTES]) == "parquet"
    for data in (b"", b"BMW is a car, not a bitmap", b"P1 of 3", b"<html>", bytes(512)):
        assert recognise(data) is None


def test_shards_without_a_suffix_are_found_by_their_content(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", JPEG)]).rename(tmp_path / "a")
    write_parquet(tmp_path / "b.parquet", [JPEG]).rename(tmp_path / "b")
    write_parquet(tmp_path / "c.parquet", [JPEG]).rename(tmp_path / "_c")
    listing = list_folder(tmp_path)
    assert {source.name: source.kind for source in listing.sources} == {"a": "tar", "b": "parquet"}
    assert reasons_of(listing) == {"hidden": {"_c"}}


def test_first_bytes_are_read_only_where_the_name_does_not_tell_and_not_every_night(
    s3_bucket, s3_server, faulty_s3
) -> None:
    storage = Storage(StorageOptions(endpoint_url=faulty_s3.endpoint_url))
    for name, data in {"a.jpg": JPEG, "b": JPEG, "c": b"text", "d.json": b"{}"}.items():
        s3_server.storage().put(f"{s3_bucket}/in/{name}", data)
    listing = list_sources([f"{s3_bucket}/in"], "auto", storage)
    assert names_of(listing) == {"a.jpg", "b"}
    read = {seen.key.rpartition("/")[2] for seen in faulty_s3.seen if seen.method == "GET"}
    assert read & {"a.jpg", "b", "c", "d.json"} == {"b", "c"}
    faulty_s3.clear()
    known = frozenset((source.info.uri, source.info.version) for source in listing.sources)
    again = list_sources([f"{s3_bucket}/in"], "auto", storage, known=lambda: known)
    assert again == listing
    assert faulty_s3.count("GET", "*/in/b") == 0
    faulty_s3.inject(Fault("denied", method="GET", key="*/in/c", times=None))
    refused = list_sources([f"{s3_bucket}/in"], "auto", storage)
    assert [entry.uri for entry in refused.failed] == [f"{s3_bucket}/in/c"]
    faulty_s3.inject(Fault("expired", method="GET", key="*/in/b", times=None))
    with pytest.raises(CredentialsError):
        list_sources([f"{s3_bucket}/in"], "auto", storage)


def test_a_source_whose_keys_another_could_have_fails_by_name(s3_bucket, s3_server) -> None:
    storage = s3_server.storage()
    for name in ("s.tar", "s.tar/t.tar", "s.tar/1.jpg", "s.tarx/1.jpg", "a/s.tar"):
        storage.put(f"{s3_bucket}/in/{name}", b"x")
    listing = list_sources([f"{s3_bucket}/in"], "auto", storage)
    assert names_of(listing) == {"s.tar", "s.tarx/1.jpg", "a/s.tar"}
    failed = {entry.uri: entry.reason for entry in listing.failed}
    assert set(failed) == {f"{s3_bucket}/in/s.tar/t.tar", f"{s3_bucket}/in/s.tar/1.jpg"}
    assert "could be those of " + f"{s3_bucket}/in/s.tar, whose name" in failed.popitem()[1]


def test_of_what_cannot_be_looked_at_only_what_might_be_read_has_failed(tmp_path: Path) -> None:
    failed = {"a.jpg", "b.tar.gz", "c.parquet", "d", "e.unknown", "f.tar.lz4"}
    aside = {".g.jpg", "h.json", "i.txt", "j.gz", "_k.parquet", "__MACOSX/l.jpg"}
    write_loose(tmp_path, {"m.jpg": JPEG, "__MACOSX/n": b""})
    for name in failed | aside:
        (tmp_path / name).symlink_to("nowhere")
    listing = list_folder(tmp_path)
    assert {entry.uri for entry in listing.failed} == {f"{tmp_path}/{name}" for name in failed}
    assert set().union(*reasons_of(listing).values()) == aside | {"__MACOSX/n"}


def test_an_input_of_which_nothing_can_be_read_is_the_runs_fault(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("nowhere")
    with pytest.raises(StorageError, match=r"nothing under .* 1 objects fail, the first: .*a\.jpg"):
        list_folder(tmp_path)
