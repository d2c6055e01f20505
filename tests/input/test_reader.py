import hashlib
import io
import json
import subprocess
import tarfile
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import (
    TAR_MODES,
    make_bundle,
    make_jpeg,
    make_shard,
    mutate,
    write_loose,
    write_parquet,
    write_tar,
)
from s3.faulty_proxy import Fault, FaultyProxy
from s3.servers import S3Server

from pipeline.config import StorageOptions
from pipeline.errors import (
    CredentialsError,
    ObjectChangedError,
    ObjectMissingError,
    RecordError,
    SettingsError,
    ShardError,
    StorageError,
    UnreachableError,
)
from pipeline.input.container import is_fault_of_data
from pipeline.input.footers import find_carried_schema
from pipeline.input.reader import ReadOptions, read_chunks, read_record_bytes
from pipeline.records import Chunk, Record, Shard
from pipeline.storage import Storage

STORAGE = Storage()
IMAGES = [make_jpeg(seed) for seed in range(12)]
NAMES = [f"train/{i:04}.jpg" for i in range(12)]
MEMBERS = list(zip(NAMES, IMAGES, strict=True))


def read_all(
    shard: Shard, storage: Storage = STORAGE, **options: object
) -> tuple[list[Record], dict[str, int]]:
    chunks = list(read_chunks(shard, storage=storage, options=ReadOptions(**options)))
    check_chunks(chunks, shard)
    return [record for chunk in chunks for record in chunk.records], dict(chunks[-1].notes)


def check_chunks(chunks: Sequence[Chunk], shard: Shard) -> None:
    """Check what holds for every shard, whatever its state."""
    records = [record for chunk in chunks for record in chunk.records]
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {chunk.shard_id for chunk in chunks} == {shard.id}
    assert all(chunk.records for chunk in chunks[:-1])
    assert [record.row for record in records] == list(range(len(records)))
    assert len({record.key for record in records}) == len(records)
    assert all((record.error is None) == (record.status == "ok") for record in records)
    assert all(record.key.encode() for record in records)  # valid Unicode


def keys_of(records: Sequence[Record]) -> list[str]:
    return [record.key for record in records]


@pytest.mark.parametrize("suffix", [*TAR_MODES, ".tar.zst"])
def test_an_archive_gives_its_images_in_order_whatever_its_compression(
    tmp_path: Path, suffix: str
) -> None:
    shard = make_shard(write_tar(tmp_path / f"a{suffix}", MEMBERS))
    records, notes = read_all(shard, chunk_images=5)
    assert keys_of(records) == [f"a{suffix}/{name}" for name in NAMES]
    assert [record.data for record in records] == IMAGES
    assert {record.shard for record in records} == {shard.source}
    assert notes == {}


