"""Simulated stores behind the storage door: one with the semantics of S3, and a local disk.

On S3 listings come in pages that show what is there when each is asked for; ``If-None-Match`` and
``If-Match`` are honoured; an etag is a digest of the content. On a disk a file is written under
another name and renamed, and a conditional write holds a lock. The product's own retries and its
code for conditional writes run on top of both.
"""

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from pipeline.errors import ObjectChangedError
from pipeline.records import ObjectInfo
from pipeline.storage.conditional import ConditionalWrites, Head
from pipeline.storage.hidden import is_listed, is_unfinished, name_lock
from pipeline.storage.local import LocalStore
from pipeline.storage.ranges import Span
from simulation.stdlib import SimulatedLock
from simulation.world import WORLDS, World, current_process, make_error

T = TypeVar("T")

S3, DISK = "sim://bucket", "disk://bucket"
"""Where a world's objects are, by the kind of its store."""

PAGE = 3
_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Blob:
    """An object: its bytes, their digest, the write that made it, and when."""

    data: bytes
    etag: str
    write_id: str
    modified_s: float


def make_blob(data: bytes, *, write_id: str = "", modified_s: float = 1.7e9) -> Blob:
    """Return an object with these bytes."""
    return Blob(data, hashlib.md5(data).hexdigest(), write_id, modified_s)


