"""Searches that wait together, searched together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from pipeline.errors import QueryError
from pipeline.index.search import Neighbour, Snapshot
from pipeline.index.where import compile_where
from pipeline.service.answers import list_public_columns
from pipeline.service.metrics import Metrics
from pipeline.service.models import Query, SearchOptions, decode_vector
from pipeline.service.problems import Problem


@dataclass(frozen=True, slots=True)
class Search:
    """One vector to search for; searches of equal ``group`` run as one.

    Attributes:
        snapshot: Where to search.
        vector: float32, shape (dim,).
        k: Neighbours wanted.
        where: Only rows that fulfil it.
        exact: Compare with every vector.
    """

    snapshot: Snapshot
    vector: np.ndarray
    k: int
    where: pc.Expression | None
    exact: bool

    @property
    def group(self) -> tuple[object, ...]:
        """What searches have in common that run as one."""
        # The size of k takes part, so that one huge answer does not slow all others down.
        return id(self.snapshot), str(self.where), self.exact, (self.k - 1).bit_length()


def run_searches(searches: Sequence[Search], metrics: Metrics) -> list[list[Neighbour] | Exception]:
    """Return the neighbours of each search, in order, or why there are none."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, search in enumerate(searches):
        groups.setdefault(search.group, []).append(position)
    answers: list[list[Neighbour] | Exception] = [[] for _ in searches]
    metrics.batch_size.labels("search").observe(len(searches))
    for positions in groups.values():
        with metrics.stage_s.labels("search").time():
            found = _search_group([searches[p] for p in positions])
        for position, hits in zip(positions, found, strict=True):
            answers[position] = hits
    return answers


def _search_group(searches: Sequence[Search]) -> list[list[Neighbour] | Exception]:
    first = searches[0]
    vectors = np.stack([search.vector for search in searches])  # (B, dim)
    k = max(search.k for search in searches)
    try:
        found = first.snapshot.search(vectors, k, first.where, exact=first.exact)
    except Exception as error:  # of this group alone, whatever it is
        return [error] * len(searches)
    return [hits[: search.k] for hits, search in zip(found, searches, strict=True)]


def compile_options(options: SearchOptions, snapshot: Snapshot) -> pc.Expression | None:
    """Return the compiled filter of ``options``.

    Raises:
        Problem: 409, they are about another space; 422, the filter does not fit the columns.
    """
    expected = snapshot.info.space.id
    if options.space is not None and options.space != expected:
        detail = f"the index holds vectors of space {expected}; embed the query as it was"
        raise Problem(409, "other_space", detail=detail, where="space")
    if options.filter is None:
        return None
    try:
        return compile_where(options.filter, list_public_columns(snapshot.info))
    except QueryError as error:
        raise Problem(422, "invalid_filter", detail=str(error), where="filter") from error


def read_vector(query: Query, dim: int) -> np.ndarray:
    """Return the vector that a query gives, as a list or in base64.

    Raises:
        Problem: 422, it cannot be compared with vectors of ``dim`` values.
    """
    if query.vector:
        where = "query.vector"
        with np.errstate(over="ignore"):  # becomes infinite, which is refused below
            vector = np.asarray(query.vector, dtype=np.float32)
    else:
        where = "query.vector_base64"
        vector = decode_vector(query.vector_base64, where=where)
    check_vector(vector, dim, where=where)
    return vector


def check_vector(vector: np.ndarray, dim: int, *, where: str) -> None:
    """Refuse what cannot be compared.

    Raises:
        Problem: 422, wrong length, values that are not finite, or no direction.
    """
    problem = None
    if len(vector) != dim:
        problem = f"the vector has {len(vector)} values; this index has {dim}"
    elif not np.isfinite(vector).all():
        problem = "the vector has values that are not finite as float32"
    elif not float(np.linalg.norm(vector.astype(np.float64))) > 1e-6:
        problem = "the vector is zero, and so has no direction"
    if problem is not None:
        raise Problem(422, "invalid_vector", detail=problem, where=where)
