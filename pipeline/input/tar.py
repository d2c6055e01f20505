"""Images in tar archives, plain or compressed, with WebDataset's naming of samples."""

import bz2
import gzip
import lzma
import posixpath
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.errors import describe_excess_bytes
from pipeline.input.container import BrokenContainerError, FoundImage, ReadOptions, is_fault_of_data
from pipeline.input.kinds import HEAD_BYTES, SUFFIXES, is_hidden, recognise, tell_kind, tell_reason
from pipeline.input.sidecars import SampleJoiner, Sidecar, find_column

SIDECARS = ("json", "txt", "cls")
"""Members that belong to a sample without being images; carried on request, else passed over."""

_MOST_REWINDS = 16
"""How often a compressed archive is read once more from its start for the sake of hard links."""

_SKIP_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 20
"""Long names and pax headers stay far below; a lying one must not fill the memory."""

_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""A frame of notes that zstd's decoder passes over; ``pzstd`` writes one before each of data."""


@dataclass(frozen=True, slots=True)
class Again:
    """How to read an archive a second time, for what hard links lead to.

    Attributes:
        open: Opens it from its start.
        fetch: Returns some bytes of it: from which on, and how many.
    """

    open: Callable[[], BinaryIO]
    fetch: Callable[[int, int], bytes]


def read_tar(
    stream: BinaryIO, *, options: ReadOptions, notes: Counter[str], again: Again | None = None
) -> Iterator[FoundImage]:
    """Yield the images of an archive in its order, one in memory at a time.

    With ``options.carry``, the images of one sample are held until the sample is complete, because
    sidecars may follow their image; at most a chunk's worth is held. A member whose name does not
    tell what it is counts as an image if its first bytes are one's. A hard link to an earlier
    member is an image of its own.

    Args:
        stream: The archive from its start; its compression is told from its first bytes.
        options: What to carry, and what is too large to read.
        notes: Counts ``ignored_members``: files that are neither images nor sidecars, and symbolic
            links; ``hidden_members``, see ``kinds.is_hidden``; ``oversized_sidecars``,
            ``sidecars_not_utf8`` and ``sidecars_without_image``; and a carried column that the
            archive is without.
        again: How to read what hard links lead to; without, they are ``unsupported``.

    Raises:
        BrokenContainerError: The archive is damaged or ends too early. All images before the
            damage have been yielded, the one that it cuts with the status ``truncated``.
    """
    tape, compressed = _open_tape(stream)
    joiner = SampleJoiner(options, notes)
    with closing(_Links(again, compressed=compressed)) as links:
        try:
            for member in _read_members(tape, joiner, links, options, notes):
                yield from joiner.add(member)
        except BrokenContainerError:
            yield from joiner.end_sample()
            raise
    yield from joiner.finish()


def _read_members(
    tape: "_Tape",
    joiner: SampleJoiner,
    links: "_Links",
    options: ReadOptions,
    notes: Counter[str],
) -> Iterator[FoundImage | Sidecar]:
    for info in _read_headers(tape):
        name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        basename = posixpath.basename(name)
        links.remember(info)
        if info.isdir():
            continue
        if is_hidden(name):
            notes["hidden_members"] += 1
            continue
        if info.isreg() and _is_sidecar(basename, options):
            yield from _read_sidecar(tape, info, name, options, notes)
            continue
        found = None
        if info.isreg():
            found = _find_image(tape, info, links.describe(info, name), options)
        elif info.islnk() and _is_image_name(basename):
            found = links.read(info, name, options)
        if found is not None:
            yield found
            tape.raise_if_ended_early()
            continue
        extension = basename.partition(".")[2].lower()
        joiner.pass_over(extension)
        if extension not in SIDECARS:
            notes["ignored_members"] += 1


def _find_image(
    tape: "_Tape", info: tarfile.TarInfo, found: FoundImage, options: ReadOptions
) -> FoundImage | None:
    """Return a member if it is an image, by its name or else by its first bytes."""
    basename = posixpath.basename(found.name)
    if _is_image_name(basename):
        return _read_image(tape, info, found, options)
    extension = basename.partition(".")[2].lower()
    if tell_kind(basename) or tell_reason(basename) or extension in SIDECARS or info.issparse():
        return None
    head = tape.read_data(min(HEAD_BYTES, info.size))
    if recognise(head) != "image":
        return None
    return _read_image(tape, info, found, options, head=head)