def test_a_misnamed_archive_is_read_by_what_it_is(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", MEMBERS).rename(tmp_path / "a.tar")
    assert [record.data for record in read_all(make_shard(path))[0]] == IMAGES


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_find_the_images_of_a_plain_archive(tmp_path: Path, kind: int) -> None:
    members = [(f"{'long folder/' * 9}ä {i}.jpg", data) for i, data in enumerate(IMAGES)]
    path = write_tar(tmp_path / "a.tar", members, kind=kind)
    records, _ = read_all(make_shard(path))
    assert keys_of(records) == [f"a.tar/{name}" for name, _ in members]
    content = path.read_bytes()
    for record, data in zip(records, IMAGES, strict=True):
        assert record.offset is not None
        assert content[record.offset : record.offset + len(data)] == data == record.data


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_frames_as_parallel_compressors_write_them_are_read(tmp_path: Path, codec: str) -> None:
    """``pzstd`` writes skippable frames and many of data; ``cat`` of two archives joins frames."""
    content = write_tar(tmp_path / "plain.tar", MEMBERS).read_bytes()
    half = len(content) // 2
    frames = [_compress(codec, part) for part in (content[:half], content[half:])]
    notes = b"\x5a\x2a\x4d\x18\x04\0\0\0abcd" if codec == "zstd" else b""
    path = tmp_path / f"a.tar.{codec}"
    path.write_bytes(b"".join(notes + frame for frame in frames))
    records, _ = read_all(make_shard(path))
    assert [record.data for record in records] == IMAGES
    assert {record.offset for record in records} == {None}
    path.write_bytes(path.read_bytes()[: -len(frames[1]) // 2])
    *kept, last = read_all(make_shard(path))[0]
    assert last.status == "bad_shard"
    assert [record.data for record in kept if record.status == "ok"] == IMAGES[: len(kept) - 1]


def _compress(codec: str, data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def test_compressed_archives_have_no_offsets(tmp_path: Path) -> None:
    records, _ = read_all(make_shard(write_tar(tmp_path / "a.tgz", MEMBERS)))
    assert {record.offset for record in records} == {None}


def test_sidecars_are_carried_from_both_sides_of_their_image(tmp_path: Path) -> None:
    members = [
        ("x/a.txt", b"a caption"),
        ("x/a.jpg", IMAGES[0]),
        ("x/a.cls", b"7"),
        ("x/b.left.jpg", IMAGES[1]),
        ("x/b.right.png", IMAGES[2]),
        ("x/b.json", json.dumps({"é": 1}, ensure_ascii=False).encode()),
        ("y/b.jpg", IMAGES[3]),
        ("y/c.txt", b"caf\xe9"),
        ("y/c.webp", IMAGES[4]),
    ]
    shard = make_shard(write_tar(tmp_path / "a.tar", members))
    records, notes = read_all(shard, carry=("txt", "json", "cls", "never"), chunk_images=2)
    assert [tuple(record.carried.values()) for record in records] == [
        ("a caption", None, "7", None),
        (None, '{"é": 1}', None, None),
        (None, '{"é": 1}', None, None),
        (None, None, None, None),
        ("caf\\xe9", None, None, None),
    ]
    assert notes == {"missing_columns": 1, "without 'never'": 1, "sidecars_not_utf8": 1}
    assert [dict(record.carried) for record in read_all(shard)[0]] == [{}] * 5


def test_a_sample_larger_than_a_chunk_does_not_fill_the_memory(tmp_path: Path) -> None:
    members = [*((f"a.{i}.jpg", data) for i, data in enumerate(IMAGES)), ("a.txt", b"late")]
    shard = make_shard(write_tar(tmp_path / "a.tar", members))
    records, _ = read_all(shard, carry=("txt",), chunk_images=4)
    assert [record.carried["txt"] for record in records] == [None] * 8 + ["late"] * 4


def test_oversized_sidecars_are_counted_instead_of_carried(tmp_path: Path) -> None:
    shard = make_shard(write_tar(tmp_path / "a.tar", [("a.txt", bytes(9000)), MEMBERS[0]]))
    records, notes = read_all(shard, carry=("txt",), max_image_bytes=8000)
    assert [record.carried["txt"] for record in records] == [None]
    assert notes == {"oversized_sidecars": 1, "missing_columns": 1, "without 'txt'": 1}


def test_what_is_no_image_is_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for kind, name in [(tarfile.DIRTYPE, "x"), (tarfile.SYMTYPE, "x/link.jpg")]:
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
        names = ["x/._a.jpg", "x/a.jpg", "x/a.json", "x/a.npy", "x/notes.md", "x/raw", "x/A.JPG"]
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(IMAGES[0])
            archive.addfile(info, io.BytesIO(IMAGES[0]))
    records, notes = read_all(make_shard(path))
    assert keys_of(records) == ["a.tar/x/a.jpg", "a.tar/x/raw", "a.tar/x/A.JPG"]
    assert notes == {"ignored_members": 3, "hidden_members": 1}


def test_members_whose_names_do_not_tell_are_images_by_their_content(tmp_path: Path) -> None:
    images = ["0.img", "1.jpg_large", "2.jpg~", "3.web.jpg?w=200", "4.HEIC", "5.MPO"]
    others = {"6.img": b"no image", "7.npy": IMAGES[0], "8.json": IMAGES[0], "9.img": b""}
    members = [*((name, IMAGES[i]) for i, name in enumerate(images)), *others.items()]
    for suffix in (".tar", ".tar.gz"):
        records, notes = read_all(make_shard(write_tar(tmp_path / f"a{suffix}", members)))
        assert keys_of(records) == [f"a{suffix}/{name}" for name in images]
        assert [record.data for record in records] == IMAGES[: len(images)]
        assert notes == {"ignored_members": 3}
    big = [("a.img", IMAGES[0] + bytes(20_000)), ("b.img", IMAGES[1])]
    shard = make_shard(write_tar(tmp_path / "big.tar", big))
    records, _ = read_all(shard, max_image_bytes=10_000)
    assert [record.status for record in records] == ["too_large", "ok"]


def test_hidden_members_are_counted_and_not_read(tmp_path: Path) -> None:
    hidden = ["._a.jpg", "x/.thumbnails/b.jpg", "__MACOSX/c.jpg", "x/@eaDir/d.jpg", ".e.jpg"]
    shown = ["./_DSC1.jpg", "_x/f.jpg", "__g.jpg"]
    members = [(name, IMAGES[0]) for name in [*hidden, *shown]]
    records, notes = read_all(make_shard(write_tar(tmp_path / "a.tar", members)))
    assert keys_of(records) == [f"a.tar/{name}" for name in shown]
    assert notes == {"hidden_members": 5}


def write_linked(folder: Path, *options: str, suffix: str = ".tar") -> Path:
    """Let GNU tar write an archive of six images with hard links between them."""
    source = folder / "source"
    write_loose(source, {f"{i}.jpg": IMAGES[i] for i in range(6)} | {"blob.bin": IMAGES[6]})
    order = [f"{i}.jpg" for i in range(6)] + ["blob.bin"]
    links = {"a.jpg": "4.jpg", "b.jpg": "0.jpg", "c.jpg": "4.jpg", "d.txt": "1.jpg"}
    for name, target in links.items():
        (source / name).hardlink_to(source / target)
        order.append(name)
    (source / "e.jpg").hardlink_to(source / "blob.bin")
    path = folder / f"linked{suffix}"
    names = [*order, "e.jpg"]
    subprocess.run(["tar", "-C", source, "-caf", path, *options, *names], check=True)
    return path


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".tar.zst"])
@pytest.mark.parametrize("kind", ["gnu", "pax", "ustar"])
def test_hard_links_are_images_of_their_own(tmp_path: Path, suffix: str, kind: str) -> None:
    path = write_linked(tmp_path, f"--format={kind}", suffix=suffix)
    listed = subprocess.run(["tar", "-tvf", path], check=True, capture_output=True, text=True)
    assert listed.stdout.count(" link to ") == 5
    records, notes = read_all(make_shard(path), chunk_images=4)
    data = {record.key.partition("/")[2]: record.data for record in records}
    expected = {f"{i}.jpg": IMAGES[i] for i in range(6)}
    expected |= {"a.jpg": IMAGES[4], "b.jpg": IMAGES[0], "c.jpg": IMAGES[4], "e.jpg": IMAGES[6]}
    assert data == expected
    assert notes == {"ignored_members": 1}  # blob.bin; d.txt is no image, by its name
    assert all((record.offset is None) == (suffix != ".tar") for record in records)
    check_single_reads(records)


def test_hard_links_read_alike_from_an_s3_server(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    storage = s3_server.storage()
    for suffix in (".tar", ".tar.gz"):
        path = write_linked(tmp_path / suffix, suffix=suffix)
        storage.upload(path, f"{s3_bucket}/linked{suffix}")
        remote, _ = read_all(make_shard(f"{s3_bucket}/linked{suffix}", storage), storage)
        local, _ = read_all(make_shard(path))
        assert len(remote) == 10
        assert [record.data for record in remote] == [record.data for record in local]


def test_a_hard_link_without_its_target_says_what_to_do_and_the_remedy_works(
    tmp_path: Path,
) -> None:
    source = write_loose(tmp_path / "in", {"a.jpg": IMAGES[0]})
    (source / "b.jpg").hardlink_to(source / "a.jpg")
    both, only = tmp_path / "both.tar", tmp_path / "only.tar"
    subprocess.run(["tar", "-C", source, "-cf", both, "a.jpg", "b.jpg"], check=True)
    subprocess.run(["tar", "-f", both, "--delete", "a.jpg"], check=True)
    (record,), _ = read_all(make_shard(both))
    assert record.status == "unsupported"
    assert "a hard link to 'a.jpg', which is not before it; repack" in (record.error or "")
    command = ["tar", "-C", source, "--hard-dereference", "-cf", only, "a.jpg", "b.jpg"]
    subprocess.run(command, check=True)
    assert [record.data for record in read_all(make_shard(only))[0]] == [IMAGES[0]] * 2


def test_a_compressed_archive_is_read_again_for_links_a_bounded_number_of_times(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for i in range(40):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = len(IMAGES[0])
            archive.addfile(info, io.BytesIO(IMAGES[0]))
        for i in reversed(range(40)):  # each of them leads further back
            info = tarfile.TarInfo(f"link{i}.jpg")
            info.type, info.linkname = tarfile.LNKTYPE, f"{i}.jpg"
            archive.addfile(info)
    records, _ = read_all(make_shard(path))
    statuses = [record.status for record in records]
    assert statuses == ["ok"] * 56 + ["unsupported"] * 24
    assert "leads too far back in a compressed archive" in (records[-1].error or "")


def test_odd_names_become_stable_keys(tmp_path: Path) -> None:
    names = ["a b.jpg", "über/日本.jpg", "v1.2/x.y.z.jpeg", "./dot.png", "caf\udce9.jpg", "#.jpg"]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "a.tar", [(name, IMAGES[0]) for name in names], kind=kind)
        records, _ = read_all(make_shard(path))
        expected = [name.replace("\udce9", "\\xe9") for name in names]
        assert keys_of(records) == [f"a.tar/{name}" for name in expected]


def test_names_that_repeat_get_numbers_that_collide_with_nothing(tmp_path: Path) -> None:
    names = ["a.jpg", "a.jpg", "a.jpg#2", "b.jpg", "a.jpg", "a"]
    members = [(name, IMAGES[0]) for name in ["a.jpg", "a.jpg", "b.jpg", "a.jpg"]]
    records, notes = read_all(make_shard(write_tar(tmp_path / "a.tar", members)))
    assert keys_of(records) == ["a.tar/a.jpg", "a.tar/a.jpg#2", "a.tar/b.jpg", "a.tar/a.jpg#3"]
    assert notes == {"duplicate_keys": 2}
    path = write_parquet(tmp_path / "a.parquet", IMAGES[:6], name=pa.array(names))
    records, notes = read_all(make_shard(path), key_column="name")
    assert [key.removeprefix("a.parquet/") for key in keys_of(records)] == [
        *("a.jpg", "a.jpg#2", "a.jpg#2#2", "b.jpg", "a.jpg#3", "a"),
    ]
    assert notes == {"duplicate_keys": 3}


def test_an_image_over_the_limit_is_not_read(tmp_path: Path) -> None:
    members = [("big.jpg", bytes(32 << 20)), MEMBERS[0]]
    shard = make_shard(write_tar(tmp_path / "a.tar", members))
    tracemalloc.start()
    records, _ = read_all(shard, max_image_bytes=1 << 20)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [record.status for record in records] == ["too_large", "ok"]
    assert records[0].data == b""
    assert records[0].error == (
        "the encoded image has 33,554,432 bytes; max_image_bytes is 1,048,576"
    )
    assert peak_bytes < 8 << 20


def test_a_sparse_member_is_unsupported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS[:2])
    content = bytearray(path.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(content[:512]), "utf-8", "strict")
    header.pax_headers = {"GNU.sparse.size": "9", "GNU.sparse.map": "0,1", "path": header.name}
    sparse = header.tobuf(tarfile.PAX_FORMAT) + content[512:]
    path.write_bytes(sparse)
    records, _ = read_all(make_shard(path))
    assert [record.status for record in records] == ["unsupported", "ok"]
    assert "sparse" in (records[0].error or "")


def test_an_archive_cut_anywhere_keeps_the_images_before_the_cut(tmp_path: Path) -> None:
    content = write_tar(tmp_path / "a.tar", MEMBERS[:4]).read_bytes()
    end_marker = content.rindex(IMAGES[3]) + len(IMAGES[3]) // 512 * 512 + 512
    path = tmp_path / "cut.tar"
    rng = np.random.default_rng(0)
    for cut in [*range(0, end_marker, 512), *rng.integers(0, end_marker, 40)]:
        path.write_bytes(content[:cut])
        *records, last = read_all(make_shard(path))[0]
        assert (last.key, last.status) == ("cut.tar", "bad_shard")
        assert "too early" in (last.error or "")
        assert [record.status for record in records[:-1]] == ["ok"] * len(records[:-1])
        for record, data in zip(records, IMAGES, strict=False):
            assert record.status in ("ok", "truncated")
            assert record.data == (data if record.status == "ok" else b"")


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2", ".tar.xz"])
def test_a_cut_compressed_archive_keeps_the_images_before_the_cut(
    tmp_path: Path, suffix: str
) -> None:
    noise = [np.random.default_rng(i).bytes(300_000) for i in range(8)]
    members = [(f"{i}.jpg", data) for i, data in enumerate(noise)]
    path = write_tar(tmp_path / f"a{suffix}", members)
    content = path.read_bytes()
    for share in (0.01, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        *records, last = read_all(make_shard(path))[0]
        assert last.status == "bad_shard"
        assert "damaged compression" in (last.error or "")
        for record, data in zip(records, noise, strict=False):
            assert record.status == "truncated" or record.data == data


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"])
def test_mutated_compressed_archives_never_stop_the_reader(tmp_path: Path, suffix: str) -> None:
    path = write_tar(tmp_path / f"a{suffix}", MEMBERS[:4])
    content = path.read_bytes()
    rng = np.random.default_rng(2)
    for _ in range(60):
        path.write_bytes(mutate(content, rng))
        read_all(make_shard(path))


def test_a_wrong_checksum_is_seen_at_the_end_of_a_gzip_archive(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", MEMBERS)
    content = path.read_bytes()
    path.write_bytes(content[:-8] + b"\0\1\2\3" + content[-4:])
    *records, last = read_all(make_shard(path))[0]
    assert [record.data for record in records] == IMAGES
    assert last.status == "bad_shard"
    assert "CRC check failed" in (last.error or "")


@pytest.mark.parametrize("content", [b"", b"<html>no such key</html>", bytes(range(256)) * 40])
def test_what_is_no_archive_at_all_is_one_bad_shard(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    records, _ = read_all(make_shard(path), carry=("txt",))
    assert [(r.key, r.status, dict(r.carried)) for r in records] == [
        ("a.tar", "bad_shard", {"txt": None})
    ]
    assert "at byte" in (records[0].error or "")


def test_archives_joined_into_one_are_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    path.write_bytes(path.read_bytes() * 2)
    *records, last = read_all(make_shard(path))[0]
    assert len(records) == len(MEMBERS)
    assert last.status == "bad_shard"
    assert "several archives in one" in (last.error or "")


def test_mutated_archives_never_stop_the_reader(tmp_path: Path) -> None:
    content = write_tar(tmp_path / "a.tar", [*MEMBERS[:3], ("n" * 150, IMAGES[0])]).read_bytes()
    pax = write_tar(tmp_path / "b.tar", [("ä" * 90, IMAGES[0])], kind=tarfile.PAX_FORMAT)
    path = tmp_path / "m.tar"
    rng = np.random.default_rng(1)
    for original in (content, pax.read_bytes()[:2048], content[:600]):
        for _ in range(120):
            path.write_bytes(mutate(original, rng))
            records, _ = read_all(make_shard(path), carry=("txt",), chunk_images=2)
            assert sum(record.status == "bad_shard" for record in records) <= 1


def test_an_archive_without_images_is_one_empty_last_chunk(tmp_path: Path) -> None:
    shard = make_shard(write_tar(tmp_path / "a.tar", []))
    (chunk,) = read_chunks(shard, storage=STORAGE, options=ReadOptions())
    assert (list(chunk.records), chunk.index, chunk.last) == ([], 0, True)
    records, notes = read_all(make_shard(write_tar(tmp_path / "b.tar", [("a.csv", b"1")])))
    assert (records, notes) == ([], {"ignored_members": 1})


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9])
def test_chunks_are_cut_by_number_of_images(tmp_path: Path, count: int) -> None:
    shard = make_shard(write_tar(tmp_path / "a.tar", MEMBERS[:count]))
    chunks = list(read_chunks(shard, storage=STORAGE, options=ReadOptions(chunk_images=4)))
    check_chunks(chunks, shard)
    sizes = [len(chunk.records) for chunk in chunks]
    assert sizes == {1: [1], 4: [4], 5: [4, 1], 8: [4, 4], 9: [4, 4, 1]}[count]


def test_chunks_are_cut_by_bytes_and_a_large_image_is_a_chunk_alone(tmp_path: Path) -> None:
    sizes = [400, 500, 200, 5000, 10, 990, 1]
    members = [(f"{i}.jpg", bytes(size)) for i, size in enumerate(sizes)]
    shard = make_shard(write_tar(tmp_path / "a.tar", members))
    options = ReadOptions(chunk_bytes=1000)
    for _ in range(2):  # the same every time
        chunks = read_chunks(shard, storage=STORAGE, options=options)
        found = [[len(record.data) for record in chunk.records] for chunk in chunks]
        assert found == [[400, 500], [200], [5000], [10, 990], [1]]


def test_reading_holds_a_chunk_not_the_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ((f"{i}.jpg", bytes(100_000)) for i in range(600)))
    bundle = make_bundle(
        write_loose(tmp_path / "loose", {f"{i}.jpg": bytes(100_000) for i in range(300)})
    )
    for shard in (make_shard(path), bundle):
        tracemalloc.start()
        for _ in read_chunks(shard, storage=STORAGE, options=ReadOptions(chunk_bytes=2 << 20)):
            pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 10 << 20


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_rows_become_records(tmp_path: Path, struct: bool) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES, struct=struct, row_group_size=5)
    records, notes = read_all(make_shard(path), chunk_images=4)
    assert keys_of(records) == [f"a.parquet/{row}" for row in range(12)]
    assert [record.data for record in records] == IMAGES
    assert {record.offset for record in records} == {None}
    assert notes == {}


@pytest.mark.parametrize("struct", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        pa.large_binary(),
        pa.binary_view(),
        pa.binary(len(IMAGES[0]) + 500),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.dictionary(pa.int8(), pa.large_binary()),
    ],
    ids=str,
)
def test_images_are_read_from_every_binary_type(
    tmp_path: Path, kind: pa.DataType, struct: bool
) -> None:
    width = getattr(kind, "byte_width", 0) if pa.types.is_fixed_size_binary(kind) else 0
    images = [data.ljust(width, b"\0") for data in (*IMAGES[:3], IMAGES[0])]
    column = pa.array([*images, None], pa.large_binary())
    # Arrow makes no dictionaries of views, nor views of dictionaries
    column = column.cast(pa.binary()).cast(kind) if kind != pa.large_binary() else column
    if struct:
        names = pa.array([*"abcd", None], pa.string_view())
        column = pa.StructArray.from_arrays([column, names], ["bytes", "path"])
    ids = pa.array(["v", "w", "x", "y", "z"], pa.string_view())
    digests = pa.array([bytes([i]) * 32 for i in range(5)], pa.binary(32))
    columns = {"id": ids, "image": column} | ({} if width and not struct else {"sha": digests})
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    shard = make_shard(tmp_path / "a.parquet")
    records, _ = read_all(shard, key_column="id", chunk_images=2)
    assert keys_of(records) == [f"a.parquet/{name}" for name in "vwxyz"]
    assert [record.data for record in records] == [*images, b""]
    assert [record.status for record in records] == ["ok"] * 4 + ["unreadable"]
    again = read_record_bytes(
        shard.source, row=3, offset=None, nbytes=len(images[3]), sha256=None, storage=STORAGE
    )
    assert again == images[3]


