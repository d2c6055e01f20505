"""What reading a container yields, before rows are numbered."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.shortages import is_shortage


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How shards are read and cut.

    Attributes:
        chunk_images: Most images in a chunk.
        chunk_bytes: Most encoded bytes in a chunk; a larger single image is a chunk alone.
        max_image_bytes: Longer encoded images are not read into memory.
        carry: Names of the carried columns: sidecar extensions or Parquet columns.
        carried: Types of these columns in the output; where None, as the source has them.
        image_column: Parquet column with the images; found by its type where None.
        key_column: Parquet column with the keys; the row number where None.
    """

    chunk_images: int = 256
    chunk_bytes: int = 64 * 2**20
    max_image_bytes: int = 256 * 2**20
    carry: tuple[str, ...] = ()
    carried: pa.Schema | None = None
    image_column: str | None = None
    key_column: str | None = None


ABSENT = "absent"
"""Status of an image that is not to be had, now at least; it gets no row."""


@dataclass(frozen=True, slots=True)
class FoundImage:
    """One image of a container, in the container's order.

    Attributes:
        name: Its name in the container, valid Unicode; not necessarily unique.
        data: The encoded image; empty where ``status`` is not ``"ok"``.
        offset: Where it starts in the stored object, bytes, if one ranged read can fetch it.
        carried: Carried columns that were found, as ``carried.to_values`` gives values.
        status: ``"ok"`` as far as reading goes, one of ``records.STATUSES``, or ``ABSENT``.
        error: The reason when it is not.
    """

    name: str
    data: bytes
    offset: int | None = None
    carried: Mapping[str, Any] = field(default_factory=dict)
    status: str = "ok"
    error: str | None = None


class BrokenContainerError(Exception):
    """The container cannot be read any further; what was found before stands."""


def is_fault_of_data(error: Exception) -> bool:
    """Tell damaged data from a failing disk or connection, and from a machine without memory."""
    if isinstance(error, OSError) and error.errno is not None:
        return False
    return not is_shortage(error)


def note_missing(missing: Iterable[str], *, known: Iterable[str], notes: Counter[str]) -> None:
    """Count carried columns that a shard is without; the note itself suggests a known name."""
    for name in missing:
        notes["missing_columns"] += 1
        notes[f"without {name!r}{suggest_name(name, known)}"] += 1


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean …?"`` with the known name that is nearest, or nothing."""
    nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