class SimulatedStore:
    """The store of the current world; holds nothing itself."""

    @property
    def _world(self) -> World:
        return WORLDS[-1]

    def perform(self, kind: str, uri: str, effect: Callable[[], T]) -> T:
        """Carry out one operation as a step of the world."""
        return self._world.perform(kind, uri, effect)

    def list_objects(self, uri: str) -> list[ObjectInfo]:
        """Return the objects under ``uri/``, or else the object ``uri`` itself, page by page."""
        found, after, more = [], "", True
        while more:
            show = partial(self._list_page, f"{uri}/", after)
            page, more = self.perform("list", uri, show)
            found += page
            after = page[-1].uri if page else ""
        if not found and uri in self._world.objects:
            return [self._describe(uri)]
        return [info for info in found if is_listed(info.uri)]

    def _list_page(self, prefix: str, after: str) -> tuple[list[ObjectInfo], bool]:
        objects = self._world.objects
        names = sorted(name for name in objects if name.startswith(prefix) and name > after)
        return [self._describe(name) for name in names[:PAGE]], len(names) > PAGE

    def _describe(self, uri: str) -> ObjectInfo:
        blob = self._find(uri)
        return ObjectInfo(uri, len(blob.data), blob.etag, blob.modified_s)

    def _find(self, uri: str) -> Blob:
        try:
            found: Blob = self._world.objects[uri]
        except KeyError:
            raise FileNotFoundError(uri) from None
        return found

    def stat(self, uri: str) -> ObjectInfo:
        """Describe one object."""
        return self.perform("stat", uri, lambda: self._describe(uri))

    def fetch(self, uri: str, *, start: int, stop: int | None, version: str | None) -> Span:
        """Return bytes [start, stop) of one version of an object; fewer after a fault."""

        def read() -> Span:
            blob = self._find(uri)
            if version not in (None, blob.etag):
                raise ObjectChangedError(f"{uri!r} has changed: {version} is no longer there")
            end = len(blob.data) if stop is None else stop
            if self._world.trace and self._world.trace[-1].fault == "short":
                end = start + max(1, (min(end, len(blob.data)) - start) // 2)
            return Span(blob.data[start:end], len(blob.data), blob.etag)

        return self.perform("read", uri, read)

    def put(self, uri: str, data: bytes) -> None:
        """Write an object."""
        self.write(uri, data)

    def put_if(self, uri: str, data: bytes, *, version: str | None, write_id: str) -> str:
        """Write under a condition, by the product's own protocol for S3."""
        state = current_process().state
        if "conditional" not in state:
            state["conditional"] = ConditionalWrites(self, attempts=_ATTEMPTS)
        conditional: ConditionalWrites = state["conditional"]
        return conditional.put_if(uri, data, version=version, write_id=write_id)

    def write(
        self, uri: str, data: bytes, *, condition: tuple[str, str] | None = None, write_id: str = ""
    ) -> str:
        """Write an object under a condition (header, value); return its etag."""
        world = self._world

        def write() -> str:
            there = world.objects.get(uri)
            if condition is not None:
                header, value = condition
                if header == "If-None-Match" and there is not None:
                    raise make_error("PreconditionFailed", 412)
                if header == "If-Match" and there is None:
                    raise make_error("NoSuchKey", 404)
                if header == "If-Match" and value != f'"{there.etag}"':
                    raise make_error("PreconditionFailed", 412)
            blob = make_blob(data, write_id=write_id, modified_s=world.now_s + world.clock_off_s)
            world.objects[uri] = blob
            return blob.etag

        return self.perform("write", uri, write)

    def look_up(self, uri: str) -> Head | None:
        """Return etag, write id and age of an object, or None if it is not there."""
        world = self._world

        def look_up() -> Head | None:
            blob = world.objects.get(uri)
            if blob is None:
                return None
            return Head(blob.etag, blob.write_id, world.now_s - blob.modified_s)

        return self.perform("stat", uri, look_up)

    def conditional_version(self, _data: bytes, version: str) -> str:
        """Return the version that ``put_if`` compares: the etag."""
        return version

    def delete(self, uris: Iterable[str]) -> None:
        """Delete objects, one request each; missing ones are fine."""
        for uri in uris:
            self.perform("delete", uri, lambda uri=uri: self._world.objects.pop(uri, None))

    def delete_if(self, uri: str, *, version: str) -> None:
        """Delete an object if its etag is still ``version``."""
        objects = self._world.objects

        def delete() -> None:
            if uri in objects and objects[uri].etag == version:
                del objects[uri]

        self.perform("delete", uri, delete)

    def upload(self, local_path: Path, uri: str) -> None:
        """Copy a file."""
        self.put(uri, local_path.read_bytes())


class SimulatedDisk(LocalStore):
    """The disk of the current world: the product's conditional writes over simulated files."""

    def __init__(self) -> None:
        self._files = SimulatedStore()

    @property
    def _begun(self) -> set[str]:  # type: ignore[override]
        begun: set[str] = current_process().state.setdefault("begun", set())
        return begun

    def list_objects(self, uri: str) -> list[ObjectInfo]:  # type: ignore[override]
        """Return the files under a folder, or the one file."""
        return self._files.list_objects(uri)

    def list_unfinished(self, uri: str) -> list[ObjectInfo]:
        """Return the files under a folder that were never finished."""
        names = [name for name in WORLDS[-1].objects if name.startswith(f"{uri}/")]
        return [self._files.stat(name) for name in names if is_unfinished(name)]

    def stat(self, uri: str) -> ObjectInfo:
        """Describe one file."""
        return self._files.stat(uri)

    def fetch(self, uri: str, *, start: int, stop: int | None, version: str | None) -> Span:
        """Return bytes [start, stop) of one version of a file."""
        return self._files.fetch(uri, start=start, stop=stop, version=version)

    def open(self, uri: str, version: str | None, *, buffer_bytes: int) -> BinaryIO:
        """Open a file, whose content stays what it is whatever replaces it."""
        whole = self._files.fetch(uri, start=0, stop=None, version=version)
        if len(whole.data) != whole.size_bytes:
            raise ConnectionResetError("the disk went away")
        return cast(BinaryIO, io.BytesIO(whole.data))

    def put(self, uri: str, data: bytes) -> None:
        """Write a file under another name, and rename it."""
        objects = WORLDS[-1].objects
        unfinished = f"{uri.rpartition('/')[0]}/.~{WORLDS[-1].dice.getrandbits(128):032x}"
        self._files.write(unfinished, data)

        def rename() -> None:
            if unfinished not in objects:
                raise FileNotFoundError(unfinished)
            objects[uri] = objects.pop(unfinished)

        self._files.perform("write", uri, rename)

    def delete(self, uris: Iterable[str]) -> None:
        """Delete files; missing ones are fine."""
        self._files.delete(uris)

    def upload(self, local_path: Path, uri: str) -> None:
        """Copy a file."""
        self.put(uri, local_path.read_bytes())

    def _find_content_version(self, uri: str) -> str | None:
        try:
            with self.open(uri, None, buffer_bytes=0) as file:  # whole, as a disk's files are read
                return self.conditional_version(file.read(), "")
        except FileNotFoundError:
            return None


def lock_file(path: Path) -> SimulatedLock:
    """Return the lock of a file; the kernel frees it when its holder dies."""
    locks: dict[str, SimulatedLock] = WORLDS[-1].locks
    return locks.setdefault(name_lock(str(path)), SimulatedLock())