def _is_image_name(basename: str) -> bool:
    return "." not in basename or basename.lower().endswith(SUFFIXES["image"])


def _is_sidecar(basename: str, options: ReadOptions) -> bool:
    column = find_column(basename, options.carry)
    exact = column is not None and basename.lower().partition(".")[2] == column.lower()
    return exact or (column is not None and not _is_image_name(basename))


def _read_sidecar(
    tape: "_Tape", info: tarfile.TarInfo, name: str, options: ReadOptions, notes: Counter[str]
) -> Iterator[Sidecar]:
    if info.size > min(options.chunk_bytes, options.max_image_bytes):
        notes["oversized_sidecars"] += 1
        return
    data = tape.read_data(info.size)
    tape.raise_if_ended_early()
    try:
        yield Sidecar(name, data.decode())
    except UnicodeDecodeError:
        notes["sidecars_not_utf8"] += 1
        yield Sidecar(name, data.decode("utf-8", "backslashreplace"))


def _read_image(
    tape: "_Tape",
    info: tarfile.TarInfo,
    found: FoundImage,
    options: ReadOptions,
    *,
    head: bytes = b"",
) -> FoundImage:
    if info.issparse():
        reason = "it is stored as a sparse file; repack the archive without --sparse"
        return replace(found, status="unsupported", error=reason)
    if info.size > options.max_image_bytes:
        reason = describe_excess_bytes(info.size, options.max_image_bytes)
        return replace(found, status="too_large", error=reason)
    data = head + tape.read_data(info.size - len(head))
    if len(data) < info.size:
        reason = f"the archive ends after {len(data):,} of its {info.size:,} bytes"
        return replace(found, offset=None, status="truncated", error=reason)
    return replace(found, data=data)


class _Links:
    """Reads what hard links lead to: an earlier member, once more, where it lies.

    Of a plain archive these are some bytes of it. A compressed one is read once more from its
    start, up to the member; one such reading serves all links that lead ever further on.
    """

    def __init__(self, again: Again | None, *, compressed: bool) -> None:
        self._again = again
        self._compressed = compressed
        self._places: dict[str, tuple[int, int]] = {}
        self._stream: BinaryIO | None = None
        self._tape: _Tape | None = None
        self._rewinds = 0

    def remember(self, info: tarfile.TarInfo) -> None:
        """Note where a member lies, for links to it that may follow."""
        if info.isreg() and not info.issparse():
            self._places[posixpath.normpath(info.name)] = (info.offset_data, info.size)
        elif info.islnk() and (place := self._find(info)) is not None:
            self._places[posixpath.normpath(info.name)] = place

    def describe(self, info: tarfile.TarInfo, name: str) -> FoundImage:
        """Return a member before it is read, with its offset where one ranged read can fetch it."""
        return FoundImage(name, b"", None if self._compressed else info.offset_data)

    def read(self, info: tarfile.TarInfo, name: str, options: ReadOptions) -> FoundImage:
        """Return the image that a hard link is."""
        advice = "repack the archive with tar --hard-dereference"
        place = self._find(info)
        if place is None:
            reason = f"a hard link to {info.linkname!r}, which is not before it; {advice}"
            return FoundImage(name, b"", status="unsupported", error=reason)
        offset, nbytes = place
        found = FoundImage(name, b"", None if self._compressed else offset)
        if nbytes > options.max_image_bytes:
            reason = describe_excess_bytes(nbytes, options.max_image_bytes)
            return replace(found, status="too_large", error=reason)
        data = self._fetch(offset, nbytes)
        if data is None:
            reason = f"a hard link that leads too far back in a compressed archive; {advice}"
            return replace(found, status="unsupported", error=reason)
        return replace(found, data=data)

    def close(self) -> None:
        """Close the second look at the archive, if there was one."""
        if self._stream is not None:
            self._stream.close()

    def _find(self, info: tarfile.TarInfo) -> tuple[int, int] | None:
        return self._places.get(posixpath.normpath(info.linkname))

    def _fetch(self, offset: int, nbytes: int) -> bytes | None:
        if self._again is None:
            return None
        if not self._compressed:
            return self._again.fetch(offset, nbytes)
        if self._tape is None or self._tape.tell() > offset:
            if self._rewinds == _MOST_REWINDS:
                return None
            self._rewinds += 1
            self.close()
            self._stream = self._again.open()
            self._tape, _ = _open_tape(self._stream)
        self._tape.seek(offset)
        return self._tape.read_data(nbytes)


