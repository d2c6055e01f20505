"""The files of an index on this machine: local ones in place, remote ones in a cache, verified."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CorruptionError, ObjectMissingError
from pipeline.index.manifest import FileInfo
from pipeline.storage import Storage, join_uri

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
    """

    index: str
    storage: Storage
    cache_dir: Path

    def fetch(self, file: FileInfo) -> Path:
        """Return a local path of ``file`` whose bytes have just been verified.

        Raises:
            CorruptionError: It is missing, or its bytes are not those that were published.
        """
        uri = join_uri(self.index, file.path)
        if "://" not in self.index:
            path = Path(uri)
            if not path.is_file():
                raise CorruptionError(f"{uri} is missing; {_REMEDY}")
            verify_file(path, file, shown_as=uri)
            return path
        path = self.cache_dir / file.sha256[:2] / file.sha256
        if path.is_file() and digest_file(path) == file.sha256:
            os.utime(path)
            return path
        return self._download(uri, file, path)

    def _download(self, uri: str, file: FileInfo, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.storage.download(uri, path)
        except ObjectMissingError as error:
            raise CorruptionError(f"{uri} is missing; {_REMEDY}") from error
        try:
            verify_file(path, file, shown_as=uri)
        except CorruptionError:
            path.unlink(missing_ok=True)
            raise
        return path


_REMEDY = "restore it, roll back with --roll-back, or build again with --full"


def verify_file(path: Path, file: FileInfo, *, shown_as: str) -> None:
    """Compare a local file with its record, before anything parses it.

    Raises:
        CorruptionError: Size or digest differ.
    """
    size_bytes = path.stat().st_size
    if size_bytes != file.size_bytes:
        raise CorruptionError(
            f"{shown_as} has {size_bytes} bytes, its manifest says {file.size_bytes}; {_REMEDY}"
        )
    if digest_file(path) != file.sha256:
        raise CorruptionError(f"{shown_as} is damaged: its digest is not its manifest's; {_REMEDY}")


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def describe_file(path: Path, target: str) -> FileInfo:
    """Describe a local file that is to become ``target`` under an index."""
    return FileInfo(target, path.stat().st_size, digest_file(path))
