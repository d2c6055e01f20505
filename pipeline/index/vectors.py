"""The stored vectors of a segment, their cosines to a query, and bit sets over its rows."""

from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorruptionError
from pipeline.index.faiss.codes import Doubles, Floats, Halves, Rows, Stored
from pipeline.index.files import REMEDY, FileStore
from pipeline.index.manifest import FileInfo, SegmentInfo

Flags = npt.NDArray[np.bool_]

MIN_NORM = 1e-6
"""Shorter vectors have no direction; their cosine to anything would be noise."""

SAME = {np.dtype(np.float16): 1e-9, np.dtype(np.float32): 1e-12}
"""How far from 1 the cosine of two stored vectors of one image may be, by type.

An image embedded twice differs by about 1e-7 of each value: as float32 that is a cosine of
1 - 1e-14; as float16, a few values round the other way, which is at most 1 - 1e-9.
"""

SCORED_ROWS = 4096


def normalise_rows(vectors: Floats) -> Floats:
    """Return vectors of any positive length as unit vectors."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return cast(Floats, vectors / norms[:, None])


def score_rows(query: Floats, vectors: Stored, rows: Rows) -> Doubles:
    """Return the cosines of a query to some stored vectors, float64 (n,), at most 1.

    Both lengths are divided by, since rounding to float16 changes a unit vector's length. Where the
    query, rounded as the stored vectors are, is the stored vector, the score is exactly 1; equal
    stored vectors have equal scores, whatever else is scored with them.

    Args:
        query: Unit vector, (dim,).
        vectors: The stored vectors of a segment, (all rows, dim).
        rows: The rows to score, (n,).
    """
    if len(rows) > SCORED_ROWS:  # float64 copies of all of them could fill the memory
        blocks = np.split(rows, range(SCORED_ROWS, len(rows), SCORED_ROWS))
        return np.concatenate([score_rows(query, vectors, block) for block in blocks])
    stored = vectors[rows].astype(np.float64)
    lengths = np.sqrt(np.einsum("nd,nd->n", stored, stored))
    cosines = _divide(query.astype(np.float64), stored, lengths)
    nearest = 1 - SAME[vectors.dtype]
    same = cosines >= nearest
    if vectors.dtype != query.dtype:
        rounded = query.astype(vectors.dtype).astype(np.float64)
        same |= _divide(rounded, stored, lengths) >= nearest
    return np.where(same, 1.0, cosines)


def _divide(query: Doubles, stored: Doubles, lengths: Doubles) -> Doubles:
    # Not as a matrix product, whose rounding depends on where a row stands among the others.
    products = np.einsum("nd,d->n", stored, query)
    return cast(Doubles, products / (lengths * np.sqrt(np.einsum("d,d->", query, query))))


def open_vectors(path: Path, segment: SegmentInfo, dim: int) -> Halves:
    """Map a segment's stored vectors, float16 (rows, dim).

    Raises:
        CorruptionError: The file is not as long as the rows need.
    """
    if segment.files["vectors"].size_bytes != 2 * dim * segment.rows:
        path_shown = segment.files["vectors"].path
        raise CorruptionError(
            f"{path_shown} does not hold {segment.rows} vectors of {dim}; {REMEDY}"
        )
    # As a plain array: indexing the subclass costs more than the copy it makes.
    return np.asarray(np.memmap(path, np.float16, "r", shape=(segment.rows, dim)))


def read_bits(files: FileStore, file: FileInfo | None, rows: int) -> Flags:
    """Return tombstones as one boolean a row; all False where there are none.

    Raises:
        CorruptionError: The file is damaged.
    """
    return unpack_bits(b"" if file is None else files.fetch(file).read_bytes(), rows)


def unpack_bits(packed: bytes, rows: int) -> Flags:
    """Return one boolean a row; all False where there are no bytes."""
    if not packed:
        return np.zeros(rows, bool)
    bits = np.frombuffer(packed, np.uint8)
    return np.unpackbits(bits, count=rows, bitorder="little").astype(bool)


def pack_bits(flags: Flags) -> bytes:
    """Return flags as bits, lowest first."""
    return np.packbits(flags, bitorder="little").tobytes()
