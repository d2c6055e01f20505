"""Files on this machine: atomic writes, fast listing, conditional writes under a file lock."""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO, cast

from pipeline.errors import ConflictError, ObjectChangedError, RetryError, StorageError
from pipeline.records import FailedObject, ObjectInfo
from pipeline.storage.hidden import is_listed, is_unfinished, name_lock, name_unfinished
from pipeline.storage.ranges import Span
from pipeline.storage.retry import is_passing, translate

_COPY_BYTES = 1 << 20


class LocalStore:
    """Paths of the local file system. A URI is an absolute path here."""

    def __init__(self) -> None:
        self._begun: set[str] = set()  # ids of conditional writes that have not returned

    def list_objects(self, uri: str) -> list[ObjectInfo | FailedObject]:
        """Return the files under a folder, or the one file; in no order.

        What is there but cannot be looked at is named with its reason: a folder without
        permission, a link to nothing, a name that is not UTF-8.
        """
        try:
            status = os.stat(uri)  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return []
        if S_ISDIR(status.st_mode):
            os.scandir(uri).close()  # raises where the folder itself is out of reach
            return list(_walk(uri, ancestors=frozenset()))
        return [_describe(uri, status)]

    def list_unfinished(self, uri: str) -> list[ObjectInfo]:
        """Return the files under a folder that were never finished; in no order."""
        paths = (os.path.join(top, name) for top, _, names in os.walk(uri) for name in names)  # noqa: PTH118
        found: list[ObjectInfo] = []
        for path in filter(is_unfinished, paths):
            with contextlib.suppress(FileNotFoundError):  # finished since
                found.append(self.stat(path))
        return found

    def stat(self, uri: str) -> ObjectInfo:
        """Describe one file."""
        status = os.stat(uri)  # noqa: PTH116
        if not S_ISREG(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "not a file but a folder or a device")
        return ObjectInfo(uri, status.st_size, _version_of(status), status.st_mtime_ns / 1e9)

    def fetch(self, uri: str, *, start: int, stop: int | None, version: str | None) -> Span:
        """Return bytes [start, stop) of one version of a file."""
        with self.open(uri, version, buffer_bytes=0) as file:
            status = os.fstat(file.fileno())
            file.seek(start)
            data = file.read(-1 if stop is None else stop - start)
        return Span(data, status.st_size, _version_of(status))

    def open(self, uri: str, version: str | None, *, buffer_bytes: int) -> BinaryIO:
        """Open a file of which every byte is of one version.

        What replaces the file later does not show through the open one, and what is written over
        its content is noticed by the first read that may have seen it.
        """
        file = _PinnedFile(uri)
        if version is not None and version != file.version:
            file.close()
            raise _make_changed_error(uri, version, file.version)
        return cast(BinaryIO, io.BufferedReader(file, buffer_bytes) if buffer_bytes else file)

    def put(self, uri: str, data: bytes) -> None:
        """Write a file so that it appears whole or not at all."""
        with write_atomically(Path(uri)) as file:
            file.write(data)

    def put_if(self, uri: str, data: bytes, *, version: str | None, write_id: str) -> str:
        """Write if the content still has ``version``, or is absent where None.

        A try may fail after it took effect (a network file system lost its reply). The next try of
        the same write, told by ``write_id``, finds its own content there and writes it once more.
        """
        written = self.conditional_version(data, "")
        with _lock(Path(uri)):
            found = self._find_content_version(uri)
            if found != version and not (write_id in self._begun and found == written):
                self._begun.discard(write_id)
                raise ConflictError(
                    f"cannot write {uri!r}: it {'exists' if version is None else 'has changed'}; "
                    "another writer was first: read it again"
                )
            self._begun.add(write_id)
            self.put(uri, data)
        self._begun.discard(write_id)
        return written

    def conditional_version(self, data: bytes, _version: str) -> str:
        """Return the version that ``put_if`` compares: a digest.

        Times of change are no use there: two writes can fall into one tick of the clock.
        """
        return f"sha256-{hashlib.sha256(data).hexdigest()}"

    def delete(self, uris: Iterable[str]) -> None:
        """Delete files; missing ones are fine."""
        for uri in uris:
            Path(uri).unlink(missing_ok=True)

    def delete_if(self, uri: str, *, version: str) -> None:
        """Delete a file if its content still has ``version``."""
        with _lock(Path(uri)):
            if self._find_content_version(uri) == version:
                self.delete([uri])

    def upload(self, local_path: Path, uri: str) -> None:
        """Copy a file so that it appears whole or not at all."""
        with local_path.open("rb") as source, write_atomically(Path(uri)) as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)

    def _find_content_version(self, uri: str) -> str | None:
        try:
            return self.conditional_version(Path(uri).read_bytes(), "")
        except FileNotFoundError:
            return None


