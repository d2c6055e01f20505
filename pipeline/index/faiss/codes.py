"""DOOR to FAISS, the codes: written, read and searched.

A FAISS row number is a position in one segment and nothing more; identity is the key.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorruptionError
from pipeline.index.faiss.package import load_faiss

Floats = npt.NDArray[np.float32]

Doubles = npt.NDArray[np.float64]

Rows = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]

Stored = Floats | Halves

MIN_READ_LIMIT_BYTES = 1 << 28
"""What FAISS may allocate for one vector of a small file; a rotation has no bytes on disk."""

RABITQ_QUERY_BITS = 8
"""The library's default of 4 loses a fifth of the recall."""

MIN_RANKED_ROWS = 1024

_reading = threading.Lock()
_of_thread = threading.local()


@contextmanager
def without_centroids(index: Any) -> Iterator[Any]:
    """Lend an index without the centroids that it borrows; it has them back afterwards."""
    faiss = load_faiss()
    if not isinstance(index, faiss.IndexIVF):
        yield index
        return
    owned, shared = index.own_fields, index.quantizer
    bare = faiss.IndexFlatIP(index.d)
    index.own_fields, index.quantizer = False, bare
    try:
        yield index
    finally:
        index.quantizer, index.own_fields = shared, owned


def write_index(index: Any, path: Path) -> None:
    """Write a segment's codes, without the centroids that it borrows."""
    with without_centroids(index) as codes:
        load_faiss().write_index(codes, str(path))


def read_index(path: Path, *, shown_as: str) -> Any:
    """Read an index whose digest has been verified; codes are mapped where FAISS can.

    The result must never be added to: FAISS aborts the process on a mapped index.

    Raises:
        CorruptionError: FAISS cannot make sense of it.
    """
    faiss = load_faiss()
    with _reading:
        limit = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(
            max(MIN_READ_LIMIT_BYTES, 2 * path.stat().st_size)
        )
        try:
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, MemoryError) as error:
            raise CorruptionError(
                f"FAISS cannot read {shown_as}: {error}; build again with --full"
            ) from error
        finally:
            faiss.set_deserialization_vector_byte_limit(limit)


def get_flat(index: Any) -> Any | None:
    """Return the part of an index that holds full vectors; None for kinds that hold codes only."""
    faiss = load_faiss()
    whole = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index
    return whole if isinstance(whole, faiss.IndexFlat) else None


def view_flat(flat: Any) -> Floats:
    """Return the vectors of ``get_flat``, float32 (rows, dim); valid as long as the index lives."""
    values = load_faiss().rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d)
    return cast(Floats, values.reshape(flat.ntotal, flat.d))


def can_select(index: Any) -> bool:
    """Return whether a search of ``index`` can be limited to chosen rows."""
    return not isinstance(index, load_faiss().IndexRaBitQFastScan)


def search_codes(
    index: Any,
    queries: Floats,
    k: int,
    *,
    lists: tuple[Floats, Rows] | None = None,
    ef: int = 0,
    allowed: Bits | None = None,
) -> tuple[Floats, Rows]:
    """Return scores and rows of the best codes, (n, k) each, row -1 where there are fewer.

    Args:
        index: A segment's index.
        queries: Rotated unit vectors, (n, width of the index).
        k: At least 1, at most the number of rows.
        lists: From ``Codec.find_lists``, for inverted lists.
        ef: Candidates kept by HNSW.
        allowed: One bit a row, lowest first; only those rows are found.
    """
    faiss = load_faiss()
    _check_queries(index, queries, k)
    # Both objects have to outlive the search: FAISS keeps plain pointers.
    selector = None if allowed is None else faiss.IDSelectorBitmap(allowed)
    if lists is not None:
        params = faiss.SearchParametersIVF(nprobe=lists[1].shape[1], sel=selector)
        return _search_lists(index, queries, k=k, lists=lists, params=params)
    if isinstance(index, faiss.IndexHNSW):
        params = faiss.SearchParametersHNSW(efSearch=max(ef, k), sel=selector)
    elif isinstance(index, faiss.IndexRaBitQ):
        params = faiss.RaBitQSearchParameters(sel=selector, qb=RABITQ_QUERY_BITS)
    else:
        params = None if selector is None else faiss.SearchParameters(sel=selector)
    return cast(tuple[Floats, Rows], index.search(queries, k, params=params))


