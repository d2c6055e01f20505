"""DOOR to FAISS: what is installed, and the few calls that an index is made of.

A FAISS row number is a position in one segment and nothing more; identity is the key. What all
segments share (rotation, coarse centroids, code centre) is a ``Codec``, trained once; a segment's
own file holds codes only, so that any number of segments costs one copy of the centroids.
"""

import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorruptionError, SettingsError

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]

MIN_VERSION = (1, 15, 1)
"""Older versions parse damaged files unsafely."""
PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")
COARSE_EF = 64
"""Candidates of the coarse HNSW while rows are assigned; 0.99 agreement with exact assignment."""
HNSW_BUILD_EF = 128
"""The library's default of 40 leaves one row in fifty where a search does not find it."""
EXACT_KINDS = ("flat", "hnsw")
"""Kinds whose codes are the vectors themselves."""
MIN_READ_LIMIT_BYTES = 1 << 28
"""What FAISS may allocate for one vector of a small file; a rotation has no bytes on disk."""
RABITQ_QUERY_BITS = 8
"""The library's default of 4 loses a fifth of the recall."""

_reading = threading.Lock()


@dataclass(frozen=True, slots=True)
class Engine:
    """Which FAISS this is.

    Attributes:
        package: Name of the installed distribution, ``"unknown"`` if it has no metadata.
        version: Its version.
        gpus: Number of GPUs it can use.
    """

    package: str
    version: str
    gpus: int