def _read_headers(tape: "_Tape") -> Iterator[tarfile.TarInfo]:
    """Yield every member's header; its data may be read from the tape before the next one.

    ``tarfile`` itself takes damage after the first member for the end of the archive, hence the
    loop over its documented parts.
    """
    position = 0
    try:
        archive = tarfile.TarFile(fileobj=cast(Any, tape), mode="r", encoding="utf-8")
        archive.members = []  # type: ignore[attr-defined] # or it would keep every header
        info = archive.firstmember  # type: ignore[attr-defined]
        while info is not None:
            if info.size < 0:
                raise tarfile.HeaderError("negative size")
            yield info
            position = archive.offset
            tape.seek(position)
            info = tarfile.TarInfo.fromtarfile(archive)
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        pass
    except (tarfile.TarError, ValueError, LookupError, ArithmeticError) as error:
        tape.raise_if_ended_early()
        reason = f"not a readable tar header at byte {position:,}: {error}"
        raise BrokenContainerError(reason) from error
    tape.check_rest()


def _open_tape(stream: BinaryIO) -> tuple["_Tape", bool]:
    start = stream.read(8)
    stream.seek(0)  # still buffered, costs no second request
    kind = next((kind for magic, kind in _MAGICS.items() if start.startswith(magic)), None)
    if _SKIPPABLE.match(start):
        kind = "zstd"
    if kind == "gzip":
        return _Tape(gzip.GzipFile(fileobj=stream, mode="rb")), True
    if kind == "bzip2":
        return _Tape(bz2.BZ2File(stream)), True
    if kind == "xz":
        return _Tape(lzma.LZMAFile(stream)), True
    if kind in ("zstd", "lz4"):
        return _Tape(pa.CompressedInputStream(pa.PythonFile(stream, "r"), kind)), True
    return _Tape(stream), False


class _Tape:
    """An archive that is read once, forwards; the file object that ``tarfile`` sees."""

    name = ""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._position = 0
        self._ended = False
        self._damage = ""

    def tell(self) -> int:
        return self._position

    def read(self, nbytes: int) -> bytes:
        """Return header bytes, fewer than asked for at the end."""
        if not 0 <= nbytes <= _MAX_HEADER_BYTES:
            raise tarfile.HeaderError(f"a header claims {nbytes:,} bytes")
        return self.read_data(nbytes)

    def seek(self, position: int) -> None:
        """Go forwards; damaged headers may ask for other things."""
        if position < self._position:
            raise tarfile.HeaderError(f"the next header would be at byte {position:,}")
        while self._position < position and not self._ended:
            self.read_data(min(_SKIP_BYTES, position - self._position))
        self.raise_if_ended_early()

    def read_data(self, nbytes: int) -> bytes:
        """Return exactly ``nbytes``, fewer only at the end or before damage."""
        data = self._read_source(nbytes)
        while len(data) < nbytes and not self._ended:
            data += self._read_source(nbytes - len(data))
        self._position += len(data)
        return data

    def raise_if_ended_early(self) -> None:
        if self._ended:
            reason = self._damage or "the archive ends too early"
            raise BrokenContainerError(f"{reason}, at byte {self._position:,}")

    def check_rest(self) -> None:
        """Read to the end: checks a compressed archive's digest, and that nothing is left."""
        end = self._position
        while data := self.read_data(_SKIP_BYTES):
            if data.count(0) < len(data):
                reason = f"more data follows the end of the archive at byte {end:,}"
                raise BrokenContainerError(f"{reason}; is it several archives in one?")
        if self._damage:
            self.raise_if_ended_early()

    def _read_source(self, nbytes: int) -> bytes:
        try:
            data = cast(bytes, self._source.read(nbytes))
        except (EOFError, zlib.error, lzma.LZMAError, OSError, pa.ArrowInvalid) as error:
            if not is_fault_of_data(error):
                raise
            self._damage = f"damaged compression ({error})"
            data = b""
        self._ended = not data and nbytes > 0
        return data
