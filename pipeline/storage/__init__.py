"""The door to object storage: list, stream, atomic and conditional writes, ranged reads.

Local paths, ``s3://`` and every other fsspec protocol look the same here. Passing faults
(throttling, resets, time-outs, short answers) are tried again, a bounded number of times; what
cannot be helped becomes a ``StorageError`` that names the URI and the remedy.
"""

import functools
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast
from urllib.parse import unquote, urlsplit

import pyarrow.fs
from fsspec import filesystem as open_filesystem  # the module's name is a module's here

from pipeline.config import StorageOptions
from pipeline.errors import ObjectMissingError, SettingsError, StorageError
from pipeline.records import FailedObject, ObjectInfo
from pipeline.storage.arrow import ArrowHandler
from pipeline.storage.fsspec import connect_other
from pipeline.storage.local import LocalStore, write_atomically
from pipeline.storage.ranges import Fetch, ObjectReader, Span, read_span
from pipeline.storage.retry import retry
from pipeline.storage.s3 import S3Store

T = TypeVar("T")

_READ_AHEAD_BYTES = 8 << 20
_CONNECTIONS = 64
_ODD_SLASHES = re.compile(r"(s3a?|gs|gcs|az|abfss?|hf|https?):/+(?=[^/])")
_CHAIN = re.compile(
    r"(zip|tar|libarchive|reference|dir|cached|filecache|simplecache|blockcache)(://.*)?::\w+:"
)
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


