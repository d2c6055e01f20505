"""Searches that wait together, searched together."""

from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.errors import QueryError
from pipeline.index.search.generation import Snapshot
from pipeline.index.search.where import compile_where
from pipeline.service.problems import Problem
from pipeline.service.results import list_public_columns
from pipeline.service.schema import Query, SearchOptions, decode_vector


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
    if isinstance(options.filter, str) and not options.filter.strip():
        # A program that builds filters, to keep owners apart perhaps, has lost one here.
        detail = "the filter is empty; leave it out to search all images"
        raise Problem(422, "invalid_filter", detail=detail, where="filter")
    return compile_filter(options.filter, snapshot)


def compile_filter(where: dict[str, Any] | str, snapshot: Snapshot) -> pc.Expression | None:
    """Return a compiled filter; None for a text of nothing but spaces, as a form sends it.

    Raises:
        Problem: 422, the filter does not fit the columns.
    """
    if isinstance(where, str) and not where.strip():
        return None
    try:
        return compile_where(where, list_public_columns(snapshot.info))
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