def test_a_parquet_row_without_image_says_so(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [IMAGES[0], None, b""], struct=True)
    records, _ = read_all(make_shard(path))
    assert [record.status for record in records] == ["ok", "unreadable", "ok"]
    assert records[1].error == "no image bytes in this row; its path '1.jpg' is not followed"
    records, _ = read_all(make_shard(write_parquet(tmp_path / "b.parquet", [None])))
    assert records[0].error == "no image bytes in this row"


def test_a_parquet_image_over_the_limit_is_too_large(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [IMAGES[0], bytes(50_000)])
    records, _ = read_all(make_shard(path), max_image_bytes=40_000)
    assert [(record.status, len(record.data)) for record in records] == [
        ("ok", len(IMAGES[0])),
        ("too_large", 0),
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(["x", None, "é"]), ["x", "1", "é"]),
        (pa.array([10, 20, 30]), ["10", "20", "30"]),
        (pa.array([b"x", b"\xff", b""]), ["x", "\\xff", ""]),
        (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x#2"]),
    ],
)
def test_keys_come_from_the_chosen_column(
    tmp_path: Path, values: pa.Array, expected: list[str]
) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES[:3], id=values)
    records, _ = read_all(make_shard(path), key_column="id", image_column="image")
    assert keys_of(records) == [f"a.parquet/{key}" for key in expected]


