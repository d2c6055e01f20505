"""The files of an index on this machine: local ones in place, remote ones in a cache, verified."""

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from pipeline.errors import CorruptionError, ObjectMissingError
from pipeline.index.cache import DEFAULT_BYTES, Hold, shrink
from pipeline.index.manifest import FileInfo
from pipeline.storage import Storage, join_uri

LOG = logging.getLogger("pipeline.index")

Found = TypeVar("Found")

REMEDY = "restore it, or build again with --full"
"""What helps against a file that is missing or damaged; ``--full`` looks before it reuses."""

_BLOCK_BYTES = 1 << 20


def default_cache_dir() -> Path:
    """Return where remote files are kept: ``$XDG_CACHE_HOME``, or ``~/.cache``, and below."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "image-embedding-pipeline" / "index"


@dataclass(frozen=True, slots=True)
class FileStore:
    """The files of one index.

    Attributes:
        index: URI of the index, normalised.
        storage: How to reach it.
        cache_dir: Where copies of remote files go, named by digest.
        doomed: Paths under the index that are being deleted; they are not reused.
        cache_bytes: Size that all copies in the cache may have together.
        hold: What this one uses of the cache.
    """

    index: str
    storage: Storage
    cache_dir: Path
    doomed: frozenset[str] = frozenset()
    cache_bytes: int = DEFAULT_BYTES
    hold: Hold = field(default_factory=Hold, compare=False, repr=False)

    def fetch(self, file: FileInfo) -> Path:
        """Return a local path of ``file`` whose bytes have just been verified.

        Raises:
            CorruptionError: It is missing, or its bytes are not those that were published.
        """
        uri = join_uri(self.index, file.path)
        if "://" not in self.index:
            path = Path(uri)
            if not path.is_file():
                raise CorruptionError(f"{uri} is missing; {REMEDY}")
            verify_file(path, file, shown_as=uri)
            return path
        self.hold.add(self.cache_dir, file.sha256)
        path = self.cache_dir / file.sha256[:2] / file.sha256
        if path.is_file() and digest_file(path) == file.sha256:
            os.utime(path)
            return path
        return self._download(uri, file, path)

    def derive(self, file: FileInfo, write: Callable[[Path, Path], None]) -> Path:
        """Return what is made of a file once, in the cache, its bytes verified every time.

        Args:
            file: What it is made of.
            write: Makes it: takes the local path of the file, and the path to write to.
        """
        self.hold.add(self.cache_dir, file.sha256)
        folder = self.cache_dir / "derived"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{file.sha256}-*"):
            if digest_file(path) == path.name.rpartition("-")[2]:
                os.utime(path)
                return path
            path.unlink(missing_ok=True)  # damaged; its name is the digest it should have
        partial = folder / f"{uuid.uuid4().hex}.partial"
        write(self.fetch(file), partial)
        path = folder / f"{file.sha256}-{digest_file(partial)}"
        partial.replace(path)
        shrink(self.cache_dir, self.cache_bytes)
        return path

    def release(self, needed: Iterable[FileInfo]) -> None:
        """Let the cache delete all copies but those of these files."""
        self.hold.keep_only(self.cache_dir, [file.sha256 for file in needed])

    def find_damage(
        self, needed: Iterable[FileInfo], *, sizes: Mapping[str, int] | None = None
    ) -> str | None:
        """Return what is wrong with the first stored file that is not as recorded, or None.

        Looks at the stored objects themselves, never at copies in the cache.

        Args:
            needed: The files, as recorded.
            sizes: Sizes by URI from a listing: they are all that is compared then. Where None,
                every file is read and its digest compared too.
        """
        for file in needed:
            uri = join_uri(self.index, file.path)
            if sizes is not None:
                damage = _compare_size(sizes.get(uri), file)
            else:
                damage = self._find_damage_inside(uri, file)
            if damage is not None:
                return f"{uri} {damage}"
        return None

    def _find_damage_inside(self, uri: str, file: FileInfo) -> str | None:
        try:
            with self.storage.open_stream(uri) as stream:
                digest, size_bytes = digest_stream(stream)
        except ObjectMissingError:
            return _compare_size(None, file)
        damage = _compare_size(size_bytes, file)
        return damage or (None if digest == file.sha256 else _OTHER_DIGEST)

    def find_reusable(
        self,
        path: str,
        parse: Callable[[bytes], Found],
        list_files: Callable[[Found], Iterable[FileInfo]],
    ) -> Found | None:
        """Return what a marker describes if all its files are as it says; None otherwise.

        A marker is written after its files; but files get lost and damaged later, so each of them
        is read and compared before anything is built on it.

        Args:
            path: The marker's path under the index.
            parse: Reads the marker; raises ValueError, KeyError or TypeError for other bytes.
            list_files: Returns the files that it describes.
        """
        if path in self.doomed:
            return None
        uri = join_uri(self.index, path)
        try:
            found = parse(self.storage.read(uri))
        except ObjectMissingError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            LOG.warning("%s cannot be read (%s); making anew what it describes", uri, error)
            return None
        damage = self.find_damage(list_files(found))
        if damage is not None:
            LOG.warning("%s; making it anew", damage)
            return None
        return found

    def _download(self, uri: str, file: FileInfo, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.storage.download(uri, path)
        except ObjectMissingError as error:
            raise CorruptionError(f"{uri} is missing; {REMEDY}") from error
        try:
            verify_file(path, file, shown_as=uri)
        except CorruptionError:
            path.unlink(missing_ok=True)
            raise
        shrink(self.cache_dir, self.cache_bytes)
        return path


_OTHER_DIGEST = "is damaged: its digest is not its manifest's"


def verify_file(path: Path, file: FileInfo, *, shown_as: str) -> None:
    """Compare a local file with its record, before anything parses it.

    Raises:
        CorruptionError: Size or digest differ.
    """
    damage = _compare_size(path.stat().st_size, file)
    if damage is None and digest_file(path) != file.sha256:
        damage = _OTHER_DIGEST
    if damage is not None:
        raise CorruptionError(f"{shown_as} {damage}; {REMEDY}")


def _compare_size(size_bytes: int | None, file: FileInfo) -> str | None:
    if size_bytes is None:
        return "is missing"
    if size_bytes != file.size_bytes:
        return f"has {size_bytes} bytes, its manifest says {file.size_bytes}"
    return None


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with path.open("rb") as stream:
        return digest_stream(stream)[0]


def digest_stream(stream: BinaryIO) -> tuple[str, int]:
    """Return the SHA-256, hex, and the number of the bytes that are left in a stream."""
    digest, size_bytes = hashlib.sha256(), 0
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
        size_bytes += len(block)
    return digest.hexdigest(), size_bytes


def describe_file(path: Path, target: str) -> FileInfo:
    """Describe a local file that is to become ``target`` under an index."""
    return FileInfo(target, path.stat().st_size, digest_file(path))