class _PinnedFile(io.FileIO):
    """A file open for reading that looks at itself after every read.

    Raises:
        ObjectChangedError: From a read: size or time of change are not what they were at first.
        StorageError: From a read: the disk refuses.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, "rb")
        self._path = path
        self.version = _version_of(os.fstat(self.fileno()))

    def readinto(self, buffer: Any, /) -> int | None:
        """Fill ``buffer`` as far as one read goes."""
        with self._checking():
            return super().readinto(buffer)

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to ``size`` bytes, all that are left if negative."""
        with self._checking():
            return super().read(-1 if size is None else size) or b""

    def readall(self) -> bytes:
        """Return all bytes that are left."""
        with self._checking():
            return super().readall() or b""

    @contextlib.contextmanager
    def _checking(self) -> Iterator[None]:
        try:
            yield
            found = _version_of(os.fstat(self.fileno()))
        except OSError as error:
            fault = translate(error, action="read", uri=self._path)
            if isinstance(fault, RetryError):
                fault = StorageError(f"cannot read {self._path!r}: {fault}; run again")
            raise fault or error from error
        if found != self.version:
            raise _make_changed_error(self._path, self.version, found)


def _make_changed_error(uri: str, version: str, found: str) -> ObjectChangedError:
    return ObjectChangedError(
        f"{uri!r} has changed: version {version} was expected and {found} is there; "
        "list the input again"
    )


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


def _walk(
    folder: str, *, ancestors: frozenset[tuple[int, int]]
) -> Iterator[ObjectInfo | FailedObject]:
    """Yield what lies under ``folder``, through symbolic links but never in circles."""
    try:
        status = os.stat(folder)  # noqa: PTH116
        identity = (status.st_dev, status.st_ino)
        entries = [] if identity in ancestors else list(os.scandir(folder))
    except OSError as error:
        yield from _explain_entry(folder, error)
        return
    for entry in entries:
        try:
            if entry.is_dir():
                yield from _walk(entry.path, ancestors=ancestors | {identity})
            elif is_listed(entry.name):
                yield _describe(entry.path, entry.stat())
        except OSError as error:
            yield from _explain_entry(entry.path, error)


def _explain_entry(path: str, error: OSError) -> Iterator[FailedObject]:
    """Name what cannot be looked at, unless it was deleted since its folder was read.

    Raises:
        OSError: The fault is this machine's (no file descriptor, no memory), or passing.
    """
    if is_passing(error):
        raise error
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    if not missing or os.path.lexists(path):
        what = "a symbolic link that leads nowhere" if missing else error.strerror or str(error)
        reason = f"cannot look at it: {what}; mend it at the source, or take it out of the input"
        yield FailedObject(_to_text(path), reason)


def _describe(path: str, status: os.stat_result) -> ObjectInfo | FailedObject:
    if _to_text(path) != path:
        return FailedObject(_to_text(path), "its name is not UTF-8; rename it")
    if not S_ISREG(status.st_mode):
        return ObjectInfo(path, -1, "")
    return ObjectInfo(path, status.st_size, _version_of(status), status.st_mtime_ns / 1e9)


def _to_text(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _version_of(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"
