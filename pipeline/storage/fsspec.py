"""Every other protocol, as its fsspec file system does it."""

import errno
import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
from fsspec import available_protocols, get_filesystem_class
from fsspec import filesystem as open_filesystem
from fsspec.registry import known_implementations

from pipeline.errors import (
    AccessError,
    ConflictError,
    ObjectChangedError,
    PipelineError,
    ProtocolError,
    RetryError,
    StorageError,
)
from pipeline.records import ObjectInfo, digest_json
from pipeline.storage.ranges import Span

# fmt: off
_VERSION_FIELDS = (
    "generation", "etag", "ETag", "md5Hash", "content_md5", "ino", "version_id", "blob_id",
    "Content-MD5", "Last-Modified",
)
# fmt: on
_TIME_FIELDS = ("mtime", "updated", "last_modified", "LastModified", "created")
_memory_lock = threading.Lock()
_PACKAGES = {"adlfs": ("abfs", "abfss", "adl", "az"), "gcsfs": ("gcs", "gs")}
_COPY_FIRST = "copy the files to a folder or a bucket first, e.g. with rclone, and give that"
_STATUS_DENIED = (401, 403)


def connect_other(protocol: str) -> "OtherStore":
    """Open the store of a protocol.

    Raises:
        ProtocolError: The protocol is unknown, is not read, or needs a package that is missing.
        StorageError: Its settings are lacking.
    """
    if protocol not in available_protocols():
        raise ProtocolError(
            f"{protocol}:// is no protocol that is known; give a path, or a URI that starts with "
            "s3://, gs://, az://, hf:// or https://"
        )
    package = next((name for name, known in _PACKAGES.items() if protocol in known), None)
    try:
        kind = get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        told = known_implementations.get(protocol, {}).get("err") or str(error)
        remedy = f"run pip install {package}" if package else _COPY_FIRST
        raise ProtocolError(f"{protocol}:// cannot be read here: {told}; {remedy}") from error
    if _needs_more_than_a_uri(kind):
        raise ProtocolError(f"{protocol}:// is not read; {_COPY_FIRST}")
    try:
        filesystem = open_filesystem(protocol, use_listings_cache=False)
    except Exception as error:  # each has settings of its own, and its own way to ask for them
        raise StorageError(
            f"{protocol}:// cannot be read here: {_describe_error(error)}; {_COPY_FIRST}"
        ) from error
    return OtherStore(filesystem, protocol=protocol)


def _needs_more_than_a_uri(kind: type) -> bool:
    _, *parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _describe_error(error: BaseException) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


@contextmanager
def _explaining(action: str, uri: str) -> Iterator[None]:
    """Turn what the many file systems raise into errors that ``retry`` knows."""
    try:
        yield
    except (PipelineError, aiohttp.ClientError, TimeoutError):
        raise
    except FileNotFoundError as error:
        _raise_hidden_cause(error)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in _STATUS_DENIED:
            raise AccessError(
                f"cannot {action} {uri!r}: {_describe_error(error)}; log in, or ask for access"
            ) from error
        if status in (408, 429) or (status or 0) >= 500 or _is_of_transport(error):
            raise RetryError(_describe_error(error)) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise StorageError(
            f"cannot {action} {uri!r}: {_describe_error(error)}; check the URI, or {_COPY_FIRST}"
        ) from error


def _raise_hidden_cause(error: FileNotFoundError) -> NoReturn:
    """Raise what is behind an absence: fsspec calls every failure of a web server one."""
    cause = error.__cause__
    if isinstance(cause, aiohttp.ClientResponseError):
        if cause.status in _STATUS_DENIED:
            raise PermissionError(errno.EACCES, f"HTTP status {cause.status}") from error
        if cause.status in (408, 429) or cause.status >= 500:
            raise cause
    elif isinstance(cause, (aiohttp.ClientError, TimeoutError)):
        raise cause
    raise error


def _is_of_transport(error: Exception) -> bool:
    # httpx, which the hub's client uses, is not ours to import
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)