def find_packages(find: Callable[[str], str] = importlib.metadata.version) -> dict[str, str]:
    """Return the installed FAISS distributions and their versions."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = find(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_packages(found: dict[str, str]) -> None:
    """Refuse two distributions at once.

    Raises:
        SettingsError: They share one folder, so the last one installed has overwritten the other.
    """
    if len(found) > 1:
        names = " ".join(found)
        raise SettingsError(
            f"{' and '.join(found)} are both installed and overwrite each other; keep one: "
            f"pip uninstall -y {names}, then pip install 'image-embedding-pipeline[cpu]' or [gpu]"
        )


@lru_cache(maxsize=1)
def load_faiss() -> Any:
    """Import FAISS on first use and check that it is the only one, whole, and new enough.

    Raises:
        SettingsError: It is missing, there are two, or it is too old.
    """
    check_packages(find_packages())
    if sys.platform == "darwin":  # torch and faiss each bring an OpenMP runtime there
        os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")
    try:
        import faiss
    except ImportError as error:
        raise SettingsError(
            "FAISS is not installed; pip install 'image-embedding-pipeline[cpu]', or [gpu]"
        ) from error
    if not hasattr(faiss, "IndexFlatIP"):
        raise SettingsError(
            "the installed FAISS is a remnant of two packages; reinstall one of them: "
            "pip install --force-reinstall 'image-embedding-pipeline[cpu]'"
        )
    version = tuple(int(part) for part in faiss.__version__.split(".")[:3])
    if version < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        raise SettingsError(f"FAISS {faiss.__version__} is too old; install at least {wanted}")
    return faiss


def describe_engine() -> Engine:
    """Return which FAISS this process uses."""
    faiss = load_faiss()
    package = next(iter(find_packages()), "unknown")
    return Engine(package, faiss.__version__, int(faiss.get_num_gpus()))


def set_threads(number: int) -> None:
    """Let FAISS use ``number`` threads for the calls of this thread; it counts per thread."""
    load_faiss().omp_set_num_threads(number)


class Codec:
    """What all segments of a generation share: how vectors are rotated, assigned and encoded.

    Attributes:
        kind: One of ``selection.KINDS``.
        dim: Width of the vectors.
        lists: Number of inverted lists; 0 where there are none.
    """

    def __init__(self, kind: str, dim: int, trained: Any | None = None) -> None:
        """Wrap an empty trained index; ``flat`` and ``hnsw`` have none."""
        faiss = load_faiss()
        self.kind, self.dim, self.lists = kind, dim, 0
        self._trained: Any = trained
        self._inner: Any = trained
        self._rotation: Any = None
        self._quantizer: Any = None
        if isinstance(trained, faiss.IndexPreTransform):
            self._rotation = faiss.downcast_VectorTransform(trained.chain.at(0))
            self._inner = faiss.downcast_index(trained.index)
        if isinstance(self._inner, faiss.IndexIVF):
            self._quantizer = faiss.downcast_index(self._inner.quantizer)
            self.lists = int(self._inner.nlist)
            if isinstance(self._quantizer, faiss.IndexHNSW):
                self._quantizer.hnsw.efSearch = COARSE_EF

    @property
    def is_exact(self) -> bool:
        """Whether the codes are the vectors themselves, so that nothing is ranked again."""
        return self.kind in EXACT_KINDS

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to store; ``flat`` and ``hnsw`` learn nothing."""
        return self._trained is not None

    def rotate(self, vectors: Floats) -> Floats:
        """Return normalised vectors as the codes see them, (n, dim) or padded."""
        return vectors if self._rotation is None else cast(Floats, self._rotation.apply(vectors))

    def find_lists(self, rotated: Floats, nprobe: int) -> tuple[Floats, Rows] | None:
        """Return the cosines to, and numbers of, the nearest lists, each (n, nprobe)."""
        if self._quantizer is None:
            return None
        faiss, nprobe = load_faiss(), max(1, min(nprobe, self.lists))
        params = None
        if isinstance(self._quantizer, faiss.IndexHNSW):
            params = faiss.SearchParametersHNSW(efSearch=max(COARSE_EF, 2 * nprobe))
        return cast(tuple[Floats, Rows], self._quantizer.search(rotated, nprobe, params=params))

    def make_index(self, *, packed: bool) -> Any:
        """Return an empty index for one segment.

        Args:
            packed: Use the blocked code layout: three times faster over long lists, but slow over
                short ones and without deletion; for large segments only.
        """
        faiss = load_faiss()
        if self.kind == "flat":
            return faiss.IndexFlatIP(self.dim)
        if self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(self.dim, 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = HNSW_BUILD_EF
            return index
        if self.kind == "rabitq":
            return self._make_rabitq(packed)
        return self._make_ivf(packed)

    def _make_rabitq(self, packed: bool) -> Any:
        faiss, width = load_faiss(), self._inner.d
        if packed:
            return _copy_empty(self._inner)
        index = faiss.IndexRaBitQ(width, faiss.METRIC_INNER_PRODUCT)
        faiss.copy_array_to_vector(faiss.vector_to_array(self._inner.center), index.center)
        index.qb, index.is_trained = RABITQ_QUERY_BITS, True
        return index

    def _make_ivf(self, packed: bool) -> Any:
        faiss, width = load_faiss(), self._inner.d
        if self.kind == "ivf-rabitq" and not packed:
            bare = faiss.IndexFlatIP(width)
            index = faiss.IndexIVFRaBitQ(bare, width, self.lists, faiss.METRIC_INNER_PRODUCT)
            index.qb, index.is_trained = RABITQ_QUERY_BITS, True
            index.own_fields = False
        else:
            index = _copy_empty(self._inner)
        self.attach(index)
        return index

    def attach(self, index: Any) -> None:
        """Lend the shared centroids to a segment's index, in place of its own or of none."""
        if self._quantizer is not None:
            index.own_fields = False
            index.quantizer = self._quantizer

    def write(self, path: Path) -> None:
        """Write the trained, empty index."""
        load_faiss().write_index(self._trained, str(path))


def _copy_empty(index: Any) -> Any:
    faiss = load_faiss()
    with _without_centroids(index) as codes:  # clone_index knows neither blocked nor all codes
        return faiss.deserialize_index(faiss.serialize_index(codes))


@contextmanager
def _without_centroids(index: Any) -> Iterator[Any]:
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
    with _without_centroids(index) as codes:
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
            raise CorruptionError(f"FAISS cannot read {shown_as}: {error}") from error
        finally:
            faiss.set_deserialization_vector_byte_limit(limit)


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
        return _search_lists(index, queries, k, lists, params)
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
    index: Any, queries: Floats, k: int, lists: tuple[Floats, Rows], params: Any
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
    """Compares queries with float16 vectors where they lie, several times faster than numpy can.

    For one thread at a time.
    """

    def __init__(self, dim: int) -> None:
        faiss = load_faiss()
        half = faiss.ScalarQuantizer.QT_fp16
        self._index = faiss.IndexScalarQuantizer(dim, half, faiss.METRIC_INNER_PRODUCT)

    def rank(self, queries: Floats, halves: Halves, k: int) -> tuple[Floats, Rows]:
        """Return the ``k`` largest inner products and their positions in ``halves``, (n, k)."""
        self._index.reset()
        self._index.add_sa_codes(np.ascontiguousarray(halves).view(np.uint8))
        k = min(k, len(halves))
        return cast(tuple[Floats, Rows], self._index.search(np.ascontiguousarray(queries), k))


def train_codec(kind: str, factory: str, sample: Floats, *, seed: int) -> Codec:
    """Train what the segments share, on unit vectors.

    Args:
        kind: The kind that ``factory`` belongs to.
        factory: A FAISS factory string; ``"Flat"`` and ``"HNSW32"`` need no training.
        sample: Unit vectors, (n, dim), more than the factory has lists.
        seed: Makes the centroids repeatable.
    """
    faiss, dim = load_faiss(), sample.shape[1]
    if kind in ("flat", "hnsw"):
        return Codec(kind, dim)
    trained = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    codec = Codec(kind, dim, trained)
    rotation, inner = codec._rotation, codec._inner
    if rotation is not None and not rotation.is_trained:
        rotation.train(sample)
    rotated = codec.rotate(sample)
    if codec.lists:
        centroids = train_centroids(rotated, codec.lists, seed=seed)
        inner.quantizer.train(centroids)
        inner.quantizer.add(centroids)
    inner.train(rotated)
    trained.is_trained = True
    return codec


def train_centroids(vectors: Floats, number: int, *, seed: int) -> Floats:
    """Return ``number`` unit centroids, by k-means on the GPUs if there are any."""
    faiss = load_faiss()
    if faiss.get_num_gpus() > 0:
        means = faiss.Kmeans(vectors.shape[1], number, spherical=True, gpu=True, seed=seed)
    else:  # a third of the work of Kmeans for the same coverage
        means = faiss.SuperKmeans(vectors.shape[1], number, spherical=True, seed=seed)
    means.cp.min_points_per_centroid = 1
    means.train(vectors)
    return np.ascontiguousarray(means.centroids, dtype=np.float32)


def read_codec(kind: str, dim: int, path: Path | None, *, shown_as: str) -> Codec:
    """Read a trained codec whose digest has been verified; None for kinds without one.

    Raises:
        CorruptionError: FAISS cannot make sense of it.
    """
    if path is None:
        return Codec(kind, dim)
    return Codec(kind, dim, read_index(path, shown_as=shown_as))


def count_list_sizes(index: Any) -> npt.NDArray[np.uint32]:
    """Return the number of rows in each inverted list; empty where there are none."""
    if not isinstance(index, load_faiss().IndexIVF):
        return np.empty(0, np.uint32)
    sizes = (index.invlists.list_size(number) for number in range(index.nlist))
    return np.fromiter(sizes, np.uint32, index.nlist)
