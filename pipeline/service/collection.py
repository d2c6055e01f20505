"""What the service needs of an index: the seam between lookups and their transport."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.records import Space

HIDDEN_COLUMNS = frozenset({"key", "shard", "row", "offset", "nbytes", "sha256", "status", "error"})
"""Columns that answers leave out: where the data lies is nobody's business outside."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A row of the index as a lookup found it.

    Attributes:
        key: Key of the image.
        score: Cosine similarity to the query; 1 for a row that was asked for by key.
        row: All its stored columns but the vector.
    """

    key: str
    score: float
    row: Mapping[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """The columns that may be shown."""
        return {name: value for name, value in self.row.items() if name not in HIDDEN_COLUMNS}


@dataclass(frozen=True, slots=True)
class MapPoints:
    """A sample of the collection in two dimensions.

    Attributes:
        method: ``"pca"`` or ``"umap"``.
        keys: Keys of the sampled images.
        xy: Coordinates in [0, 1], float32, shape (len(keys), 2).
    """

    method: str
    keys: Sequence[str]
    xy: np.ndarray


@dataclass(frozen=True, slots=True)
class GenerationInfo:
    """What describes one generation.

    Attributes:
        generation: Its name.
        rows: Number of live rows.
        space: What decided the numbers of its vectors.
        kind: Kind of index, e.g. ``"flat"``.
        recall: Measured recall@10, or None.
        created_s: When it was built, seconds since 1970.
        newest_image_s: Time of the newest image in it, seconds since 1970, or None.
        schema: Its stored columns but the vector.
    """

    generation: str
    rows: int
    space: Space
    kind: str
    recall: float | None
    created_s: float
    newest_image_s: float | None = None
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))

    @property
    def public_schema(self) -> pa.Schema:
        """The columns that answers show and filters may name."""
        shown = [item for item in self.schema if item.name not in HIDDEN_COLUMNS]
        return pa.schema([pa.field("key", pa.string()), *shown])


class Snapshot(Protocol):
    """One open generation; stays usable while somebody holds it, whatever is published."""

    @property
    def info(self) -> GenerationInfo:
        """What describes it."""
        ...

    def search(
        self, vectors: np.ndarray, k: int, *, where: pc.Expression | None, exact: bool
    ) -> list[list[Hit]]:
        """Return the ``k`` nearest rows of each vector, best first; fewer where there are fewer.

        Args:
            vectors: float32, shape (n, dim).
            k: Neighbours per vector.
            where: Only rows that fulfil it.
            exact: Compare with every vector.
        """
        ...

    def vector(self, key: str) -> np.ndarray | None:
        """Return the stored vector of an image, float32, shape (dim,), or None."""
        ...

    def find(self, key: str) -> Hit | None:
        """Return the row of an image, or None."""
        ...

    def sample(self, n: int) -> list[Hit]:
        """Return up to ``n`` rows drawn at random, without repetition."""
        ...

    def read_map(self) -> MapPoints | None:
        """Return the map that was computed with the generation, or None."""
        ...


class Collection(Protocol):
    """An index with its newest generation open."""

    def current(self) -> Snapshot:
        """Return the newest generation that has been opened."""
        ...

    def refresh(self) -> bool:
        """Open a newer generation if one was published; tell whether there was one."""
        ...

    def close(self) -> None:
        """Let go of files."""
        ...