def test_carried_columns_keep_scalar_types_and_nested_ones_become_json(tmp_path: Path) -> None:
    columns = {
        "caption": pa.array(["a", None]),
        "score": pa.array([1.5, 2.5], pa.float32()),
        "label": pa.array(["cat", "dog"]).dictionary_encode(),
        "day": pa.array([1, 2], pa.date32()),
        "boxes": pa.array([[1, 2], None]),
        "meta": pa.array([{"é": 1}, {"é": None}]),
    }
    shard = make_shard(write_parquet(tmp_path / "a.parquet", IMAGES[:2], struct=True, **columns))
    carry = (*columns, "absent")
    schema = find_carried_schema([shard], storage=STORAGE, options=ReadOptions(carry=carry))
    kinds = [pa.string(), pa.float32(), pa.string(), pa.date32(), *[pa.string()] * 2, pa.null()]
    assert schema.types == kinds
    records, notes = read_all(shard, carry=carry, carried=schema)
    table = pa.Table.from_pylist([dict(record.carried) for record in records], schema=schema)
    assert table.column("caption").to_pylist() == ["a", None]
    assert table.column("label").to_pylist() == ["cat", "dog"]
    assert table.column("boxes").to_pylist() == ["[1, 2]", None]
    assert table.column("meta").to_pylist() == ['{"é": 1}', '{"é": null}']
    assert table.column("absent").to_pylist() == [None, None]
    assert notes == {"missing_columns": 1, "without 'absent'": 1}