class OtherStore:
    """Objects of a protocol without a store of its own; only ``memory`` has conditional writes."""

    def __init__(self, filesystem: Any, *, protocol: str) -> None:
        self._filesystem = filesystem
        self._protocol = protocol

    def list_objects(self, uri: str) -> list[ObjectInfo]:
        """Return the objects under a prefix, or the one object."""
        with _explaining("list", uri):
            try:
                return [self.stat(uri)]
            except FileNotFoundError:
                if self._protocol in ("http", "https"):
                    return []
            try:
                found = self._filesystem.find(uri, detail=True)
            except FileNotFoundError:
                return []
            return [self._describe(info) for info in found.values() if info["type"] == "file"]

    def stat(self, uri: str) -> ObjectInfo:
        """Describe one object."""
        with _explaining("look up", uri):
            self._filesystem.invalidate_cache()
            info = self._filesystem.info(uri)
            if info["type"] != "file":
                raise FileNotFoundError(errno.ENOENT, "a folder, not an object")
        self._refuse_web_pages(uri, info)
        return self._describe(info)

    def _refuse_web_pages(self, uri: str, info: dict[str, Any]) -> None:
        if self._protocol not in ("http", "https"):
            return
        if info.get("mimetype") == "text/html":
            raise StorageError(
                f"{uri!r} is a web page, and web servers list no folders; give the URLs of the "
                "shards themselves, a brace range such as https://host/{000..127}.tar, or a list "
                "of them in a .txt file"
            )
        if info.get("size") is None:
            raise StorageError(f"the server does not say how long {uri!r} is; {_COPY_FIRST}")

    def fetch(self, uri: str, *, start: int, stop: int | None, version: str | None) -> Span:
        """Return bytes [start, stop) of one version."""
        before = self.stat(uri)
        end = before.size_bytes if stop is None else min(stop, before.size_bytes)
        with _explaining("read", uri):
            data = self._filesystem.cat_file(uri, start=start, end=end) if start < end else b""
        if len(data) > max(0, end - start):
            raise StorageError(
                f"the server of {uri!r} sends all of it where a part is asked for; {_COPY_FIRST}"
            )
        # Looked up after reading as well: nothing was replaced in between.
        after = self.stat(uri)
        if before.version != after.version or version not in (None, after.version):
            raise ObjectChangedError(
                f"{uri!r} has changed: version {version or before.version} was expected and "
                f"{after.version} is there; list the input again"
            )
        if not data and start < end:
            raise RetryError(f"no bytes came; {end - start} were asked for")
        return Span(data, after.size_bytes, after.version)

    def put(self, uri: str, data: bytes) -> None:
        """Write an object, as atomically as the protocol does it."""
        self._filesystem.pipe_file(uri, data)

    def put_if(self, uri: str, data: bytes, *, version: str | None, write_id: str) -> str:
        """Write if the content still has ``version``, or is absent where None."""
        if self._protocol != "memory":
            raise StorageError(
                f"cannot write {uri!r} conditionally: {self._protocol}:// has no conditional "
                "writes here; use s3:// or a local path"
            )
        with _memory_lock:
            exists = self._filesystem.exists(uri)
            data_there = self._filesystem.cat_file(uri) if exists else b""
            if version != (self.conditional_version(data_there, "") if exists else None):
                raise ConflictError(
                    f"cannot write {uri!r}: another writer was first; read it again"
                )
            self.put(uri, data)
        return self.conditional_version(data, "")

    def conditional_version(self, data: bytes, _version: str) -> str:
        """Return the version that ``put_if`` compares: a digest."""
        return f"sha256-{sha256(data).hexdigest()}"

    def delete(self, uris: Iterable[str]) -> None:
        """Delete objects; missing ones are fine."""
        for uri in uris:
            try:
                self._filesystem.rm_file(uri)
            except FileNotFoundError:
                continue

    def delete_if(self, uri: str, *, version: str) -> None:
        """Delete an object if its content still has ``version``."""
        with _memory_lock:
            if self._filesystem.exists(uri) and version == self.conditional_version(
                self._filesystem.cat_file(uri), ""
            ):
                self.delete([uri])

    def upload(self, local_path: Path, uri: str) -> None:
        """Copy a file."""
        self._filesystem.put_file(str(local_path), uri)

    def _describe(self, info: dict[str, Any]) -> ObjectInfo:
        path = info["name"].removeprefix(f"{self._protocol}://").lstrip("/")
        changed = next((info[field] for field in _TIME_FIELDS if info.get(field)), None)
        # Listings and look-ups of one file system give the time in different types.
        modified_s = changed.timestamp() if isinstance(changed, datetime) else changed
        traits = {field: str(info[field]) for field in _VERSION_FIELDS if info.get(field)}
        traits |= {"size": str(info["size"]), "changed": str(modified_s)}
        return ObjectInfo(
            uri=f"{self._protocol}://{path}",
            size_bytes=info["size"],
            version=digest_json(traits),
            modified_s=modified_s if isinstance(modified_s, float) else None,
        )
