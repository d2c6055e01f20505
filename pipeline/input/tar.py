"""Images in tar archives, plain or compressed, with WebDataset's naming of samples."""

import bz2
import gzip
import lzma
import posixpath
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.errors import describe_excess_bytes
from pipeline.input.container import BrokenContainerError, FoundImage, ReadOptions, is_fault_of_data
from pipeline.input.kinds import SUFFIXES
from pipeline.input.sidecars import SampleJoiner, Sidecar, find_column

SIDECARS = ("json", "txt", "cls")
"""Members that belong to a sample without being images; carried on request, else passed over."""

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


def read_tar(
    stream: BinaryIO, *, options: ReadOptions, notes: Counter[str]
) -> Iterator[FoundImage]:
    """Yield the images of an archive in its order, one in memory at a time.

    With ``options.carry``, the images of one sample are held until the sample is complete, because
    sidecars may follow their image; at most a chunk's worth is held.

    Args:
        stream: The archive from its start; its compression is told from its first bytes.
        options: What to carry, and what is too large to read.
        notes: Counts ``ignored_members``: files that are neither images nor sidecars, and links;
            ``oversized_sidecars``, ``sidecars_not_utf8`` and ``sidecars_without_image``; and a
            carried column that the archive is without.

    Raises:
        BrokenContainerError: The archive is damaged or ends too early. All images before the
            damage have been yielded, the one that it cuts with the status ``truncated``.
    """
    tape, compressed = _open_tape(stream)
    joiner = SampleJoiner(options, notes)
    members = _read_members(tape, joiner, options, notes, with_offsets=not compressed)
    try:
        for member in members:
            yield from joiner.add(member)
    except BrokenContainerError:
        yield from joiner.end_sample()
        raise
    yield from joiner.finish()


def _read_members(
    tape: "_Tape",
    joiner: SampleJoiner,
    options: ReadOptions,
    notes: Counter[str],
    *,
    with_offsets: bool,
) -> Iterator[FoundImage | Sidecar]:
    for info in _read_headers(tape):
        name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        basename = posixpath.basename(name)
        if info.isdir() or basename.startswith("._"):  # ._ is what macOS leaves beside a file
            continue
        extension = basename.partition(".")[2].lower()
        if info.isreg() and _is_sidecar(basename, options):
            yield from _read_sidecar(tape, info, name, options, notes)
        elif info.isreg() and _is_image_name(basename):
            offset = info.offset_data if with_offsets else None
            yield _read_image(tape, info, FoundImage(name, b"", offset), options)
            tape.raise_if_ended_early()
        else:
            joiner.pass_over(extension)
            if extension not in SIDECARS:
                notes["ignored_members"] += 1


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
    tape: "_Tape", info: tarfile.TarInfo, found: FoundImage, options: ReadOptions
) -> FoundImage:
    if info.issparse():
        reason = "it is stored as a sparse file; repack the archive without --sparse"
        return replace(found, status="unsupported", error=reason)
    if info.size > options.max_image_bytes:
        reason = describe_excess_bytes(info.size, options.max_image_bytes)
        return replace(found, status="too_large", error=reason)
    data = tape.read_data(info.size)
    if len(data) < info.size:
        reason = f"the archive ends after {len(data):,} of its {info.size:,} bytes"
        return replace(found, offset=None, status="truncated", error=reason)
    return replace(found, data=data)


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