def test_a_value_that_the_output_cannot_hold_fails_its_shard_by_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES[:2], score=pa.array([1.0, 0.97]))
    schema = pa.schema([("score", pa.int64())])
    words = r"column 'score' of .*a\.parquet does not fit: .*0\.97.*int64.*leave it out of --carry"
    with pytest.raises(ShardError, match=words):
        read_all(make_shard(path), carry=("score",), carried=schema)
    path = write_parquet(tmp_path / "a.parquet", IMAGES[:2], score=pa.array([1.0, 97.0]))
    records, _ = read_all(make_shard(path), carry=("score",), carried=schema)
    assert [record.carried["score"] for record in records] == [1, 97]


def test_a_parquet_file_without_a_column_of_images_is_an_empty_shard_with_a_note(
    tmp_path: Path,
) -> None:
    path = tmp_path / "meta.parquet"
    pq.write_table(pa.table({"url": ["http://x"], "width": [3]}), path)
    assert read_all(make_shard(path)) == ([], {"without_images": 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"columns \['image', 'mask'\] of .*a\.parquet may all hold the images; set"),
        ({"image_column": "pic"}, r"has no column 'pic'; its columns are \['image', 'mask', 'n"),
        ({"image_column": "name"}, r"column 'name' of .* is of type string; images are read from"),
        ({"image_column": "image", "key_column": "id"}, "has no column 'id'"),
        (
            {"image_column": "image", "key_column": "tags"},
            "key column 'tags' of .* of type list",
        ),
        ({"carry": ("image", "mask")}, r"has no column of encoded images \(binary, or a struct"),
    ],
)
def test_columns_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, options: dict[str, object], words: str
) -> None:
    path = write_parquet(
        tmp_path / "a.parquet",
        IMAGES[:1],
        mask=pa.array([b"m"]),
        name=pa.array(["n"]),
        tags=pa.array([["t"]]),
    )
    with pytest.raises(SettingsError, match=words):
        read_all(make_shard(path), **options)


