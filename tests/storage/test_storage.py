import io
import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from s3.faulty_proxy import Fault, FaultyProxy
from s3.servers import S3Server, connect

from pipeline.config import StorageOptions
from pipeline.errors import (
    AccessError,
    ConflictError,
    ObjectChangedError,
    ObjectMissingError,
    RetryError,
    SettingsError,
    StorageError,
)
from pipeline.storage import Storage, conditional, join_uri, normalise_uri, s3
from pipeline.storage.fsspec import OtherStore
from pipeline.storage.local import LocalStore
from pipeline.storage.retry import retry

WINDOW_BYTES = 8 << 20
AWKWARD_NAMES = [
    " spaces  inside .jpg",
    "%41%2F.jpg",
    "*.jpg",
    "?versionId=1.jpg",
    "[ab].jpg",
    "a#fragment.jpg",
    "a+b&c=d.jpg",
    "dots..and...dots",
    "nested/deep/er/x.jpg",
    "{a,b}.jpg",
    "ünïcødé-雪.jpg",
]

retry_module = import_module("pipeline.storage.retry")  # the package has the function by that name


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "FIRST_WAIT_S", 0.01)


@dataclass(frozen=True)
class Place:
    """An empty prefix in some store."""

    kind: str
    storage: Storage
    uri: str

    def at(self, name: str) -> str:
        return f"{self.uri}/{name}"


def open_place(kind: str, request: pytest.FixtureRequest) -> Place:
    if kind == "local":
        return Place(kind, Storage(), str(request.getfixturevalue("tmp_path") / "base"))
    if kind == "memory":
        return Place(kind, Storage(), f"memory://{os.urandom(6).hex()}/base")
    server = request.getfixturevalue("s3_server" if kind == "s3" else "moto_server")
    return Place(kind, server.storage(), f"{server.make_bucket()}/base")


@pytest.fixture(params=["local", "s3", "moto", "memory"])
def place(request: pytest.FixtureRequest) -> Place:
    return open_place(request.param, request)


@pytest.fixture
def faulty(s3_bucket: str, faulty_s3: FaultyProxy) -> tuple[Place, FaultyProxy]:
    """A bucket behind the proxy."""
    options = StorageOptions(faulty_s3.endpoint_url, storage_attempts=4, storage_timeout_s=10.0)
    return Place("s3", Storage(options), s3_bucket), faulty_s3


@pytest.fixture
def faulty_moto(moto_server: S3Server) -> Iterator[tuple[Place, FaultyProxy]]:
    """The same in front of moto, which honours If-Match on PUT and checks no signatures."""
    with FaultyProxy(moto_server.endpoint_url) as proxy:
        options = StorageOptions(proxy.endpoint_url, storage_attempts=4, storage_timeout_s=10.0)
        yield Place("moto", Storage(options), moto_server.make_bucket()), proxy


def slurp(file: BinaryIO) -> bytes:
    with file:
        return file.read()


def make_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


# --- URIs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/x/", "/data/x"),
        ("/data/../data//x", "/data/x"),
        ("/", "/"),
        ("file:///data/a%20b", "/data/a b"),
        ("file://localhost/data", "/data"),
        ("/data/a%20b", "/data/a%20b"),
        ("s3://bucket/a%20b//", "s3://bucket/a%20b"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://bucket/Key", "s3://bucket/Key"),
        ("s3a://bucket/key", "s3://bucket/key"),
        ("gs://bucket/key?x#y", "gs://bucket/key?x#y"),
    ],
)
def test_every_place_has_one_spelling(text: str, expected: str) -> None:
    assert normalise_uri(text) == expected
    assert normalise_uri(expected) == expected


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert normalise_uri("a/b") == str(tmp_path / "a/b")
    assert normalise_uri("~/a") == "/home/somebody/a"


def test_an_empty_uri_is_refused() -> None:
    with pytest.raises(SettingsError, match="a URI is empty"):
        normalise_uri(" ")


def test_parts_are_joined_by_one_slash() -> None:
    assert join_uri("s3://b/x/", "/parts/", "a b.parquet") == "s3://b/x/parts/a b.parquet"
    assert join_uri("/", "x") == "/x"
    assert join_uri("/base", "") == "/base"


# --- What every store does


def test_awkward_names_are_written_listed_and_read_as_they_are(place: Place) -> None:
    for name in AWKWARD_NAMES:
        place.storage.put(place.at(name), name.encode())
    listed = place.storage.list_objects(place.uri)
    assert [info.uri for info in listed] == sorted(place.at(name) for name in AWKWARD_NAMES)
    for name in AWKWARD_NAMES:
        uri = place.at(name)
        assert place.storage.read(uri) == name.encode()
        assert place.storage.read_range(uri, 0, 3) == name.encode()[:3]
        assert [info.uri for info in place.storage.list_objects(uri)] == [uri]
    place.storage.delete([place.at("*.jpg")])
    assert len(place.storage.list_objects(place.uri)) == len(AWKWARD_NAMES) - 1


def test_a_listing_and_a_look_up_say_the_same(place: Place) -> None:
    place.storage.put(place.at("x"), b"12345")
    listed = place.storage.list_objects(place.uri)
    assert listed == [place.storage.stat(place.at("x"))]
    assert listed[0].size_bytes == 5
    assert listed[0].modified_s is not None
    assert listed[0].modified_s > 1_600_000_000


def test_a_prefix_is_a_folder_and_not_the_start_of_a_name(place: Place) -> None:
    for name in ("train/1", "train2/1", "train.txt"):
        place.storage.put(place.at(name), b"")
    listed = place.storage.list_objects(place.at("train"))
    assert [info.uri for info in listed] == [place.at("train/1")]
    assert place.storage.list_objects(place.at("tra")) == []


