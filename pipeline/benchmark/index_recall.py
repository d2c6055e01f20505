"""What searches find, filtered and not, next to brute force over the vectors as embedded."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.benchmark.synthetic import SHARD_ROWS, find_sides
from pipeline.index.faiss.codes import Doubles, Floats
from pipeline.index.search.neighbour import check_vectors
from pipeline.index.search.search_index import SearchIndex
from pipeline.index.search.where import compile_where

SHARES = (1.0, 0.9, 0.5, 0.1, 0.01, 0.001)
RANKS = (10, 100, 1000)
SIDE_QUERIES = 25
"""Queries from either end of the collection, of as many as are given."""

PAGED_ROWS, PAGE_ROWS = 10_000, 250
TIE = 3e-6
"""Cosines closer than this are equal, whichever of the two rows is found."""


@dataclass(frozen=True, slots=True)
class FilterRecall:
    """What searches with one filter find.

    Attributes:
        share: Share of the rows that the filter keeps.
        against: Whether queries come from where the filter keeps nothing, rather than everything.
        recall_at: Mean recall by number of neighbours, as text.
        p50_ms: Median time of one search for ten, keys and columns included.
    """

    share: float
    against: bool
    recall_at: dict[str, float]
    p50_ms: float


@dataclass(frozen=True, slots=True)
class Paging:
    """What reading an answer page by page gives.

    Attributes:
        rows: Rows read, of several queries.
        doubled: Rows that came twice.
        lost: Rows that did not come, though there were as many.
    """

    rows: int
    doubled: int
    lost: int


def measure_filters(
    index: SearchIndex, blocks: Iterable[Floats], queries: Floats
) -> list[FilterRecall]:
    """Search from both ends of the collection with filters that keep one end.

    Args:
        index: An index of a synthetic output.
        blocks: The vectors it was built of, in order.
        queries: Vectors that are not in it, (n, dim).
    """
    order = np.argsort(find_sides(queries))
    ends = (queries[order[:SIDE_QUERIES]], queries[order[-SIDE_QUERIES:]])
    chosen = np.concatenate(ends)
    cosines, sides = _compare(chosen, blocks)
    cases = []
    for share in SHARES:
        limit = float(np.quantile(sides, share)) if share < 1 else np.inf
        where = None if share == 1 else {"side": {"$lt": limit}}
        for against, end in enumerate(np.split(np.arange(len(chosen)), [len(ends[0])])):
            exact = cosines[end][:, sides < limit]
            shares = {
                str(k): _measure_recall(
                    index, chosen[end], k, where=where, known=(cosines[end], exact)
                )
                for k in RANKS
            }
            p50_ms = _time(index, chosen[end], where)
            cases.append(FilterRecall(share, bool(against), shares, p50_ms))
    return cases


def _compare(queries: Floats, blocks: Iterable[Floats]) -> tuple[Doubles, Doubles]:
    """Return cosines of all queries to all vectors in float64, and the sides of the vectors."""
    cosines, sides = [], []
    units = queries / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    for block in blocks:
        rows = block.astype(np.float64)
        cosines.append(units @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T)
        sides.append(find_sides(block))
    return np.concatenate(cosines, axis=1), np.concatenate(sides)


def _measure_recall(
    index: SearchIndex, queries: Floats, k: int, *, where: Any, known: tuple[Doubles, Doubles]
) -> float:
    shares = []
    for places, cosines, exact in zip(_find(index, queries, k, where), *known, strict=True):
        wanted = min(k, len(exact))
        last = np.partition(exact, -wanted)[-wanted] - TIE
        shares.append((cosines[places] >= last).sum() / wanted)
    return round(float(np.mean(shares)), 4)


def _find(
    index: SearchIndex, queries: Floats, k: int, where: Any = None
) -> list[npt.NDArray[np.int64]]:
    """Return the places of what is found in the collection; other columns take longer to read.

    A synthetic key tells its place, e.g. ``shard-00002.tar/00000017.jpg``.
    """
    snapshot = index.snapshot
    generation = snapshot.opened
    masks = None
    if where is not None:
        masks = generation.make_masks(compile_where(where, snapshot.info.columns))
    units = check_vectors(queries, snapshot.info)
    places = []
    for line in zip(*generation.search(units, k, masks=masks), strict=True):
        found = [(n, r) for score, n, r in zip(*line, strict=True) if np.isfinite(score)]
        keys = [generation.segments[number].keys.read_key(int(row)) for number, row in found]
        places.append([SHARD_ROWS * int(key[6:11]) + int(key.split("/")[1][:8]) for key in keys])
    return [np.array(line, np.int64) for line in places]


def _time(index: SearchIndex, queries: Floats, where: Any) -> float:
    seconds = []
    for query in queries:
        started = time.perf_counter()
        index.search(query, 10, where)
        seconds.append(time.perf_counter() - started)
    return round(float(np.median(seconds)) * 1e3, 3)


def count_paging(index: SearchIndex, queries: Floats) -> Paging:
    """Read the best rows of some queries page by page, as a client with an offset does."""
    rows = min(PAGED_ROWS, len(index))
    doubled = lost = 0
    for query in queries:
        seen: list[int] = []
        for offset in range(0, rows, PAGE_ROWS):
            k = min(rows, offset + PAGE_ROWS)
            seen += _find(index, query[None], k)[0][offset:].tolist()
        doubled += len(seen) - len(set(seen))
        lost += rows - len(set(seen))
    return Paging(rows * len(queries), doubled, lost)