def test_a_carried_binary_column_is_no_candidate_for_the_images(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES[:1], hash=pa.array([b"\xff"]))
    records, _ = read_all(make_shard(path), carry=("hash",))
    assert (records[0].data, records[0].carried) == (IMAGES[0], {"hash": b"\xff"})


@pytest.mark.parametrize("keep", [0, 3, 500, -4])
def test_a_parquet_file_without_its_footer_is_one_bad_shard(tmp_path: Path, keep: int) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES)
    path.write_bytes(path.read_bytes()[:keep])
    records, _ = read_all(make_shard(path))
    assert [(record.key, record.status) for record in records] == [("a.parquet", "bad_shard")]
    assert "not readable as Parquet" in (records[0].error or "")


def test_a_damaged_page_keeps_the_rows_before_it(tmp_path: Path) -> None:
    plain = {"compression": "none", "write_statistics": False, "write_page_checksum": True}
    path = write_parquet(
        tmp_path / "a.parquet",
        IMAGES,
        row_group_size=6,
        data_page_size=1,
        **plain,
        write_batch_size=1,
        use_dictionary=False,
    )
    content = bytearray(path.read_bytes())
    at = content.index(IMAGES[7]) + 99
    content[at] ^= 0xFF
    path.write_bytes(content)
    *records, last = read_all(make_shard(path))[0]
    assert [record.data for record in records] == IMAGES[:7]
    assert (last.key, last.row, last.status) == ("a.parquet", 7, "bad_shard")
    assert "7 rows come before it" in (last.error or "")


def test_a_huge_row_group_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    path = write_parquet(
        tmp_path / "a.parquet", [noise.bytes(200_000) for _ in range(400)], write_batch_size=8
    )
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    arrow_bytes = 0
    options = ReadOptions(chunk_bytes=2 << 20)
    for _ in read_chunks(make_shard(path), storage=STORAGE, options=options):
        arrow_bytes = max(arrow_bytes, pa.total_allocated_bytes() - before)
    python_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert arrow_bytes + python_bytes < 48 << 20  # the row group has 80 MB


def test_a_parquet_file_without_rows_is_one_empty_chunk(tmp_path: Path) -> None:
    assert read_all(make_shard(write_parquet(tmp_path / "a.parquet", [])))[0] == []


def test_loose_images_are_records_of_their_own_objects(tmp_path: Path) -> None:
    images = {f"dir é/{i:03}.jpg": make_jpeg(i, (8, 8)) for i in range(60)}
    shard = make_bundle(write_loose(tmp_path, images))
    records, _ = read_all(shard, chunk_images=25, carry=("txt",))
    assert keys_of(records) == sorted(images)
    assert [record.data for record in records] == [images[key] for key in sorted(images)]
    assert [record.shard for record in records] == [member.uri for member in shard.members]
    assert {(record.offset, record.carried["txt"]) for record in records} == {(0, None)}


