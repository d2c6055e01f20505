"""The cache of index files on this machine: bounded in size, shared by all processes.

Files are named by the digest of what they are copies of. Every open index lists the copies it uses
in a file of its own, which it keeps locked; however its process ends, the kernel frees the lock.
Whoever adds a copy deletes others while all together are too large, those unused longest first,
and never one that an open index lists.
"""

import contextlib
import fcntl
import os
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

DEFAULT_BYTES = 100 * 10**9

UNFINISHED_S = 86_400.0
"""Age from which a file that was never finished is taken for that of a killed process."""

_DIGEST_LETTERS = 64


class Hold:
    """What one open index uses of a cache; given up when it is garbage collected.

    A copy of it, in another process or not, is a hold of its own that uses nothing yet.
    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def __reduce__(self) -> tuple[type["Hold"], tuple[()]]:
        return Hold, ()

    def add(self, folder: Path, digest: str) -> None:
        """Keep the copy of that digest from being deleted, whether it is there yet or not."""
        with _lock(folder, fcntl.LOCK_SH), self._locate(folder).open("a") as file:
            file.write(f"{digest}\n")

    def keep_only(self, folder: Path, digests: Iterable[str]) -> None:
        """Give up all copies but these; does nothing where none was ever held."""
        if self._path is not None:
            with _lock(folder, fcntl.LOCK_SH):
                self._path.write_text("".join(f"{digest}\n" for digest in digests))

    def _locate(self, folder: Path) -> Path:
        if self._path is None:
            path = folder / "holds" / uuid.uuid4().hex
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            weakref.finalize(self, _give_up, descriptor, path)
            self._path = path
        return self._path


def _give_up(descriptor: int, path: Path) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)


@contextlib.contextmanager
def _lock(folder: Path, kind: int) -> Iterator[None]:
    """Hold the lock of a whole cache: shared to list what is used, alone to delete."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        fcntl.flock(file, kind)
        yield


def shrink(folder: Path, max_bytes: int) -> None:
    """Delete the copies unused longest until a cache is no larger than ``max_bytes``.

    Those that an open index of any process holds stay, even where they alone are larger. Files
    that a killed process was writing go too, once they are a day old.
    """
    with _lock(folder, fcntl.LOCK_EX):
        held = _read_holds(folder / "holds")
        copies: list[tuple[float, int, Path]] = []
        for path in folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.parent.name == "holds" or not path.is_file():
                    continue
                if len(path.name) >= _DIGEST_LETTERS:
                    copies.append((status.st_mtime, status.st_size, path))
                elif status.st_mtime < time.time() - UNFINISHED_S:
                    path.unlink()
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= max_bytes:
                break
            if path.name[:_DIGEST_LETTERS] not in held:
                path.unlink(missing_ok=True)
                total -= size


def _read_holds(folder: Path) -> set[str]:
    """Return the digests that open indexes list, and clear away the lists of those that ended."""
    held: set[str] = set()
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError), path.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.update(file.read().split())
            else:
                path.unlink(missing_ok=True)
    return held