def _check_queries(index: Any, queries: Floats, k: int) -> None:
    # FAISS asserts these in Python only, and reads out of bounds under python -O.
    if queries.ndim != 2 or queries.shape[1] != index.d or queries.dtype != np.float32 or k < 1:
        raise ValueError(f"queries {queries.shape} {queries.dtype}, k {k} for width {index.d}")


def _search_lists(
    index: Any, queries: Floats, *, k: int, lists: tuple[Floats, Rows], params: Any
) -> tuple[Floats, Rows]:
    pointer = load_faiss().swig_ptr
    queries = np.ascontiguousarray(queries)
    cosines, numbers = map(np.ascontiguousarray, lists)
    scores = np.empty((len(queries), k), np.float32)
    rows = np.empty((len(queries), k), np.int64)
    index.search_preassigned_c(
        len(queries),
        pointer(queries),
        k,
        pointer(numbers),
        pointer(cosines),
        pointer(scores),
        pointer(rows),
        False,
        params,
    )
    return scores, rows


def search_exact(queries: Floats, vectors: Floats, k: int) -> tuple[Floats, Rows]:
    """Return the ``k`` largest inner products and their positions in ``vectors``, (n, k) each."""
    faiss = load_faiss()
    k = min(k, len(vectors))
    found = faiss.knn(
        np.ascontiguousarray(queries), np.ascontiguousarray(vectors), k, faiss.METRIC_INNER_PRODUCT
    )
    return cast(tuple[Floats, Rows], found)


class HalfRanker:
    """Compares queries with float16 vectors, several times faster than numpy can.

    It copies the rows that matter into memory that it keeps: fresh pages for every query would
    cost several times what the comparison does. For one thread at a time.
    """

    def __init__(self, dim: int) -> None:
        faiss = load_faiss()
        half = faiss.ScalarQuantizer.QT_fp16
        self._index = faiss.IndexScalarQuantizer(dim, half, faiss.METRIC_INNER_PRODUCT)
        self._kept: Halves = np.empty((0, dim), np.float16)

    def rank(self, queries: Floats, halves: Stored, rows: Rows, *, k: int) -> tuple[Floats, Rows]:
        """Return the ``k`` largest inner products among some rows of ``halves``, and those rows.

        The vectors' lengths, which rounding has changed, are in them: these are no cosines yet.
        """
        # Any mode but clip would copy into a buffer first.
        np.take(halves, rows, axis=0, out=self._reserve(len(rows)), mode="clip")
        self._index.ntotal = len(rows)
        found = self._index.search(np.ascontiguousarray(queries), min(k, len(rows)))
        return found[0], rows[found[1]]

    def _reserve(self, rows: int) -> Halves:
        if rows > len(self._kept):
            reserved, dim = max(MIN_RANKED_ROWS, 1 << (rows - 1).bit_length()), self._index.d
            codes = self._index.codes
            codes.resize(reserved * 2 * dim)
            memory = load_faiss().rev_swig_ptr(codes.data(), codes.size())
            self._kept = memory.view(np.float16).reshape(reserved, dim)
        return self._kept[:rows]


def get_ranker(dim: int) -> HalfRanker:
    """Return the calling thread's ranker of a width."""
    rankers: dict[int, HalfRanker] = vars(_of_thread).setdefault("rankers", {})
    if dim not in rankers:
        rankers[dim] = HalfRanker(dim)
    return rankers[dim]


def count_list_sizes(index: Any) -> npt.NDArray[np.uint32]:
    """Return the number of rows in each inverted list; empty where there are none."""
    if not isinstance(index, load_faiss().IndexIVF):
        return np.empty(0, np.uint32)
    sizes = (index.invlists.list_size(number) for number in range(index.nlist))
    return np.fromiter(sizes, np.uint32, index.nlist)