def test_loose_images_that_are_gone_or_changed_are_absent_and_take_their_place(
    tmp_path: Path,
) -> None:
    names = ("empty.jpg", "gone.jpg", "large.jpg", "new.jpg", "ok.jpg")
    write_loose(tmp_path, dict.fromkeys(names, IMAGES[0]) | {"empty.jpg": b""})
    shard = make_bundle(write_loose(tmp_path, {"large.jpg": bytes(20_000)}))
    (tmp_path / "gone.jpg").unlink()
    (tmp_path / "new.jpg").write_bytes(IMAGES[1] + b"more")
    options = ReadOptions(max_image_bytes=10_000, chunk_images=2)
    chunks = list(read_chunks(shard, storage=STORAGE, options=options))
    rows = [[(r.row, r.key, r.status) for r in chunk.records] for chunk in chunks]
    assert rows == [
        [(0, "empty.jpg", "ok")],
        [(2, "large.jpg", "too_large")],
        [(4, "ok.jpg", "ok")],
    ]
    (gone,), (changed,), none = (chunk.absent for chunk in chunks)
    assert (gone[0], changed[0], none) == (1, 3, ())
    assert "No such file" in gone[1]
    assert "has changed" in changed[1]
    assert "max_image_bytes is 10,000" in (chunks[1].records[0].error or "")


def test_chunks_are_cut_alike_whatever_is_absent(tmp_path: Path) -> None:
    shard = make_bundle(write_loose(tmp_path, {f"{i:02}.jpg": make_jpeg(i) for i in range(20)}))
    options = ReadOptions(chunk_images=6, chunk_bytes=3 * len(IMAGES[0]))

    def cut() -> list[list[int]]:
        chunks = read_chunks(shard, storage=STORAGE, options=options)
        return [sorted([*(r.row for r in c.records), *dict(c.absent)]) for c in chunks]

    whole = cut()
    for i in (0, 3, 4, 5, 13, 19):
        (tmp_path / f"{i:02}.jpg").unlink()
        assert cut() == whole


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.parquet"])
def test_a_shard_that_goes_away_or_changes_during_the_run_gives_no_rows_of_its_absence(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    write = write_parquet if name.endswith("parquet") else write_tar
    content = IMAGES if name.endswith("parquet") else MEMBERS
    shard = make_shard(write(path, content))
    write(path, content[:2])
    with pytest.raises(ObjectChangedError, match="has changed"):
        read_all(shard)
    path.unlink()
    with pytest.raises(ObjectMissingError):
        read_all(shard)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.parquet"])
def test_a_shard_written_over_in_place_while_it_is_read_gives_no_last_chunk(
    tmp_path: Path, name: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 400_000), np.uint8)
    images = [picture.tobytes() for picture in noise]
    members = [(f"{i}.jpg", data) for i, data in enumerate(images)]
    if name.endswith("parquet"):
        path, other = (
            write_parquet(tmp_path / f"{i}-{name}", content, row_group_size=2)
            for i, content in enumerate((images, images[::-1]))
        )
    else:
        path = write_tar(tmp_path / name, members)
        other = write_tar(tmp_path / f"new-{name}", members[::-1])
    shard = make_shard(path)
    seen = []
    with pytest.raises(ObjectChangedError, match="has changed"):  # noqa: PT012
        for chunk in read_chunks(shard, storage=STORAGE, options=ReadOptions(chunk_images=2)):
            seen += [(record.row, record.data) for record in chunk.records]
            assert not chunk.last
            with path.open("r+b") as file:  # as cp and rsync --inplace write
                file.write(other.read_bytes())
                file.truncate()
    assert all(data == images[row] for row, data in seen), "bytes of two versions"


def test_a_shortage_of_the_machine_is_no_fault_of_the_data() -> None:
    assert not is_fault_of_data(OSError(12, "Cannot allocate memory"))
    assert not is_fault_of_data(OSError(24, "Too many open files"))
    assert not is_fault_of_data(OSError(5, "Input/output error"))
    # With memory to be had, it was a damaged header that asked for more than there is.
    assert is_fault_of_data(MemoryError())
    assert is_fault_of_data(pa.lib.ArrowMemoryError("malloc failed"))
    assert is_fault_of_data(pa.ArrowInvalid("not Parquet"))
    assert is_fault_of_data(OSError("Corrupt snappy compressed data."))


@pytest.mark.parametrize(("broken", "fails"), [(8, False), (9, True)])
def test_a_store_that_fails_for_many_images_of_a_bundle_fails_the_bundle(
    s3_bucket: str, faulty_s3: FaultyProxy, s3_server: S3Server, broken: int, fails: bool
) -> None:
    for i in range(12):
        s3_server.storage().put(f"{s3_bucket}/{i:02}.jpg", IMAGES[i])
    options = StorageOptions(endpoint_url=faulty_s3.endpoint_url, storage_attempts=1)
    shard = make_bundle(s3_bucket, Storage(options))
    for i in range(broken):
        faulty_s3.inject(Fault("internal_error", method="GET", key=f"*/{i:02}.jpg", times=None))
    chunks = read_chunks(shard, storage=Storage(options), options=ReadOptions())
    if fails:
        with pytest.raises(UnreachableError, match="InternalError"):
            list(chunks)
        return
    (chunk,) = chunks
    assert [row for row, _ in chunk.absent] == list(range(broken))
    assert [record.row for record in chunk.records] == list(range(broken, 12))