def test_a_listing_is_never_a_cached_one(place: Place) -> None:
    assert place.storage.list_objects(place.uri) == []
    place.storage.put(place.at("a/1"), b"")
    assert len(place.storage.list_objects(place.uri)) == 1
    place.storage.put(place.at("a/2"), b"")
    assert len(place.storage.list_objects(place.at("a"))) == 2
    place.storage.delete([place.at("a/1"), place.at("a/2")])
    assert place.storage.list_objects(place.uri) == []


def test_the_version_changes_with_the_content(place: Place) -> None:
    place.storage.put(place.at("x"), b"1")
    before = place.storage.stat(place.at("x")).version
    place.storage.put(place.at("x"), b"22")
    assert place.storage.stat(place.at("x")).version != before


def test_an_object_that_is_not_there_is_missing_for_every_call(place: Place) -> None:
    uri = place.at("none")
    storage = place.storage
    assert not storage.exists(uri)
    assert storage.list_objects(uri) == []
    calls: list[Callable[[], object]] = [
        lambda: storage.stat(uri),
        lambda: storage.read(uri),
        lambda: storage.read_versioned(uri),
        lambda: storage.read_range(uri, 0, 1),
        lambda: storage.open_stream(uri),
        lambda: storage.open_random(uri),
        lambda: storage.download(uri, Path("/nowhere")),
    ]
    for call in calls:
        with pytest.raises(ObjectMissingError, match=f"cannot .* '{uri}': .*check the"):
            call()


def test_a_folder_is_not_an_object(place: Place) -> None:
    place.storage.put(place.at("folder/x"), b"")
    assert not place.storage.exists(place.at("folder"))
    with pytest.raises(ObjectMissingError, match="folder"):
        place.storage.read(place.at("folder"))


def test_a_range_is_exact_or_an_error(place: Place) -> None:
    uri = place.at("x")
    place.storage.put(uri, b"0123456789")
    assert place.storage.read_range(uri, 2, 3) == b"234"
    assert place.storage.read_range(uri, 9, 1) == b"9"
    assert place.storage.read_range(uri, 4, 0) == b""
    with pytest.raises(StorageError, match=r"cannot read 3 bytes .* it has only 10"):
        place.storage.read_range(uri, 8, 3)
    with pytest.raises(StorageError, match=r"cannot read .*x' from byte 50"):
        place.storage.read_range(uri, 50, 3)
    with pytest.raises(ValueError, match="is negative"):
        place.storage.read_range(uri, -1, 3)


