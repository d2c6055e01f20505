"""The values of a search: its neighbours, and the description of the generation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import QueryError
from pipeline.index.faiss.codes import Floats
from pipeline.index.manifest import SearchParams
from pipeline.index.vectors import MIN_NORM
from pipeline.records import Space


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A row of the index as a search found it.

    Attributes:
        key: Key of the image.
        score: Cosine similarity to the query, at most 1.
        shard: URI of the object that holds the image.
        row: Position in its shard.
        offset: Where the encoded image starts in ``shard``, bytes; None where no ranged read can
            give it.
        nbytes: Length of the encoded image.
        columns: All stored columns of the row but the vector, the carried ones among them.
    """

    key: str
    score: float
    shard: str
    row: int
    offset: int | None
    nbytes: int
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """What describes the generation that serves.

    Attributes:
        uri: URI of the index.
        generation: Name of the generation.
        rows: Live rows.
        dim: Width of the vectors.
        space: What decided the numbers of its vectors.
        embeddings: URI of the embeddings it was built from.
        weights: URI of the backbone's weights, to embed a query picture.
        kind: Kind of index, e.g. ``"flat"``.
        factory: FAISS factory string.
        search: Tuned search parameters.
        measured: Recall and latency on held-out queries.
        created_s: When it was built, in seconds since 1970.
        newest_image_s: Change time of its newest image, in seconds since 1970, if known.
        segments: Number of segments.
        deleted: Rows that are stored but deleted.
        size_bytes: Size of all its files.
        columns: Stored columns but the vector.
    """

    uri: str
    generation: str
    rows: int
    dim: int
    space: Space
    embeddings: str
    weights: str
    kind: str
    factory: str
    search: SearchParams
    measured: Mapping[str, Any]
    created_s: float
    newest_image_s: float | None
    segments: int
    deleted: int
    size_bytes: int
    columns: pa.Schema


def make_neighbour(score: float, columns: Mapping[str, Any]) -> Neighbour:
    """Return a row as a search found it."""
    return Neighbour(
        key=columns["key"],
        score=min(1.0, score),
        shard=columns["shard"],
        row=columns["row"],
        offset=columns["offset"],
        nbytes=columns["nbytes"],
        columns=columns,
    )


def check_vectors(vectors: npt.ArrayLike, info: IndexInfo) -> Floats:
    """Return query vectors as unit vectors, float32 (n, dim).

    Raises:
        QueryError: They have another width, or are not finite, or have no direction.
    """
    try:
        queries = np.atleast_2d(np.asarray(vectors, np.float64))
    except (TypeError, ValueError) as error:
        raise QueryError(f"the query is not an array of numbers: {error}") from error
    if queries.ndim != 2 or queries.shape[1] != info.dim:
        raise QueryError(
            f"the query has shape {np.shape(vectors)}; this index of {info.space.backbone} holds "
            f"vectors of {info.dim}"
        )
    infinite = np.asarray(~np.isfinite(queries).all(axis=1))
    if infinite.any():
        raise QueryError(f"{_name(infinite)} holds NaN or infinite values; embed the image again")
    norms = np.linalg.norm(queries, axis=1, keepdims=True)
    short = np.asarray(norms[:, 0] < MIN_NORM)
    if short.any():
        raise QueryError(f"{_name(short)} is a zero vector; it has no nearest neighbours")
    return np.asarray(queries / norms, np.float32)


def _name(chosen: npt.NDArray[np.bool_]) -> str:
    """Return what messages call the first chosen query; one of several is named by its row."""
    return "the query" if len(chosen) == 1 else f"query {int(chosen.argmax())} of {len(chosen)}"
