"""The stored vectors of a segment, bit sets over its rows, and normalising."""

from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorruptionError
from pipeline.index.faiss.codes import Floats, Halves
from pipeline.index.files import FileStore
from pipeline.index.manifest import FileInfo, SegmentInfo

Flags = npt.NDArray[np.bool_]

MIN_NORM = 1e-6
"""Shorter vectors have no direction; their cosine to anything would be noise."""


def normalise_rows(vectors: Floats) -> Floats:
    """Return vectors of any positive length as unit vectors."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return cast(Floats, vectors / norms[:, None])


def open_vectors(path: Path, segment: SegmentInfo, dim: int) -> Halves:
    """Map a segment's stored vectors, float16 (rows, dim).

    Raises:
        CorruptionError: The file is not as long as the rows need.
    """
    if segment.files["vectors"].size_bytes != 2 * dim * segment.rows:
        raise CorruptionError(
            f"{segment.files['vectors'].path} does not hold {segment.rows} vectors of {dim}"
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