def test_a_refused_image_is_absent_and_its_neighbours_are_read(
    s3_bucket: str, faulty_s3: FaultyProxy, s3_server: S3Server
) -> None:
    for i in range(4):
        s3_server.storage().put(f"{s3_bucket}/{i}.jpg", IMAGES[i])
    storage = Storage(StorageOptions(endpoint_url=faulty_s3.endpoint_url))
    shard = make_bundle(s3_bucket, storage)
    faulty_s3.inject(
        Fault("denied", method="GET", key="*/1.jpg", times=None),
        Fault("archived", method="GET", key="*/2.jpg", times=None),
    )
    (chunk,) = read_chunks(shard, storage=storage, options=ReadOptions())
    assert [record.row for record in chunk.records] == [0, 3]
    assert "AccessDenied" in chunk.absent[0][1]
    assert "archived: restore it first" in chunk.absent[1][1]
    faulty_s3.inject(Fault("expired", method="GET", key="*/0.jpg", times=None))
    with pytest.raises(CredentialsError, match="renew the credentials"):
        list(read_chunks(shard, storage=storage, options=ReadOptions()))


def fill_bucket(bucket: str, storage: Storage, tmp_path: Path) -> list[Shard]:
    """Put the same images there as every kind of shard."""
    for name in ("a.tar", "a.tar.gz"):
        storage.upload(write_tar(tmp_path / name, MEMBERS), f"{bucket}/{name}")
    path = write_parquet(tmp_path / "a.parquet", IMAGES, struct=True, row_group_size=4)
    storage.upload(path, f"{bucket}/a.parquet")
    for name, data in MEMBERS:
        storage.put(f"{bucket}/loose/{name}", data)
    names = ("a.tar", "a.tar.gz", "a.parquet")
    shards = [make_shard(f"{bucket}/{name}", storage) for name in names]
    return [*shards, make_bundle(f"{bucket}/loose", storage)]


def test_every_kind_reads_the_same_from_an_s3_server(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    storage = s3_server.storage()
    for shard in fill_bucket(s3_bucket, storage, tmp_path):
        records, _ = read_all(shard, storage, chunk_images=5)
        assert [record.data for record in records] == IMAGES
        check_single_reads(records, storage)


def test_a_storage_fault_is_the_runs_not_the_shards(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    unreachable = Storage(StorageOptions(endpoint_url="http://127.0.0.1:9", storage_attempts=1))
    for shard in fill_bucket(s3_bucket, s3_server.storage(), tmp_path):
        with pytest.raises(StorageError):
            read_all(shard, unreachable)


def check_single_reads(records: Sequence[Record], storage: Storage = STORAGE) -> None:
    for record in records:
        data = read_record_bytes(
            record.shard,
            row=record.row,
            offset=record.offset,
            nbytes=len(record.data),
            sha256=hashlib.sha256(record.data).digest()[:16],
            storage=storage,
        )
        assert data == record.data


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.zst", "a.parquet"])
def test_a_single_image_is_fetched_again_from_where_its_row_says(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, IMAGES, row_group_size=5, extra=pa.array(["x"] * 12))
    else:
        write_tar(path, [("a.txt", b"x"), ("skip.npy", b"y"), *MEMBERS])
    check_single_reads(read_all(make_shard(path))[0])


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.parquet"])
def test_an_image_of_a_source_that_was_replaced_is_not_taken_for_the_old_one(
    tmp_path: Path, name: str
) -> None:
    write = write_parquet if name.endswith("parquet") else write_tar
    content = IMAGES if name.endswith("parquet") else MEMBERS
    path = write(tmp_path / name, content)
    (record, other, *_), _ = read_all(make_shard(path))
    write(path, [content[1], content[0], *content[2:]])
    with pytest.raises(RecordError, match=r"holds another image .* run embed and index again"):
        read_record_bytes(
            str(path),
            row=0,
            offset=record.offset,
            nbytes=len(other.data),
            sha256=hashlib.sha256(record.data).digest()[:16],
            storage=STORAGE,
        )


def test_an_image_that_is_not_there_any_more_is_said_to_be_missing(tmp_path: Path) -> None:
    def fetch(path: Path, row: int) -> bytes:
        return read_record_bytes(
            str(path), row=row, offset=None, nbytes=9, sha256=None, storage=STORAGE
        )

    tar = write_tar(tmp_path / "a.tgz", MEMBERS[:2])
    parquet = write_parquet(tmp_path / "a.parquet", [IMAGES[0], None])
    with pytest.raises(RecordError, match="has no image in row 5 any more"):
        fetch(tar, 5)
    with pytest.raises(RecordError, match="has 2 rows; row 5 was asked for"):
        fetch(parquet, 5)
    with pytest.raises(RecordError, match="no image bytes in this row"):
        fetch(parquet, 1)
    tar.write_bytes(tar.read_bytes()[:200])
    with pytest.raises(RecordError, match="damaged compression"):
        fetch(tar, 1)
    parquet.write_bytes(parquet.read_bytes()[:-9])
    with pytest.raises(RecordError, match="not readable as Parquet"):
        fetch(parquet, 0)
    with pytest.raises(ObjectMissingError):
        fetch(tmp_path / "absent.tar", 0)


def test_a_shard_without_a_known_version_is_read_as_it_is(tmp_path: Path) -> None:
    shard = replace(make_shard(write_tar(tmp_path / "a.tar", MEMBERS)), version="")
    assert len(read_all(shard)[0]) == len(MEMBERS)