class Store(Protocol):
    """One kind of store: every call is one try, and raises whatever its library raises."""

    def list_objects(self, uri: str) -> Sequence[ObjectInfo | FailedObject]: ...  # noqa: D102
    def stat(self, uri: str) -> ObjectInfo: ...  # noqa: D102
    def fetch(  # noqa: D102
        self, uri: str, *, start: int, stop: int | None, version: str | None
    ) -> Span: ...
    def put(self, uri: str, data: bytes) -> None: ...  # noqa: D102
    def put_if(  # noqa: D102
        self, uri: str, data: bytes, *, version: str | None, write_id: str
    ) -> str: ...
    def conditional_version(self, data: bytes, version: str, /) -> str: ...  # noqa: D102
    def delete(self, uris: Iterable[str]) -> None: ...  # noqa: D102
    def delete_if(self, uri: str, *, version: str) -> None: ...  # noqa: D102
    def upload(self, local_path: Path, uri: str) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Storage:
    """Objects by URI. Holds settings only, so it pickles; connections belong to each process.

    Every method may raise ``StorageError`` (refused for good, or failed ``storage_attempts``
    times) and its ``AccessError``; the docstrings name what a caller may want to tell apart.

    Attributes:
        options: Endpoint, profile, attempts, time-out. Credentials come from the environment.
    """

    options: StorageOptions = field(default_factory=StorageOptions)

    def list_objects(self, uri: str) -> list[ObjectInfo]:
        """Return what lies under a prefix or folder, or the one object itself, sorted by URI.

        Always asks the store. Empty where nothing is there. Folder markers and unfinished local
        files are left out; characters such as ``*`` have no meaning.

        Raises:
            ObjectMissingError: The bucket does not exist.
            StorageError: Something that lies there cannot be looked at.
        """
        found, failed = self.survey(uri)
        if failed:
            raise StorageError(f"cannot list {failed[0].uri!r}: {failed[0].reason}")
        return [info for info in found if info.size_bytes >= 0]

    def survey(self, uri: str) -> tuple[list[ObjectInfo], list[FailedObject]]:
        """List like ``list_objects``, and return apart what cannot be looked at, with reasons.

        Pipes, sockets and devices are among the objects, with a size of -1.

        Raises:
            ObjectMissingError: The bucket does not exist.
        """
        uri = normalise_uri(uri)
        entries = self._try("list", uri, lambda store: store.list_objects(uri))
        found = [entry for entry in entries if isinstance(entry, ObjectInfo)]
        failed = [entry for entry in entries if isinstance(entry, FailedObject)]
        return sorted(found, key=lambda o: o.uri), sorted(failed, key=lambda o: o.uri)

    def list_unfinished(self, uri: str) -> list[ObjectInfo]:
        """Return the files that writers have begun under a folder, or were killed over.

        Local files only: elsewhere nothing shows before it is whole, and what was uploaded of the
        rest is cleared away by a rule of the bucket.
        """
        uri = normalise_uri(uri)
        store = self._store(uri)
        if not isinstance(store, LocalStore):
            return []
        return sorted(store.list_unfinished(uri), key=lambda info: info.uri)

    def stat(self, uri: str) -> ObjectInfo:
        """Describe one object.

        Raises:
            ObjectMissingError: It does not exist.
        """
        uri = normalise_uri(uri)
        return self._try("look up", uri, lambda store: store.stat(uri))

    def exists(self, uri: str) -> bool:
        """Tell whether the object is there."""
        try:
            self.stat(uri)
        except ObjectMissingError:
            return False
        return True

    def read(self, uri: str) -> bytes:
        """Return a whole object.

        Raises:
            ObjectMissingError: It does not exist.
            ObjectChangedError: It was replaced meanwhile.
        """
        return self._read_whole(normalise_uri(uri)).data

    def read_versioned(self, uri: str) -> tuple[bytes, str]:
        """Return a whole object and the version to pass to ``put_if_version``.

        That version is the etag, or a digest of the content where there are no etags; only on S3
        is it the one that ``stat`` and ``list_objects`` show.

        Raises:
            ObjectMissingError: It does not exist.
            ObjectChangedError: It was replaced meanwhile.
        """
        uri = normalise_uri(uri)
        span = self._read_whole(uri)
        return span.data, self._store(uri).conditional_version(span.data, span.version)

    def read_range(
        self, uri: str, offset: int, nbytes: int, *, version: str | None = None
    ) -> bytes:
        """Return exactly ``nbytes`` bytes from ``offset``.

        Args:
            uri: The object.
            offset: Position of the first byte.
            nbytes: How many.
            version: Accept this version only, as listed; any where None.

        Raises:
            ObjectMissingError: It does not exist.
            ObjectChangedError: It is no longer ``version``.
            StorageError: It ends before ``offset + nbytes``.
        """
        if offset < 0 or nbytes < 0:
            raise ValueError(f"range {offset}+{nbytes} of {uri!r} is negative")
        if nbytes == 0:
            return b""
        fetch = self._fetcher(normalise_uri(uri))
        span = read_span(fetch, start=offset, stop=offset + nbytes, version=version)
        if len(span.data) != nbytes:
            raise StorageError(
                f"cannot read {nbytes} bytes of {uri!r} from byte {offset}: it has only "
                f"{span.size_bytes}; list it again"
            )
        return span.data

    def open_stream(self, uri: str, *, version: str | None = None) -> BinaryIO:
        """Open an object to read it from start to end, 8 MiB at a time.

        Goes on where it was after resets and short answers. All bytes are of one version:
        ``version`` as listed or, where None, the one that is there now.

        Raises:
            ObjectMissingError: It does not exist.
            ObjectChangedError: It is not ``version``, or (from a read) was replaced meanwhile.
        """
        uri = normalise_uri(uri)
        store = self._store(uri)
        if isinstance(store, LocalStore):
            size = _READ_AHEAD_BYTES // 8
            return self._try("open", uri, lambda _: store.open(uri, version, buffer_bytes=size))
        reader = ObjectReader(self._fetcher(uri), size_bytes=None, version=version)
        stream = io.BufferedReader(reader, _READ_AHEAD_BYTES)
        stream.peek(1)  # a missing object shows here rather than at some later read
        return cast(BinaryIO, stream)

    def open_random(self, uri: str, *, version: str | None = None) -> BinaryIO:
        """Open an object to read here and there, one request a read, as Parquet readers do.

        Raises:
            ObjectMissingError: It does not exist.
            ObjectChangedError: It is not ``version``, or (from a read) was replaced meanwhile.
        """
        uri = normalise_uri(uri)
        store = self._store(uri)
        if isinstance(store, LocalStore):
            size = io.DEFAULT_BUFFER_SIZE
            return self._try("open", uri, lambda _: store.open(uri, version, buffer_bytes=size))
        info = self.stat(uri)
        reader = ObjectReader(
            self._fetcher(uri), size_bytes=info.size_bytes, version=version or info.version
        )
        return cast(BinaryIO, reader)

    def put(self, uri: str, data: bytes) -> None:
        """Write an object, replacing what is there; nobody ever sees half of it."""
        uri = normalise_uri(uri)
        self._try("write", uri, lambda store: store.put(uri, data))

    def put_if_absent(self, uri: str, data: bytes) -> str:
        """Write an object that must not exist yet; return its version for ``put_if_version``.

        Raises:
            ConflictError: It exists.
        """
        return self._put_if(normalise_uri(uri), data, version=None)

    def put_if_version(self, uri: str, data: bytes, version: str) -> str:
        """Replace an object that must still be ``version``; return its new version.

        Args:
            uri: The object.
            data: Its new content.
            version: From ``read_versioned``, ``put_if_absent`` or ``put_if_version``.

        Raises:
            ConflictError: It has changed, or is gone.
        """
        return self._put_if(normalise_uri(uri), data, version=version)

    def delete(self, uris: Iterable[str]) -> None:
        """Delete objects; missing ones are fine."""
        by_store: dict[str, list[str]] = {}
        for uri in map(normalise_uri, uris):
            by_store.setdefault(_split_protocol(uri)[0], []).append(uri)
        for group in by_store.values():
            self._try("delete", group[0], functools.partial(_delete_all, uris=group))

    def delete_if_version(self, uri: str, version: str) -> None:
        """Delete an object if it is still ``version``; otherwise leave it, silently.

        A process that was paused just before does no harm to what others have written since. Some
        S3 stores know no such condition, and delete whatever is there.

        Args:
            uri: The object.
            version: From ``read_versioned``, ``put_if_absent`` or ``put_if_version``.
        """
        uri = normalise_uri(uri)
        self._try("delete", uri, lambda store: store.delete_if(uri, version=version))

    def upload(self, local_path: Path, uri: str) -> None:
        """Copy a local file to an object, without holding all of it in memory."""
        uri = normalise_uri(uri)
        self._try("write", uri, lambda store: store.upload(local_path, uri))

    def download(self, uri: str, local_path: Path) -> None:
        """Copy an object to a local file, which appears whole or not at all.

        Raises:
            ObjectMissingError: It does not exist.
            ObjectChangedError: It was replaced meanwhile.
        """
        with self.open_stream(uri) as source:
            copy = functools.partial(_copy_to, source=source, local_path=local_path)
            retry(copy, action="write", uri=str(local_path), attempts=1)

    def arrow_filesystem(self, uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return a read-only Arrow file system, and the path of ``uri`` in it."""
        uri = normalise_uri(uri)
        if isinstance(self._store(uri), LocalStore):
            return pyarrow.fs.LocalFileSystem(), uri
        return pyarrow.fs.PyFileSystem(ArrowHandler(self)), uri

    def _read_whole(self, uri: str) -> Span:
        return read_span(self._fetcher(uri), start=0, stop=None, version=None)

    def _fetcher(self, uri: str) -> Fetch:
        def fetch(start: int, stop: int | None, *, version: str | None) -> Span:
            return self._try(
                "read",
                uri,
                lambda store: store.fetch(uri, start=start, stop=stop, version=version),
            )

        return fetch

    def _put_if(self, uri: str, data: bytes, *, version: str | None) -> str:
        write_id = uuid.uuid4().hex  # the same for all tries, so that they know each other
        return self._try(
            "write",
            uri,
            lambda store: store.put_if(uri, data, version=version, write_id=write_id),
        )

    def _try(self, action: str, uri: str, call: Callable[[Store], T]) -> T:
        attempts = self.options.storage_attempts
        return retry(lambda: call(self._store(uri)), action=action, uri=uri, attempts=attempts)

    def _store(self, uri: str) -> Store:
        # Connections survive neither a fork nor new credentials in the environment.
        protocol = _split_protocol(uri)[0]
        environment = _read_environment() if protocol == "s3" else ()
        return _connect((os.getpid(), environment), protocol, self.options)


def normalise_uri(text: str) -> str:
    """Return the one spelling of a URI: an absolute path, or a URI without trailing slash.

    ``file://`` and relative paths become absolute paths, ``s3a://`` becomes ``s3://``.

    Raises:
        SettingsError: The text is empty, names no bucket, or is a URI of another program's making.
    """
    if not text.strip():
        raise SettingsError("a URI is empty; give a path, or a URI such as s3://bucket/prefix")
    _refuse_lookalikes(text)
    protocol, rest = _split_protocol(text)
    if protocol == "file":
        path = unquote(rest.removeprefix("localhost")) if "://" in text else rest
        return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111
    return f"{protocol}://{rest.rstrip('/')}"


def _refuse_lookalikes(text: str) -> None:
    slashes = _ODD_SLASHES.match(text)
    if slashes and slashes[0] != f"{slashes[1]}://":
        fixed = f"{slashes[1]}://{text[len(slashes[0]) :]}"
        raise SettingsError(f"{text!r} has too few or too many slashes; write {fixed}")
    if text.startswith("pipe:"):
        raise SettingsError(f"{text!r} is a command, and none is run; give the URIs it would read")
    if _CHAIN.match(text):
        raise SettingsError(f"{text!r} chains protocols; give the URI of the object itself")
    if text in ("s3://", "gs://", "az://", "hf://", "http://", "https://"):
        raise SettingsError(f"{text!r} names nothing; add the bucket or host, and the path there")


def join_uri(base: str, *parts: str) -> str:
    """Return ``base`` with parts under it, one slash between each."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts if part.strip("/"))])


def _split_protocol(uri: str) -> tuple[str, str]:
    match = _PROTOCOL.fullmatch(uri)
    if match is None:
        return "file", uri
    protocol = match[1].lower()
    return {"s3a": "s3", "s3n": "s3", "local": "file"}.get(protocol, protocol), match[2]


def _delete_all(store: Store, *, uris: list[str]) -> None:
    store.delete(uris)


def _copy_to(*, source: BinaryIO, local_path: Path) -> None:
    with write_atomically(local_path) as target:
        shutil.copyfileobj(source, target, _READ_AHEAD_BYTES)


def _read_environment() -> tuple[tuple[str, str], ...]:
    return tuple(item for item in os.environ.items() if item[0][:4] == "AWS_")


@functools.lru_cache(maxsize=32)
def _connect(
    _place: tuple[int, tuple[object, ...]], protocol: str, options: StorageOptions
) -> Store:
    if protocol == "file":
        return LocalStore()
    if protocol == "s3":
        return S3Store(_connect_s3(options), attempts=options.storage_attempts)
    return connect_other(protocol)


def _connect_s3(options: StorageOptions) -> Any:
    _check_endpoint(options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL"))
    filesystem = open_filesystem(
        "s3",
        anon=options.anonymous,
        endpoint_url=options.endpoint_url,
        profile=options.profile,
        requester_pays=options.requester_pays,
        config_kwargs={
            "connect_timeout": min(10.0, options.storage_timeout_s),
            "read_timeout": options.storage_timeout_s,
            "max_pool_connections": _CONNECTIONS,
            # Retries are ours alone: a conditional write must know of each of its tries.
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            # Many stores other than AWS do not understand the newer checksum trailers.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    filesystem.retries = 1
    return filesystem


def _check_endpoint(endpoint: str | None) -> None:
    parts = urlsplit(endpoint or "https://aws")
    if parts.username or parts.password:
        raise SettingsError(
            "the S3 endpoint's URL holds credentials; set them as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(f"the S3 endpoint is {endpoint!r}; write it as https://host:port")
