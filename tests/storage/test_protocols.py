"""URIs of other protocols: read, or refused in one line that says what to do."""

import functools
import http.server
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from importlib import import_module
from pathlib import Path

import pytest
from pictures import make_jpeg, write_tar

from pipeline.config import StorageOptions
from pipeline.errors import AccessError, SettingsError, StorageError, UnreachableError
from pipeline.storage import Storage, normalise_uri

STORAGE = Storage(StorageOptions(storage_attempts=2))
retry_module = import_module("pipeline.storage.retry")


class _Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder as Python's own server does, with ranges where ``ranges`` is set."""

    ranges = True

    def send_head(self):
        if "secret" in self.path or "busy" in self.path:
            denied = "secret" in self.path
            status = HTTPStatus.FORBIDDEN if denied else HTTPStatus.SERVICE_UNAVAILABLE
            self.send_error(status)
            return None
        wanted = self.headers.get("Range")
        if not (self.ranges and wanted):
            return super().send_head()
        start, stop = wanted.removeprefix("bytes=").split("-")
        data = Path(self.translate_path(self.path)).read_bytes()
        part = data[int(start) : int(stop) + 1]
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serve(folder: Path, *, ranges: bool = True) -> Iterator[str]:
    handler = type("Handler", (_Files,), {"ranges": ranges})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "FIRST_WAIT_S", 0.01)


def test_an_object_of_a_web_server_is_listed_and_read_in_ranges(tmp_path: Path):
    data = os.urandom(9 << 20)
    (tmp_path / "x.tar").write_bytes(data)
    with serve(tmp_path) as url:
        (info,) = STORAGE.list_objects(f"{url}/x.tar")
        assert (info.uri, info.size_bytes) == (f"{url}/x.tar", len(data))
        assert STORAGE.read_range(info.uri, 5, 7, version=info.version) == data[5:12]
        with STORAGE.open_stream(info.uri, version=info.version) as stream:
            assert stream.read() == data
        assert STORAGE.list_objects(f"{url}/nope.tar") == []


def test_a_server_without_ranges_gives_small_objects_and_is_refused_for_large_ones(
    tmp_path: Path,
):
    (tmp_path / "small.tar").write_bytes(b"small")
    (tmp_path / "large.tar").write_bytes(bytes(9 << 20))
    with serve(tmp_path, ranges=False) as url:
        assert STORAGE.read(f"{url}/small.tar") == b"small"
        with pytest.raises(StorageError, match="sends all of it where a part is asked for; copy"):
            STORAGE.open_stream(f"{url}/large.tar")


def test_a_folder_of_a_web_server_is_refused_with_what_to_give_instead(tmp_path: Path):
    write_tar(tmp_path / "000.tar", [("a.jpg", make_jpeg(0))])
    with serve(tmp_path) as url:
        with pytest.raises(StorageError, match=r"is a web page, .* or a list of them in a \.txt"):
            STORAGE.list_objects(url)
        with pytest.raises(AccessError, match="HTTP status 403"):
            STORAGE.list_objects(f"{url}/secret.tar")
        with pytest.raises(UnreachableError, match="503"):
            STORAGE.list_objects(f"{url}/busy.tar")
    with pytest.raises(UnreachableError, match=r"failed 2 times.*Cannot connect"):
        STORAGE.list_objects(f"{url}/000.tar")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("ftp://host/a.tar", "ftp:// is not read; copy the files to a folder or a bucket first"),
        ("sftp://host/a.tar", "sftp:// cannot be read here: .*; copy the files"),
        ("github://org:repo@/x", "github:// is not read; copy"),
        ("webhdfs://host/x", "webhdfs:// is not read; copy"),
        ("nosuch://x", "nosuch:// is no protocol that is known; give a path, or a URI that"),
        ("hf://datasets/a/b/x.tar", "failed 2 times|cannot|no such"),
        ("az://container/one.tar", "az:// cannot be read here: .*; run pip install adlfs"),
        ("gs://bucket/one.tar", "gs:// cannot be read here: .*; run pip install gcsfs"),
    ],
)
def test_a_protocol_that_is_not_read_is_one_line_with_what_to_do(
    uri: str, words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for package in ("adlfs", "gcsfs", "paramiko"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(StorageError, match=words) as told:
        STORAGE.list_objects(uri)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3:/bucket/x", "too few or too many slashes; write s3://bucket/x"),
        ("https:///host/x", "too few or too many slashes; write https://host/x"),
        ("s3://", "names nothing; add the bucket"),
        ("pipe:curl https://host/x.tar", "is a command, and none is run"),
        ("zip://x.jpg::s3://bucket/a.zip", "chains protocols; give the URI of the object itself"),
        ("filecache::s3://bucket/a.tar", "chains protocols"),
    ],
)
def test_what_looks_like_a_uri_is_refused_with_what_to_write(text: str, words: str):
    with pytest.raises(SettingsError, match=words):
        normalise_uri(text)


@pytest.mark.parametrize(
    "uri", ["s3://b/a::b://c.jpg", "s3://b/a//c.jpg", "/data/zip::x", "/s3:/x"]
)
def test_odd_keys_and_paths_are_not_taken_for_other_uris(uri: str):
    assert normalise_uri(uri) == uri
