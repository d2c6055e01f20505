"""A collection that is hard to search: frames of videos, copies, labels that go with vectors."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest

from index.conftest import KINDS
from index.corpus import Built, Corpus, build, draw_vectors

DIM, ROWS, COPIES, VIDEOS, FRAMES = 32, 5000, 30, 40, 20


@dataclass
class Hard:
    """An index and the truth about it; ``positions`` tell how far along one direction rows lie.

    ``cls`` of a row is its share of rows that lie before it, as text: ``cls < "0.1"`` keeps the
    tenth of the rows at one end, so that queries from the other end have no neighbours among it.
    """

    built: Built

    @cached_property
    def keys(self) -> list[str]:
        return list(self.built.corpus.vectors)

    @cached_property
    def units(self) -> np.ndarray:
        rows = np.stack([self.built.corpus.vectors[key] for key in self.keys]).astype(np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    @cached_property
    def labels(self) -> np.ndarray:
        return np.array(self.built.corpus.label(self.units))

    def rank(self, query: np.ndarray, keep: np.ndarray | None = None) -> list[tuple[str, float]]:
        """Return keys and true cosines, best first, of the rows that are kept."""
        rows = np.arange(len(self.units)) if keep is None else np.flatnonzero(keep)
        scores = self.units[rows] @ (query / np.linalg.norm(query))
        order = np.argsort(-scores, kind="stable")
        return [(self.keys[rows[i]], float(scores[i])) for i in order]


def draw_collection() -> np.ndarray:
    """Return pictures, frames of videos (near copies), and one picture many times, mixed."""
    random = np.random.default_rng(0)
    pictures = draw_vectors(ROWS - COPIES - VIDEOS * FRAMES, DIM, seed=0)
    starts = draw_vectors(VIDEOS, DIM, seed=5)
    noise = random.standard_normal((VIDEOS, FRAMES, DIM)) * np.abs(starts).mean()
    frames = (starts[:, None] + 2e-3 * noise).reshape(-1, DIM)
    copies = np.repeat(draw_vectors(1, DIM, seed=6), COPIES, axis=0)
    rows = np.concatenate([pictures, frames, copies]).astype(np.float32)
    return random.permutation(rows)


def make_label(rows: np.ndarray):
    """Return what labels vectors by how many of ``rows`` lie before them in one direction."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    direction = np.linalg.svd(units - units.mean(axis=0), full_matrices=False)[2][0]
    ordered = np.sort(units @ direction)

    def label(vectors: np.ndarray) -> list[str]:
        ends = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) @ direction
        return [f"{share:.6f}" for share in np.searchsorted(ordered, ends) / len(ordered)]

    return label


@pytest.fixture(scope="session")
def hard_by_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Hard]:
    """One index of each kind over the hard collection, with a delta and deletions."""
    return _LazyHard(tmp_path_factory.mktemp("hard"))


class _LazyHard(dict[str, Hard]):
    def __init__(self, folder) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, kind: str) -> Hard:
        rows = draw_collection()
        corpus = Corpus(str(self._folder / kind / "embeddings"), DIM, label=make_label(rows))
        for number, block in enumerate(np.array_split(rows, 5)):
            corpus.add_shard(f"shard-{number}.tar", block)
        index = str(self._folder / kind / "index")
        build(corpus, index, kind=kind, queries=200)
        corpus.extend("night.tar", rows=60, seed=7)
        corpus.drop_rows("shard-1.tar", every=50)
        build(corpus, index, kind=kind, queries=200)
        self[kind] = Hard(Built(corpus, index))
        return self[kind]


@pytest.fixture(params=KINDS)
def hard(request: pytest.FixtureRequest, hard_by_kind: dict[str, Hard]) -> Hard:
    """The hard collection in an index of each kind in turn."""
    return hard_by_kind[request.param]
