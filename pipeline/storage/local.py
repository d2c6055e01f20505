"""Files on this machine: atomic writes, fast listing, conditional writes under a file lock."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO

from pipeline.errors import ConflictError, ObjectChangedError, StorageError
from pipeline.records import ObjectInfo
from pipeline.storage.hidden import is_listed, name_lock, name_unfinished
from pipeline.storage.ranges import Span

_COPY_BYTES = 1 << 20


class LocalStore:
    """Paths of the local file system. A URI is an absolute path here."""

    def list_objects(self, uri: str) -> list[ObjectInfo]:
        """Return the files under a folder, or the one file; in no order."""
        try:
            status = os.stat(uri)  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return []
        if S_ISDIR(status.st_mode):
            return list(_walk(uri, ancestors=frozenset()))
        return [_describe(uri, status)] if S_ISREG(status.st_mode) else []

    def stat(self, uri: str) -> ObjectInfo:
        """Describe one file."""
        status = os.stat(uri)  # noqa: PTH116
        if not S_ISREG(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "not a file but a folder or a device")
        return _describe(uri, status)

    def fetch(self, uri: str, *, start: int, stop: int | None, version: str | None) -> Span:
        """Return bytes [start, stop) of one version of a file."""
        with self.open(uri, version, buffer_bytes=0) as file:
            info = _describe(uri, os.fstat(file.fileno()))
            file.seek(start)
            data = file.read(-1 if stop is None else stop - start)
        return Span(data, info.size_bytes, info.version)

    def open(self, uri: str, version: str | None, *, buffer_bytes: int) -> BinaryIO:
        """Open a file; what replaces it later does not show through the open file."""
        file = open(uri, "rb", buffering=buffer_bytes)  # noqa: PTH123, SIM115
        found = _describe(uri, os.fstat(file.fileno())).version
        if version is not None and version != found:
            file.close()
            raise ObjectChangedError(
                f"{uri!r} has changed: version {version} was expected and {found} is there; "
                "list the input again"
            )
        return file

    def put(self, uri: str, data: bytes) -> None:
        """Write a file so that it appears whole or not at all."""
        with write_atomically(Path(uri)) as file:
            file.write(data)

    def put_if(self, uri: str, data: bytes, *, version: str | None, write_id: str) -> str:
        """Write if the content still has ``version``, or is absent where None."""
        with _lock(Path(uri)):
            found = self._find_content_version(uri)
            if found != version:
                raise ConflictError(
                    f"cannot write {uri!r}: it {'exists' if version is None else 'has changed'}; "
                    "another writer was first: read it again"
                )
            self.put(uri, data)
        return self.conditional_version(data, "")

    def conditional_version(self, data: bytes, _version: str) -> str:
        """Return the version that ``put_if`` compares: a digest.

        Times of change are no use there: two writes can fall into one tick of the clock.
        """
        return f"sha256-{hashlib.sha256(data).hexdigest()}"

    def delete(self, uris: Iterable[str]) -> None:
        """Delete files; missing ones are fine."""
        for uri in uris:
            Path(uri).unlink(missing_ok=True)

    def upload(self, local_path: Path, uri: str) -> None:
        """Copy a file so that it appears whole or not at all."""
        with local_path.open("rb") as source, write_atomically(Path(uri)) as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)

    def _find_content_version(self, uri: str) -> str | None:
        try:
            return self.conditional_version(Path(uri).read_bytes(), "")
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write; on a clean exit it becomes ``path``, durably, otherwise nothing does.

    A short hidden name in the same folder: the same file system, and never too long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / name_unfinished()
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` among processes; the kernel frees it if the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file of its own, never deleted: a lock on the object itself would go with its replacement.
    with (path.parent / name_lock(path.name)).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _walk(folder: str, *, ancestors: frozenset[tuple[int, int]]) -> Iterator[ObjectInfo]:
    """Yield the files under ``folder``, through symbolic links but never in circles."""
    status = os.stat(folder)  # noqa: PTH116
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir():
                    yield from _walk(entry.path, ancestors=ancestors | {identity})
                elif entry.is_file() and is_listed(entry.name):
                    yield _describe(entry.path, entry.stat())
            except FileNotFoundError:
                continue  # deleted since the folder was read


def _describe(path: str, status: os.stat_result) -> ObjectInfo:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise StorageError(f"file name {os.fsencode(path)!r} is not UTF-8; rename it") from None
    version = f"{status.st_size}-{status.st_mtime_ns}"
    return ObjectInfo(path, status.st_size, version, status.st_mtime_ns / 1e9)
