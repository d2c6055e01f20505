"""The map of a collection: a sample of its vectors laid out in two dimensions."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorruptionError, PipelineError
from pipeline.index.files import FileStore
from pipeline.index.manifest import FileInfo, put_file

LOG = logging.getLogger("pipeline.index")

MAX_POINTS = 20_000
"""The page draws so many smoothly; of a larger collection they are a sample."""

_OUTLIER_SHARE = 0.005
_SUBSPACE = 8
_ITERATIONS = 20


@dataclass(frozen=True, slots=True)
class MapPoints:
    """A sample of a collection in two dimensions; similar images lie close together.

    Attributes:
        method: ``"pca"`` or ``"umap"``.
        keys: Keys of the images.
        xy: Where they lie, float32 in [0, 1], shape (len(keys), 2).
    """

    method: str
    keys: tuple[str, ...]
    xy: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.xy.shape != (len(self.keys), 2):
            raise ValueError(f"{len(self.keys)} keys do not fit points of shape {self.xy.shape}")

    def keep(self, chosen: npt.NDArray[np.bool_]) -> "MapPoints":
        """Return only the points that are chosen, one boolean each."""
        keys = tuple(key for key, kept in zip(self.keys, chosen, strict=True) if kept)
        return MapPoints(self.method, keys, self.xy[chosen])

    def to_json(self) -> bytes:
        """Serialise for the map of a generation."""
        x, y = self.xy.round(5).T.tolist() if self.keys else ([], [])
        values = {"method": self.method, "keys": list(self.keys), "x": x, "y": y}
        return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "MapPoints":
        """Read ``to_json``.

        Raises:
            CorruptionError: The bytes are something else.
        """
        try:
            values = json.loads(data)
            xy = np.array([values["x"], values["y"]], dtype=np.float32).T
            return cls(values["method"], tuple(values["keys"]), xy.reshape(-1, 2))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptionError(f"the map of the generation cannot be read: {error}") from error


def read_map(file: FileInfo | None, files: FileStore) -> MapPoints | None:
    """Return the map of a generation; None where it has none, or none that can be read.

    The map is only to look at: whatever is wrong with it, nothing else waits for it.
    """
    if file is None:
        return None
    try:
        return MapPoints.from_json(files.fetch(file).read_bytes())
    except (PipelineError, OSError) as error:
        LOG.warning("going on without the map of the collection: %s", error)
        return None


def write_map(points: MapPoints, path: str, files: FileStore) -> FileInfo:
    """Write the map of a generation that is about to be published; its manifest names it."""
    return put_file(files.index, path, data=points.to_json(), storage=files.storage)


def draw_map(
    vectors: npt.NDArray[np.floating], keys: Sequence[str], *, path: str, files: FileStore
) -> FileInfo | None:
    """Lay out a sample and write it; None, and a warning, if either fails for any reason."""
    try:
        return write_map(compute_map(vectors, keys), path, files)
    except Exception as error:  # UMAP brings a compiler along; what fails there must not stop a job
        LOG.warning("going on without a map of the collection: %s: %s", type(error).__name__, error)
        return None


def compute_map(
    vectors: npt.NDArray[np.floating],
    keys: Sequence[str],
    *,
    max_points: int = MAX_POINTS,
    seed: int = 0,
) -> MapPoints:
    """Lay out a sample of a collection: by UMAP where it is installed, by PCA otherwise.

    Args:
        vectors: Unit vectors, (n, dim).
        keys: Their keys, n of them.
        max_points: Size of the sample.
        seed: Decides the sample, and UMAP's layout; equal input and seed give an equal map.
    """
    if len(keys) != len(vectors):
        raise ValueError(f"{len(keys)} keys do not fit {len(vectors)} vectors")
    rng = np.random.default_rng(seed)
    number = min(max_points, len(keys))
    chosen = np.sort(rng.choice(len(keys), number, replace=False))
    sample = np.asarray(vectors[chosen], dtype=np.float32)
    method = choose_method(number)
    xy = _project_umap(sample, seed) if method == "umap" else project_pca(sample)
    return MapPoints(method, tuple(keys[i] for i in chosen), _scale(xy))


def choose_method(number: int) -> str:
    """Return how a map of ``number`` points is laid out here: ``"pca"`` or ``"umap"``."""
    found = find_spec("umap")
    # A folder that happens to be called so, or what a removed package left behind, has no origin.
    return "umap" if found and found.origin and number > 50 else "pca"


def project_pca(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return where vectors (n, dim) lie along the two directions of largest spread, (n, 2)."""
    number, dim = vectors.shape
    if number < 3 or dim < 2:
        return np.arange(2 * number, dtype=np.float32).reshape(-1, 2)
    centred = vectors - vectors.mean(axis=0)
    # Subspace iteration: two directions of two thousand cost a fraction of a full decomposition.
    width = min(_SUBSPACE, number, dim)
    basis = np.random.default_rng(0).normal(size=(dim, width)).astype(np.float32)
    for _ in range(_ITERATIONS):
        turned = np.linalg.qr(centred.T @ (centred @ basis))[0]
        basis = np.asarray(turned, dtype=np.float32)
    turn = np.linalg.svd(centred @ basis, full_matrices=False)[2]
    axes = basis @ turn[:2].T  # (dim, 2)
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    return np.asarray(centred @ (axes * signs), dtype=np.float32)


def _project_umap(vectors: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.float32]:
    umap = import_module("umap")  # optional, and slow to import

    layout = umap.UMAP(metric="cosine", random_state=seed, n_jobs=1).fit_transform(vectors)
    return np.asarray(layout, dtype=np.float32)


def _scale(xy: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return points in [0, 1]; the few outermost are drawn to the border, not the rest inwards."""
    if not len(xy):
        return xy
    low, high = np.quantile(xy, [_OUTLIER_SHARE, 1 - _OUTLIER_SHARE], axis=0)
    span = np.where(high > low, high - low, 1)
    return np.asarray(np.clip((xy - low) / span, 0, 1), dtype=np.float32)
