"""Every other protocol, as its fsspec file system does it."""

import errno
import threading
from collections.abc import Iterable
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.errors import ConflictError, ObjectChangedError, RetryError, StorageError
from pipeline.records import ObjectInfo, digest_json
from pipeline.storage.ranges import Span

_VERSION_FIELDS = ("generation", "etag", "ETag", "md5Hash", "content_md5", "ino", "version_id")
_TIME_FIELDS = ("mtime", "updated", "last_modified", "LastModified", "created")
_memory_lock = threading.Lock()


class OtherStore:
    """Objects of a protocol without a store of its own; only ``memory`` has conditional writes."""

    def __init__(self, filesystem: Any, *, protocol: str) -> None:
        self._filesystem = filesystem
        self._protocol = protocol

    def list_objects(self, uri: str) -> list[ObjectInfo]:
        """Return the objects under a prefix, or the one object."""
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.find(uri, detail=True)
        except FileNotFoundError:
            return []
        return [self._describe(info) for info in found.values() if info["type"] == "file"]

    def stat(self, uri: str) -> ObjectInfo:
        """Describe one object."""
        self._filesystem.invalidate_cache()
        info = self._filesystem.info(uri)
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "a folder, not an object")
        return self._describe(info)

    def fetch(self, uri: str, *, start: int, stop: int | None, version: str | None) -> Span:
        """Return bytes [start, stop) of one version."""
        before = self.stat(uri)
        end = before.size_bytes if stop is None else min(stop, before.size_bytes)
        data = self._filesystem.cat_file(uri, start=start, end=end) if start < end else b""
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
