"""DOOR to FAISS, the codec: what all segments of a generation share.

Rotation, coarse centroids and code centre are trained once; a segment's own file holds codes only,
so that any number of segments costs one copy of the centroids.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np

from pipeline.index.faiss.codes import (
    RABITQ_QUERY_BITS,
    Floats,
    Rows,
    read_index,
    without_centroids,
)
from pipeline.index.faiss.package import load_faiss

COARSE_EF = 64
"""Candidates of the coarse HNSW while rows are assigned; 0.99 agreement with exact assignment."""

COARSE_QUERIES = 16
"""More at once FAISS multiplies as matrices, which rounds each cosine by where it stands."""

HNSW_BUILD_EF = 128
"""The library's default of 40 leaves one row in fifty where a search does not find it."""

MIN_SUPER_DIM = 32
"""SuperKmeans refuses fewer dimensions."""

KINDS = ("flat", "rabitq", "ivf-rabitq", "ivf-sq8", "hnsw")
EXACT_KINDS = ("flat", "hnsw")
"""Kinds whose codes are the vectors themselves."""


class Codec:
    """How vectors are rotated, assigned to lists and encoded; shared by all segments.

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
        """Return the cosines to, and numbers of, the nearest lists, each (n, nprobe).

        A vector's lists do not depend on which others are asked for with it.
        """
        if self._quantizer is None:
            return None
        faiss, nprobe = load_faiss(), max(1, min(nprobe, self.lists))
        quantizer, params = self._quantizer, None
        if isinstance(quantizer, faiss.IndexHNSW):
            if nprobe == self.lists:  # a graph may miss some
                quantizer = faiss.downcast_index(quantizer.storage)
            else:
                params = faiss.SearchParametersHNSW(efSearch=max(COARSE_EF, 2 * nprobe))
        found = [
            quantizer.search(rotated[first : first + COARSE_QUERIES], nprobe, params=params)
            for first in range(0, max(1, len(rotated)), COARSE_QUERIES)
        ]
        cosines, lists = (np.concatenate(items) for items in zip(*found, strict=True))
        return cosines, lists

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
    with without_centroids(index) as codes:  # clone_index knows neither blocked nor all codes
        return faiss.deserialize_index(faiss.serialize_index(codes))


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
    faiss, dim = load_faiss(), vectors.shape[1]
    if faiss.get_num_gpus() > 0:
        means = faiss.Kmeans(dim, number, spherical=True, gpu=True, seed=seed)
    elif dim < MIN_SUPER_DIM:
        means = faiss.Kmeans(dim, number, spherical=True, seed=seed)
    else:  # a third of the work of Kmeans for the same coverage
        means = faiss.SuperKmeans(dim, number, spherical=True, seed=seed)
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
