"""Reading objects by byte ranges, pinned to one version."""

import io
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of an object.

    Attributes:
        data: The bytes; may be fewer than were asked for, but none only at the object's end.
        size_bytes: Size of the whole object.
        version: The object's version when they were read.
    """

    data: bytes
    size_bytes: int
    version: str


class Fetch(Protocol):
    """Read bytes [start, stop) of one version; to the end where ``stop`` is None."""

    def __call__(self, start: int, stop: int | None, *, version: str | None) -> Span: ...  # noqa: D102


def read_span(fetch: Fetch, *, start: int, stop: int | None, version: str | None) -> Span:
    """Return all bytes of [start, stop), cut at the object's end, going on after short answers."""
    pieces: list[bytes] = []
    position = start
    while True:
        span = fetch(position, stop, version=version)
        pieces.append(span.data)
        position += len(span.data)
        version = span.version
        end = span.size_bytes if stop is None else min(stop, span.size_bytes)
        if position >= end:
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            return Span(data, span.size_bytes, version)


class ObjectReader(io.RawIOBase):
    """A seekable, read-only file over ranged reads.

    All its bytes are of one version: the one given, or else the first one seen.
    """

    def __init__(self, fetch: Fetch, *, size_bytes: int | None, version: str | None) -> None:
        self._fetch = fetch
        self._size_bytes = size_bytes
        self._version = version
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position, bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to ``offset`` from the start, the position or the end; return the position."""
        origin = 0
        if whence == io.SEEK_CUR:
            origin = self._position
        elif whence == io.SEEK_END:
            origin = self._measure()
        if origin + offset < 0:
            raise ValueError(f"seek to {origin + offset}; a position cannot be negative")
        self._position = origin + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return ``size`` bytes, fewer only at the end; all that are left if negative or None."""
        stop = None if size is None or size < 0 else self._position + size
        if self._is_at_end() or stop == self._position:
            return b""
        span = read_span(self._fetch, start=self._position, stop=stop, version=self._version)
        return self._keep(span)

    def readall(self) -> bytes:
        """Return all bytes that are left."""
        return self.read(-1)

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` as far as one fetch goes; return the number of bytes, 0 at the end."""
        view = memoryview(buffer).cast("B")
        if self._is_at_end() or not len(view):
            return 0
        stop = self._position + len(view)
        data = self._keep(self._fetch(self._position, stop, version=self._version))
        view[: len(data)] = data
        return len(data)

    def _keep(self, span: Span) -> bytes:
        self._size_bytes, self._version = span.size_bytes, span.version
        self._position += len(span.data)
        return span.data

    def _is_at_end(self) -> bool:
        return self._size_bytes is not None and self._position >= self._size_bytes

    def _measure(self) -> int:
        if self._size_bytes is None:
            span = self._fetch(0, 1, version=self._version)
            self._size_bytes, self._version = span.size_bytes, span.version
        return self._size_bytes