def test_an_empty_object_reads_as_empty(place: Place, tmp_path: Path) -> None:
    uri = place.at("empty")
    place.storage.put(uri, b"")
    assert place.storage.read(uri) == b""
    assert slurp(place.storage.open_stream(uri)) == b""
    assert slurp(place.storage.open_random(uri)) == b""
    assert place.storage.stat(uri).size_bytes == 0
    place.storage.download(uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def test_a_stream_gives_all_bytes_in_pieces_of_any_size(place: Place) -> None:
    data = make_bytes(WINDOW_BYTES + 12_345)
    place.storage.put(place.at("x"), data)
    with place.storage.open_stream(place.at("x")) as stream:
        pieces = [stream.read(100), stream.read(WINDOW_BYTES), stream.read(7)]
        pieces += iter(lambda: stream.read(1_000_000), b"")
    assert b"".join(pieces) == data


def test_random_access_reads_what_lies_there(place: Place) -> None:
    data = make_bytes(100_000)
    place.storage.put(place.at("x"), data)
    with place.storage.open_random(place.at("x")) as file:
        assert file.seekable()
        assert file.seek(-10, io.SEEK_END) == 99_990
        assert file.read() == data[-10:]
        assert file.read(5) == b""
        file.seek(500)
        assert file.read(20) == data[500:520]
        assert file.seek(80, io.SEEK_CUR) == 600
        assert file.tell() == 600
        assert file.read(0) == b""
        buffer = bytearray(10)
        assert file.readinto(buffer) == 10  # type: ignore[attr-defined]
        assert bytes(buffer) == data[600:610]
        with pytest.raises((ValueError, OSError)):
            file.seek(-1)


def test_another_version_than_the_listed_one_is_refused(place: Place) -> None:
    uri = place.at("x")
    place.storage.put(uri, b"old")
    version = place.storage.stat(uri).version
    assert slurp(place.storage.open_stream(uri, version=version)) == b"old"
    assert slurp(place.storage.open_random(uri, version=version)) == b"old"
    assert place.storage.read_range(uri, 0, 3, version=version) == b"old"
    place.storage.put(uri, b"newer")
    calls: list[Callable[[], object]] = [
        lambda: slurp(place.storage.open_stream(uri, version=version)),
        lambda: slurp(place.storage.open_random(uri, version=version)),
        lambda: place.storage.read_range(uri, 0, 3, version=version),
    ]
    for call in calls:
        with pytest.raises(ObjectChangedError, match=r"has changed: version .* list the input"):
            call()


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_an_object_replaced_while_it_is_read_never_gives_mixed_bytes(
    kind: str, request: pytest.FixtureRequest
) -> None:
    place = open_place(kind, request)
    uri = place.at("x")
    place.storage.put(uri, b"a" * (WINDOW_BYTES + 1))
    with place.storage.open_stream(uri) as stream:
        assert stream.read(10) == b"a" * 10
        place.storage.put(uri, b"b" * (WINDOW_BYTES + 1))
        with pytest.raises(ObjectChangedError, match="has changed"):
            stream.read()


def test_a_local_file_replaced_while_it_is_read_stays_the_old_one(tmp_path: Path) -> None:
    storage, uri = Storage(), str(tmp_path / "x")
    storage.put(uri, b"a" * (4 << 20))
    with storage.open_stream(uri) as stream:
        stream.read(10)
        storage.put(uri, b"b" * (4 << 20))
        assert set(stream.read()) == {ord("a")}


def test_deleting_what_is_not_there_is_fine(place: Place, tmp_path: Path) -> None:
    place.storage.put(place.at("x"), b"")
    place.storage.put(str(tmp_path / "y"), b"")
    place.storage.delete([place.at("x"), place.at("none"), str(tmp_path / "y")])
    assert place.storage.list_objects(place.uri) == []
    assert not (tmp_path / "y").exists()


def test_files_go_up_and_come_down_unchanged(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)
    for size in (0, 1000, (12 << 20) + 1):
        data = make_bytes(size)
        (tmp_path / "up").write_bytes(data)
        place.storage.upload(tmp_path / "up", place.at("x"))
        assert place.storage.stat(place.at("x")).size_bytes == size
        place.storage.download(place.at("x"), tmp_path / "new" / "down")
        assert (tmp_path / "new" / "down").read_bytes() == data
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["down"]


def test_datasets_read_through_arrow(place: Place) -> None:
    for name in ("parts/a/0.parquet", "parts/b/0.parquet"):
        sink = io.BytesIO()
        pq.write_table(pa.table({"key": [name] * 1000, "row": range(1000)}), sink)
        place.storage.put(place.at(name), sink.getvalue())
    filesystem, path = place.storage.arrow_filesystem(place.at("parts"))
    dataset = pickle.loads(pickle.dumps(ds.dataset(path, filesystem=filesystem)))
    assert dataset.count_rows() == 2000
    one = ds.dataset([f"{path}/b/0.parquet"], filesystem=filesystem)
    assert one.to_table(filter=ds.field("row") < 3).to_pylist() == [
        {"key": "parts/b/0.parquet", "row": row} for row in range(3)
    ]
    with pytest.raises(FileNotFoundError):
        ds.dataset(f"{path}/none", filesystem=filesystem)


def test_arrow_cannot_write(s3_bucket: str, s3_server: S3Server) -> None:
    filesystem, path = s3_server.storage().arrow_filesystem(s3_bucket)
    with pytest.raises(NotImplementedError, match="read-only"):
        filesystem.delete_file(f"{path}/x")


# --- Conditional writes


def test_an_object_is_created_once(place: Place) -> None:
    version = place.storage.put_if_absent(place.at("x"), b"1")
    assert place.storage.read_versioned(place.at("x")) == (b"1", version)
    with pytest.raises(ConflictError, match="another writer was first"):
        place.storage.put_if_absent(place.at("x"), b"1")


def test_an_object_is_replaced_only_by_who_has_seen_it(place: Place) -> None:
    uri = place.at("x")
    first = place.storage.put_if_absent(uri, b"1")
    second = place.storage.put_if_version(uri, b"2", first)
    assert second != first
    # Same size and, on a file system, perhaps the same tick of the clock.
    with pytest.raises(ConflictError, match="another writer was first"):
        place.storage.put_if_version(uri, b"3", first)
    assert place.storage.read_versioned(uri) == (b"2", second)
    place.storage.delete([uri])
    with pytest.raises(ConflictError, match="read it again"):
        place.storage.put_if_version(uri, b"3", second)
    assert not place.storage.exists(uri)


def test_of_many_writers_exactly_one_wins_each_round(place: Place) -> None:
    uri = place.at("CURRENT")

    def race(write: Callable[[int], str]) -> list[int]:
        gate = threading.Barrier(4)

        def run(writer: int) -> bool:
            gate.wait()
            try:
                write(writer)
            except ConflictError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            return [writer for writer, won in enumerate(pool.map(run, range(4))) if won]

    # Tries enough to wait for the other writers where a guard makes them queue.
    storage = Storage(replace(place.storage.options, storage_attempts=12))
    winners = race(lambda writer: storage.put_if_absent(uri, f"0-{writer}".encode()))
    assert len(winners) == 1
    for turn in range(1, 3):
        _, version = storage.read_versioned(uri)
        winners = race(
            lambda writer, turn=turn, version=version: storage.put_if_version(
                uri, f"{turn}-{writer}".encode(), version
            )
        )
        assert len(winners) == 1
        assert storage.read(uri) == f"{turn}-{winners[0]}".encode()
    assert [info.uri for info in storage.list_objects(place.uri)] == [uri]


def test_a_protocol_without_conditional_writes_says_so() -> None:
    store = OtherStore(fsspec.filesystem("memory"), protocol="gs")
    with pytest.raises(StorageError, match="gs:// has no conditional writes here; use s3://"):
        store.put_if("gs://bucket/x", b"", version=None, write_id="")


def test_swift_knows_create_only_and_refuses_if_match(s3_server: S3Server) -> None:
    """Why pipeline/storage/conditional.py has guards.

    Its check and its write are two steps besides: simultaneous creations may both be accepted.
    """
    if s3_server.kind != "swift":
        pytest.skip(f"no Swift here: {s3_server.note}")
    uri, storage = f"{s3_server.make_bucket()}/x", s3_server.storage()
    store = storage._store(uri)
    assert isinstance(store, s3.S3Store)
    etag = store.write(uri, b"1", condition=("If-None-Match", "*"))
    with pytest.raises(OSError) as conflict:
        store.write(uri, b"2", condition=("If-None-Match", "*"))
    with pytest.raises(OSError) as refusal:
        store.write(uri, b"2", condition=("If-Match", f'"{etag}"'))
    assert retry_module.status_of(conflict.value) == 412
    assert retry_module.status_of(refusal.value) == 501


def test_a_dead_writers_guard_is_waited_out_and_taken_over(
    faulty_moto: tuple[Place, FaultyProxy],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place, proxy = faulty_moto
    proxy.inject(Fault("not_implemented", method="PUT"))  # to If-Match, on finding out
    version = place.storage.put_if_absent(place.at("CURRENT"), b"1")
    guard = place.at(conditional.name_lock("CURRENT"))
    place.storage.put(guard, b"somebody's")
    monkeypatch.setattr(conditional, "GUARD_LIFE_S", 4.0)  # the store's clock shows whole seconds
    started_s = time.monotonic()
    place.storage.put_if_version(place.at("CURRENT"), b"2", version)
    assert time.monotonic() - started_s > 1.0  # it waited for the guard to expire
    assert "was left by a writer that is paused or dead; waiting for up to" in caplog.text
    assert place.storage.read(place.at("CURRENT")) == b"2"
    assert not place.storage.exists(guard)


def test_a_writer_that_was_paused_under_its_guard_writes_nothing_before_it_has_asked_again(
    faulty_moto: tuple[Place, FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guard may have been taken for a dead one's, and another writer may be in its place."""
    place, proxy = faulty_moto
    proxy.inject(Fault("not_implemented", method="PUT"))
    version = place.storage.put_if_absent(place.at("CURRENT"), b"1")
    now_s, paused = time.clock_gettime, []

    def pause_once(clock: int) -> float:
        paused.append(clock)
        return now_s(clock) + (conditional.GUARD_LIFE_S if len(paused) == 2 else 0.0)

    puts = proxy.count("PUT")
    monkeypatch.setattr(time, "clock_gettime", pause_once)
    place.storage.put_if_version(place.at("CURRENT"), b"2", version)
    assert (
        proxy.count("PUT") - puts == 3
    )  # a guard, given back unused; another guard, and the write
    assert place.storage.read(place.at("CURRENT")) == b"2"


@pytest.mark.parametrize(("skip", "header"), [(0, "If-Match"), (1, "If-None-Match")])
def test_a_store_that_ignores_conditions_is_found_out(
    skip: int, header: str, faulty_moto: tuple[Place, FaultyProxy]
) -> None:
    place, proxy = faulty_moto
    proxy.inject(Fault("ignored_condition", method="PUT", skip=skip, times=None))
    with pytest.raises(StorageError, match=f"this store ignores {header}, so two writers"):
        place.storage.put_if_absent(place.at("x"), b"1")
    assert len(place.storage.list_objects(place.uri)) == skip


# --- Faults of the network and the store


def prepare_calls(place: Place, tmp_path: Path) -> dict[str, Callable[[], object]]:
    """Return every kind of request by name, on an object that holds b"0123456789"."""
    storage, uri = place.storage, place.at("x")
    storage.put(uri, b"0123456789")
    (tmp_path / "up").write_bytes(b"up")
    return {
        "list": lambda: [info.uri for info in storage.list_objects(place.uri)],
        "stat": lambda: storage.stat(uri).size_bytes,
        "read": lambda: storage.read(uri),
        "read_range": lambda: storage.read_range(uri, 2, 3),
        "open_stream": lambda: slurp(storage.open_stream(uri)),
        "open_random": lambda: slurp(storage.open_random(uri)),
        "put": lambda: storage.put(uri, b"0123456789"),
        "upload": lambda: storage.upload(tmp_path / "up", place.at("up")),
        "delete": lambda: storage.delete([place.at("none")]),
    }


@pytest.mark.parametrize("kind", ["slow_down", "internal_error", "lost_answer"])
def test_every_request_survives_passing_faults(
    kind: str, faulty: tuple[Place, FaultyProxy], tmp_path: Path
) -> None:
    place, proxy = faulty
    calls = prepare_calls(place, tmp_path)
    undisturbed = {name: call() for name, call in calls.items()}
    place.storage.delete([place.at("up")])
    for name, call in calls.items():
        proxy.clear()
        proxy.inject(Fault(kind, times=2))
        assert call() == undisturbed[name], name
        assert proxy.count(faulty=True) == 2, name
        place.storage.delete([place.at("up")])


def test_a_store_that_does_not_answer_is_asked_again(
    faulty: tuple[Place, FaultyProxy], tmp_path: Path
) -> None:
    place, proxy = faulty
    calls = prepare_calls(hurry(place), tmp_path)
    for name in ("read", "put"):
        proxy.clear()
        proxy.inject(Fault("stall"))
        calls[name]()
        assert proxy.count(faulty=True) == 1, name
    assert place.storage.read(place.at("x")) == b"0123456789"


def hurry(place: Place) -> Place:
    """Return the place through a storage that waits half a second at most."""
    options = replace(place.storage.options, storage_timeout_s=0.5)
    return replace(place, storage=Storage(options))


def test_faults_that_do_not_pass_end_after_the_set_number_of_attempts(
    faulty: tuple[Place, FaultyProxy], tmp_path: Path
) -> None:
    place, proxy = faulty
    calls = prepare_calls(place, tmp_path)
    words = r"failed 4 times, .*(SlowDown|503).*storage_attempts"
    for name in ("list", "stat", "read", "put"):
        proxy.clear()
        proxy.inject(Fault("slow_down", times=None))
        with pytest.raises(StorageError, match=words):
            calls[name]()
        assert proxy.count() == 4, name


@pytest.mark.parametrize("kind", ["reset", "short", "stall_body"])
def test_a_body_that_breaks_off_is_continued_where_it_broke(
    kind: str, faulty: tuple[Place, FaultyProxy]
) -> None:
    place, proxy = faulty
    data = make_bytes(2_000_000)
    place.storage.put(place.at("x"), data)
    if kind == "stall_body":
        place = hurry(place)
    proxy.inject(Fault(kind, method="GET", times=2, after_bytes=300_000))
    assert slurp(place.storage.open_stream(place.at("x"))) == data
    assert proxy.count("GET", faulty=True) == 2
    starts = [int(seen.headers["range"][6:].split("-")[0]) for seen in _gets(proxy)]
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert starts[1] > 0
    proxy.inject(Fault(kind, method="GET", after_bytes=300_000))
    assert place.storage.read(place.at("x")) == data
    proxy.inject(Fault(kind, method="GET", after_bytes=300_000))
    assert place.storage.read_range(place.at("x"), 5, 1_000_000) == data[5:1_000_005]


def _gets(proxy: FaultyProxy) -> list:
    return [seen for seen in proxy.seen if seen.method == "GET"]


def test_a_store_that_never_gets_far_still_gives_the_whole_object(
    faulty: tuple[Place, FaultyProxy],
) -> None:
    place, proxy = faulty
    data = make_bytes(200_000)
    place.storage.put(place.at("x"), data)
    proxy.inject(Fault("short", method="GET", times=None, after_bytes=30_000))
    assert place.storage.read(place.at("x")) == data
    assert slurp(place.storage.open_stream(place.at("x"))) == data


@pytest.mark.parametrize("kind", ["reset", "short"])
def test_a_body_that_never_starts_is_not_taken_for_an_empty_one(
    kind: str, faulty: tuple[Place, FaultyProxy]
) -> None:
    place, proxy = faulty
    place.storage.put(place.at("x"), b"12345")
    proxy.inject(Fault(kind, method="GET", times=None))
    with pytest.raises(StorageError, match=r"cannot read .* failed 4 times"):
        place.storage.read(place.at("x"))


def test_many_threads_read_and_write_through_a_bad_network(
    faulty: tuple[Place, FaultyProxy],
) -> None:
    place, proxy = faulty
    storage = Storage(
        StorageOptions(proxy.endpoint_url, storage_attempts=12, storage_timeout_s=2.0)
    )
    proxy.inject(
        Fault("slow_down", probability=0.15, times=None),
        Fault("lost_answer", probability=0.1, times=None),
        Fault("reset", method="GET", probability=0.2, times=None, after_bytes=5_000),
        Fault("short", method="GET", probability=0.2, times=None, after_bytes=7_000),
    )

    def work(number: int) -> bool:
        data = make_bytes(20_000 + number)
        storage.put(place.at(f"{number}"), data)
        return (
            storage.read(place.at(f"{number}")) == data
            and slurp(storage.open_stream(place.at(f"{number}"))) == data
            and storage.read_range(place.at(f"{number}"), 7_777, 9_999) == data[7_777:17_776]
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(12)))
    assert len(storage.list_objects(place.uri)) == 12
    assert proxy.count(faulty=True) > 10


@pytest.mark.parametrize(
    ("kind", "words"),
    [("expired", "renew the credentials"), ("denied", "allow it in the bucket's")],
)
def test_bad_credentials_fail_at_once_and_say_what_to_do(
    kind: str, words: str, faulty: tuple[Place, FaultyProxy], tmp_path: Path
) -> None:
    place, proxy = faulty
    for name, call in prepare_calls(place, tmp_path).items():
        proxy.clear()
        proxy.inject(Fault(kind, times=None))
        with pytest.raises(AccessError, match=f"cannot .*'{place.uri}.*{words}"):
            call()
        # A bare 400 to a HEAD makes botocore ask once which region the bucket is in.
        assert proxy.count() <= (2 if name in ("stat", "open_random") else 1), name


def test_a_first_write_whose_answer_was_lost_is_recognised(
    faulty: tuple[Place, FaultyProxy],
) -> None:
    place, proxy = faulty
    proxy.inject(Fault("lost_answer", method="PUT"))
    version = place.storage.put_if_absent(place.at("x"), b"mine")
    assert place.storage.read_versioned(place.at("x")) == (b"mine", version)
    assert proxy.count("PUT", faulty=True) == 1
    with pytest.raises(ConflictError):
        place.storage.put_if_absent(place.at("x"), b"mine")


def test_a_replacement_whose_answer_was_lost_is_recognised(
    faulty_moto: tuple[Place, FaultyProxy],
) -> None:
    place, proxy = faulty_moto
    uri = place.at("x")
    version = place.storage.put_if_absent(uri, b"old")
    proxy.inject(Fault("lost_answer", method="PUT"))
    assert place.storage.put_if_version(uri, b"new", version) == place.storage.stat(uri).version
    assert place.storage.read(uri) == b"new"


def test_a_guarded_replacement_survives_every_lost_answer(
    faulty: tuple[Place, FaultyProxy],
) -> None:
    place, proxy = faulty
    uri = place.at("x")
    version = place.storage.put_if_absent(uri, b"0")
    for method in ("PUT", "HEAD", "DELETE"):
        data = method.encode()
        proxy.clear()
        proxy.inject(Fault("lost_answer", method=method))
        proxy.inject(Fault("lost_answer", method=method, skip=1))
        version = place.storage.put_if_version(uri, data, version)
        assert place.storage.read_versioned(uri) == (data, version)
    assert [info.uri for info in place.storage.list_objects(place.uri)] == [uri]


def test_another_writers_object_is_never_taken_for_our_own(
    faulty_moto: tuple[Place, FaultyProxy],
) -> None:
    place, proxy = faulty_moto
    place.storage.put(place.at("x"), b"theirs")
    proxy.inject(Fault("internal_error", method="PUT"))
    with pytest.raises(ConflictError, match="another writer was first"):
        place.storage.put_if_absent(place.at("x"), b"mine")
    assert place.storage.read(place.at("x")) == b"theirs"


def test_a_conflict_of_two_simultaneous_requests_is_tried_again(
    faulty: tuple[Place, FaultyProxy],
) -> None:
    place, proxy = faulty
    proxy.inject(Fault("conflict", method="PUT"))
    place.storage.put_if_absent(place.at("x"), b"mine")
    assert place.storage.read(place.at("x")) == b"mine"


def test_a_large_upload_survives_faults_in_its_parts(
    faulty: tuple[Place, FaultyProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, proxy = faulty
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)
    storage = Storage(StorageOptions(proxy.endpoint_url, storage_attempts=4, storage_timeout_s=5))
    data = make_bytes((12 << 20) + 1)
    (tmp_path / "up").write_bytes(data)
    proxy.inject(Fault("slow_down", method="PUT", times=2), Fault("lost_answer", method="POST"))
    proxy.inject(Fault("lost_answer", method="POST", skip=1))
    storage.upload(tmp_path / "up", place.at("x"))
    assert storage.read(place.at("x")) == data


# --- Access


def test_missing_credentials_fail_fast_and_name_the_variables(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessError, match=r"'s3://bucket/x': .*set AWS_ACCESS_KEY_ID and"):
        s3_server.storage().read("s3://bucket/x")


def test_wrong_credentials_are_an_access_error_and_right_ones_help_at_once(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if s3_server.kind != "swift":
        pytest.skip("moto checks no signatures")
    storage = s3_server.storage()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(AccessError, match=r"SignatureDoesNotMatch.*renew the credentials"):
            storage.put(f"{s3_bucket}/x", b"")
    storage.put(f"{s3_bucket}/x", b"")


def test_an_unknown_profile_is_named(s3_server: S3Server) -> None:
    with pytest.raises(AccessError, match="nobody"):
        s3_server.storage(profile="nobody").read("s3://bucket/x")


def test_a_profile_gives_the_credentials(
    faulty_moto: tuple[Place, FaultyProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, proxy = faulty_moto
    (tmp_path / "credentials").write_text(
        "[night]\naws_access_key_id = nightkey\naws_secret_access_key = x\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    Storage(StorageOptions(proxy.endpoint_url, profile="night")).put(place.at("x"), b"")
    assert "Credential=nightkey/" in proxy.seen[-1].headers["authorization"]


def test_anonymous_requests_are_not_signed(
    faulty_moto: tuple[Place, FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, proxy = faulty_moto
    bucket = place.uri.removeprefix("s3://")
    connect(proxy.endpoint_url).put_object(
        Bucket=bucket, Key="x", Body=b"public", ACL="public-read"
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    anonymous = Storage(StorageOptions(proxy.endpoint_url, anonymous=True))
    assert anonymous.read(place.at("x")) == b"public"
    assert "authorization" not in proxy.seen[-1].headers


def test_every_request_says_that_the_requester_pays(
    faulty_moto: tuple[Place, FaultyProxy],
) -> None:
    place, proxy = faulty_moto
    storage = Storage(StorageOptions(proxy.endpoint_url, requester_pays=True))
    storage.put(place.at("x"), b"1")
    storage.read(place.at("x"))
    storage.stat(place.at("x"))
    storage.list_objects(place.uri)
    assert {seen.headers.get("x-amz-request-payer") for seen in proxy.seen} == {"requester"}


def test_the_endpoint_of_the_environment_is_used(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    Storage().put(f"{s3_bucket}/x", b"1")
    assert s3_server.storage().read(f"{s3_bucket}/x") == b"1"


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("localhost:9000", "write it as https://host:port"),
        ("http://key:secret@localhost:9000", "holds credentials; set them as"),
    ],
)
def test_a_bad_endpoint_is_refused_without_repeating_its_secrets(endpoint: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as refusal:
        Storage(StorageOptions(endpoint_url=endpoint)).read("s3://bucket/x")
    assert "secret@" not in str(refusal.value)


def test_a_missing_bucket_is_an_error_even_for_a_listing(s3_server: S3Server) -> None:
    with pytest.raises(ObjectMissingError, match=r"'s3://no-such-bucket/x.*check the bucket"):
        s3_server.storage().list_objects("s3://no-such-bucket/x")
    with pytest.raises(ObjectMissingError, match="is a bucket, not an object; add a key"):
        s3_server.storage().read("s3://no-such-bucket")


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(StorageError, match=r"nope:// is no protocol that is known; give a path"):
        Storage().read("nope://x/y")


def test_no_secret_shows_in_text_or_pickles(
    s3_server: S3Server, s3_bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage = s3_server.storage()
    storage.put(f"{s3_bucket}/x", b"1")
    with pytest.raises(ObjectMissingError) as missing:
        storage.read(f"{s3_bucket}/none")
    filesystem, _ = storage.arrow_filesystem(s3_bucket)
    written = [repr(storage), str(missing.value), caplog.text]
    written += [repr(pickle.dumps(storage)), repr(pickle.dumps(filesystem))]
    for secret in (os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"]):
        assert not any(secret in text for text in written)
    assert pickle.loads(pickle.dumps(storage)).read(f"{s3_bucket}/x") == b"1"


def test_folder_markers_are_not_objects(s3_server: S3Server, s3_bucket: str) -> None:
    storage = s3_server.storage()
    store = storage._store(s3_bucket)
    for name in ("folder/", "folder/x", f"folder/{conditional.name_lock('x')}"):
        store.put(f"{s3_bucket}/{name}", b"")
    assert [info.uri for info in storage.list_objects(s3_bucket)] == [f"{s3_bucket}/folder/x"]


def test_a_listing_goes_over_many_pages(
    faulty: tuple[Place, FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, proxy = faulty
    monkeypatch.setattr(s3, "_LIST_PAGE", 4)
    names = [f"{number:03}" for number in range(10)]
    for name in names:
        place.storage.put(place.at(name), b"")
    proxy.clear()
    proxy.inject(Fault("slow_down", method="GET", skip=1))
    listed = place.storage.list_objects(place.uri)
    assert [info.uri for info in listed] == [place.at(name) for name in names]
    assert proxy.count("GET") == 4  # three pages, one of them twice


# --- Local files


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of a user who is not root, and the rights of that user."""
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_a_folder_without_permission_is_an_access_error(unprivileged: Path) -> None:
    storage, uri = Storage(), str(unprivileged / "x")
    storage.put(uri, b"1")
    unprivileged.chmod(0o500)
    for call in (
        lambda: storage.put(uri, b"2"),
        lambda: storage.put_if_absent(str(unprivileged / "y"), b"2"),
        lambda: storage.delete([uri]),
        lambda: storage.put(str(unprivileged / "new" / "y"), b"2"),
    ):
        with pytest.raises(AccessError, match=f"'{unprivileged}.*give this user the permission"):
            call()
    assert [file.name for file in unprivileged.iterdir()] == ["x"]
    (unprivileged / "x").chmod(0o000)
    with pytest.raises(AccessError, match=f"cannot read '{uri}'"):
        storage.read(uri)
    unprivileged.chmod(0o000)
    with pytest.raises(AccessError, match=f"cannot list '{unprivileged}'"):
        storage.list_objects(str(unprivileged))


WRITE_TOO_MUCH = """
import resource, signal, sys
from pipeline.errors import StorageError
from pipeline.storage import Storage
if sys.argv[2] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    Storage().put(sys.argv[1], bytes(3_000_000))
except StorageError as error:
    print(error)
"""


def test_a_file_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    uri = str(tmp_path / "x")
    command = [sys.executable, "-c", WRITE_TOO_MUCH, uri, "limit"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"cannot write '{uri}': File too large; free some space there" in said
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=1m none {tmp_path} || exit 9; "
    script = f'{mount} "$0" -c "$1" {tmp_path}/x disk; ls -A {tmp_path}'
    command = ["unshare", "-rm", "sh", "-c", script, sys.executable, WRITE_TOO_MUCH]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    assert f"cannot write '{tmp_path}/x': No space left on device; free some space" in lines[0]


WRITE_AND_WAIT = """
import sys
from pathlib import Path
from pipeline.storage.local import write_atomically
with write_atomically(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_a_killed_writer_leaves_nothing_that_anybody_sees(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_AND_WAIT, str(tmp_path / "x")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        assert Storage().list_objects(str(tmp_path)) == []
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 1
    assert Storage().list_objects(str(tmp_path)) == []
    assert not Storage().exists(str(tmp_path / "x"))


def test_lock_files_are_not_listed(tmp_path: Path) -> None:
    Storage().put_if_absent(str(tmp_path / "x"), b"")
    assert len(list(tmp_path.iterdir())) == 2
    assert [info.uri for info in Storage().list_objects(str(tmp_path))] == [str(tmp_path / "x")]


def test_other_hidden_files_are_listed(tmp_path: Path) -> None:
    for name in (".hidden.jpg", ".~draft"):
        (tmp_path / name).touch()
    assert len(Storage().list_objects(str(tmp_path))) == 2


def test_the_longest_file_names_can_be_written(tmp_path: Path) -> None:
    uri = str(tmp_path / ("x" * 255))
    Storage().put_if_absent(uri, b"1")
    assert Storage().read(uri) == b"1"


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"1")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    names = {
        str(Path(info.uri).relative_to(tmp_path)) for info in Storage().list_objects(str(tmp_path))
    }
    assert {"real/x", "folder/x"} <= names
    assert all(len(Path(name).parts) < 6 for name in names)


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "ok.jpg").touch()
    found, failed = Storage().survey(str(tmp_path))
    assert [info.uri for info in found] == [str(tmp_path / "ok.jpg")]
    assert [entry.uri for entry in failed] == [f"{tmp_path}/\\xff.jpg"]
    with pytest.raises(StorageError, match=r"xff.jpg'.*its name is not UTF-8; rename it"):
        Storage().list_objects(str(tmp_path))


def test_what_cannot_be_looked_at_is_named_and_everything_else_is_listed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    found, failed = Storage().survey(str(tmp_path))
    names = [(info.uri.removeprefix(f"{tmp_path}/"), info.size_bytes) for info in found]
    assert names == [("pipe", -1), ("sub/x", 0)]
    assert [entry.uri for entry in failed] == [f"{tmp_path}/circle", f"{tmp_path}/dangling"]
    assert "Too many levels of symbolic links" in failed[0].reason
    assert "leads nowhere" in failed[1].reason
    for name in ("circle", "dangling"):
        (tmp_path / name).unlink()
    assert Storage().survey(str(tmp_path))[1] == []
    assert [info.uri for info in Storage().list_objects(str(tmp_path))] == [f"{tmp_path}/sub/x"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may look everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "x").touch()
    found, failed = Storage().survey(str(tmp_path))
    assert [info.uri for info in found] == [f"{tmp_path}/x"]
    assert [entry.uri for entry in failed] == [f"{tmp_path}/closed"]
    assert "Permission denied" in failed[0].reason


@pytest.mark.parametrize("change", ["shorter", "longer", "same length", "emptied"])
def test_a_local_file_written_over_while_it_is_read_is_noticed(tmp_path: Path, change: str) -> None:
    path, size = tmp_path / "x", 3 << 20
    path.write_bytes(bytes(size))
    version = Storage().stat(str(path)).version
    with Storage().open_stream(str(path), version=version) as stream:
        assert stream.read(1000) == bytes(1000)
        sizes = {"shorter": 5 << 19, "longer": size + 9, "same length": size, "emptied": 0}
        with path.open("r+b") as file:  # in place: the open file sees it
            file.truncate(sizes[change])
            file.write(b"x" * sizes[change])
        os.utime(path, ns=(0, 1))  # whatever the tick of the clock
        with pytest.raises(ObjectChangedError, match=r"has changed: version .* was expected"):
            stream.read()
    with Storage().open_random(str(path)) as file:
        assert file.read() == b"x" * sizes[change]


def test_a_local_file_that_is_replaced_while_it_is_read_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(3 << 20))
    with Storage().open_stream(str(path)) as stream:
        stream.read(1000)
        Storage().put(str(path), b"new")
        assert stream.read() == bytes((3 << 20) - 1000)


def test_a_disk_that_refuses_a_read_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/proc/self/mem")  # gives EIO at its start
    with (
        Storage().open_stream(str(tmp_path / "x")) as stream,
        pytest.raises(StorageError, match=r"cannot read .*x': Input/output error; check the disk"),
    ):
        stream.read(10)


# In a process of its own: a server that another test runs in a thread of this one would die of it.
READ_WITHOUT_DESCRIPTORS = """
import logging, resource, sys
from pipeline.config import StorageOptions
from pipeline.errors import UnreachableError
from pipeline.log import LOG
from pipeline.storage import Storage
LOG.addHandler(logging.StreamHandler(sys.stdout))
storage = Storage(StorageOptions(storage_attempts=3))
storage.read(sys.argv[1] + "/x"), storage.survey(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
for attempt in (lambda: storage.read(sys.argv[1] + "/x"), lambda: storage.survey(sys.argv[1])):
    try:
        attempt()
    except UnreachableError as error:
        print("refused:", error)
"""


def test_a_shortage_of_file_descriptors_is_tried_again_and_then_the_machines_fault(
    tmp_path: Path,
) -> None:
    (tmp_path / "x").write_bytes(b"1")
    command = [sys.executable, "-c", READ_WITHOUT_DESCRIPTORS, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    refused = [line for line in said.splitlines() if line.startswith("refused:")]
    assert len(refused) == 2
    assert all("failed 3 times" in line and "Too many open files" in line for line in refused)
    assert said.count("storage retry") == 4


def test_a_path_through_a_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not Storage().exists(str(tmp_path / "file" / "x"))
    assert Storage().list_objects(str(tmp_path / "file" / "x")) == []


def test_a_source_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    version = Storage().stat(str(tmp_path / "x")).version
    (tmp_path / "x").write_bytes(b"01234")
    with pytest.raises(ObjectChangedError, match="has changed"):
        Storage().read_range(str(tmp_path / "x"), 0, 5, version=version)


# --- Retries


def test_waits_double_are_jittered_and_bounded() -> None:
    waits = [retry_module._choose_wait(attempt) for attempt in range(1, 30)]
    for attempt, wait in enumerate(waits, 1):
        longest = min(retry_module.LONGEST_WAIT_S, retry_module.FIRST_WAIT_S * 2 ** (attempt - 1))
        assert longest / 2 <= wait <= longest


def test_a_fault_in_our_own_code_is_not_tried_again() -> None:
    calls = itertools.count()

    def fail() -> None:
        next(calls)
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        retry(fail, action="read", uri="x", attempts=5)
    assert next(calls) == 1


def test_passing_faults_of_a_file_system_are_tried_again(tmp_path: Path) -> None:
    outcomes = iter([OSError(116, "Stale file handle"), RetryError("busy"), None])

    def call() -> str:
        error = next(outcomes)
        if error is not None:
            raise error
        return "done"

    assert retry(call, action="read", uri="x", attempts=3) == "done"


def test_a_final_error_keeps_its_cause_and_is_never_its_own() -> None:
    first = StorageError("no")

    def fail() -> None:
        raise first

    with pytest.raises(StorageError) as raised:
        retry(fail, action="read", uri="x", attempts=2)
    assert raised.value is first
    assert first.__cause__ is None
    with pytest.raises(ObjectMissingError) as missing:
        Storage().read("/nowhere/x")
    assert isinstance(missing.value.__cause__, FileNotFoundError)
    assert str(pickle.loads(pickle.dumps(missing.value))) == str(missing.value)


def test_no_attempts_at_all_are_refused() -> None:
    with pytest.raises(SettingsError, match="storage_attempts is 0; it must be at least 1"):
        StorageOptions(storage_attempts=0)


def test_local_paths_need_no_connection() -> None:
    assert isinstance(Storage()._store("/x"), LocalStore)
