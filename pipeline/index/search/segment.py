"""An opened segment: immutable, safe to search from many threads."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorruptionError
from pipeline.index.faiss import codes
from pipeline.index.faiss.codec import Codec, read_codec
from pipeline.index.faiss.codes import Bits, Doubles, Floats, Rows, Stored
from pipeline.index.files import REMEDY, FileStore
from pipeline.index.manifest import (
    CodecInfo,
    SearchParams,
    SegmentInfo,
)
from pipeline.index.search.keys import Keys
from pipeline.index.vectors import normalise_rows, open_vectors, score_rows
from pipeline.storage import join_uri

Scores = TypeVar("Scores", Floats, Doubles)

EXACT_ROWS = 50_000
"""Up to so many rows that a filter leaves, scanning them all beats any index."""

EXACT_SHARE = 0.02
"""Below this share of a segment, an index finds too few of the rows that a filter leaves."""

MAX_EXACT_ROWS = 1_000_000
SCAN_ROWS = 8192
RANKED_ROWS = 2048
RANKED_QUERIES = 16
"""From more queries on, converting the vectors once and multiplying matrices is faster."""

OVERFETCH = 4
"""Candidates for every neighbour, at least: of 100 nearest, the best 128 codes miss a fifth."""

DEPTHS = (128, 1024, 10_000)
"""Neighbours that are looked for: the first of these that is not less than those asked for.

The tuned parameters hold for the first."""

WIDENING = 0.67
"""Lists grow with this power of the neighbours looked for."""

FAR_FACTOR = 4
"""Times more candidates where the nearest allowed rows are far: there are more of them there, and
their codes tell them apart no better."""

SPARE = 64
"""Rows fetched beyond those needed, so that ties seldom ask for another round."""

HALF_SLACK, FLOAT_SLACK = 2.0**-10, 4e-6
"""Inner products in float32 with stored vectors, and true cosines, are less than this apart."""

GRAPH_COST = 16
"""Vectors that are scanned in the time in which a graph keeps one candidate."""


@dataclass(frozen=True, slots=True)
class Mask:
    """The rows of a segment that may be found.

    Attributes:
        flags: One boolean a row.
        bits: The same, packed, lowest first.
        rows: How many may be found.
        chosen: True if a filter chose them, False if only deletions did.
    """

    flags: npt.NDArray[np.bool_]
    bits: Bits
    rows: int
    chosen: bool

    @classmethod
    def from_flags(cls, flags: npt.NDArray[np.bool_], *, chosen: bool) -> "Mask":
        """Pack and count ``flags``."""
        return cls(flags, np.packbits(flags, bitorder="little"), int(flags.sum()), chosen)


@dataclass(frozen=True, slots=True)
class Request:
    """Queries on their way through the segments.

    Attributes:
        vectors: Unit vectors, (n, dim).
        rotated: The same as the codes see them.
        k: Neighbours wanted.
        depth: Neighbours to look for, at least ``k``; alone decides which candidates are compared.
        params: How far to look for so many.
        lists: The nearest lists of each query, for kinds with lists.
    """

    vectors: Floats
    rotated: Floats
    k: int
    depth: int
    params: SearchParams
    lists: tuple[Floats, Rows] | None

    def pick(self, some: npt.NDArray[np.bool_]) -> "Request":
        """Return the same for some of the queries."""
        lists = self.lists and (self.lists[0][some], self.lists[1][some])
        return replace(self, vectors=self.vectors[some], rotated=self.rotated[some], lists=lists)


class Segment:
    """One opened segment. Every file was verified before anything parsed it.

    Attributes:
        info: What the manifest says.
        codec: What it shares with the other segments of its generation.
        keys: What is known of its rows besides their vectors.
    """

    def __init__(self, info: SegmentInfo, codec: Codec, files: FileStore) -> None:
        """Open the files of a segment.

        Raises:
            CorruptionError: One is missing, damaged, or does not fit the others.
        """
        self.info, self.codec = info, codec
        shown_as = join_uri(files.index, info.files["index"].path)
        index = codes.read_index(files.fetch(info.files["index"]), shown_as=shown_as)
        if index.ntotal != info.rows:
            raise CorruptionError(f"{shown_as} has {index.ntotal} rows, not {info.rows}; {REMEDY}")
        codec.attach(index)
        self._index, self._flat = index, codes.get_flat(index)
        halves = open_vectors(files.fetch(info.files["vectors"]), info, codec.dim)
        self._vectors: Stored = halves if self._flat is None else codes.view_flat(self._flat)
        self.keys = Keys(info, files)

    def search(self, request: Request, mask: Mask | None) -> tuple[Doubles, Rows]:
        """Return the cosines and rows of the nearest rows, best first, equal ones by row.

        Which rows are compared depends on ``request.depth`` and not on ``request.k``, so the
        answer for a larger ``k`` continues that for a smaller one.

        Returns:
            (n, at most k) each; where a query has fewer, the score is -inf.
        """
        allowed = self.info.rows if mask is None else mask.rows
        k = min(request.k, allowed)
        if k == 0:
            return empty_result(len(request.vectors))
        if self.info.kind == "flat" or (mask is not None and self._should_scan(mask, request)):
            return self.scan(request.vectors, k, mask)
        scores, rows, enough = self._find_candidates(request, mask)
        scored, ranked = self._rank(request.vectors, scores, candidates=rows, k=k)
        if not enough.all():
            again = self._search_everywhere(request.pick(~enough), k, mask)
            scored[~enough], ranked[~enough] = again
        return scored, ranked

    def count_candidates(self, request: Request) -> int:
        """Return how many codes a search takes for a closer look."""
        depth = min(request.depth, self.info.rows)
        if self.codec.is_exact:
            return depth
        return min(max(OVERFETCH * depth, request.params.candidates), self.info.rows)

    def _should_scan(self, mask: Mask, request: Request) -> bool:
        few = mask.chosen and mask.rows <= EXACT_ROWS
        rare = mask.rows < EXACT_SHARE * self.info.rows and mask.rows <= MAX_EXACT_ROWS
        dear = self.info.kind == "hnsw" and GRAPH_COST * self._reach(request, mask) > mask.rows
        return few or rare or dear

    def _reach(self, request: Request, mask: Mask) -> int:
        """Return among how many rows those of ``request.depth`` that the mask allows should be."""
        return int(2 * request.depth * self.info.rows / mask.rows) + 1

    def _find_candidates(
        self, request: Request, mask: Mask | None
    ) -> tuple[Floats, Rows, npt.NDArray[np.bool_]]:
        """Return scores and rows worth a closer look, and which queries have enough of them.

        A mask is applied to more rows than are wanted, found without regard to it. A query for
        which it leaves too few lies where the mask forbids most rows; the nearest allowed ones are
        further away than an index looks.
        """
        wanted, total = self.count_candidates(request), self.info.rows
        share = 1.0 if mask is None else mask.rows / total
        fetched = wanted if mask is None else min(total, int(2 * wanted / share) + SPARE)
        ef = max(request.params.ef, fetched)
        scores, rows = codes.search_codes(
            self._index, request.rotated, fetched, lists=request.lists, ef=ef
        )
        if mask is None:
            complete = self.codec.lists or (rows >= 0).all(axis=1)
            return scores, rows, np.broadcast_to(complete, len(rows))
        reach = (rows[:, : self._reach(request, mask)] >= 0).sum(axis=1)
        scores, rows = forbid(scores, rows, mask)
        seen = (rows[:, : self._reach(request, mask)] >= 0).sum(axis=1)
        best, kept = keep_best(scores, rows, min(wanted, mask.rows))
        enough = 2 * seen >= share * reach
        return best, kept, enough & (self.codec.lists > 0 or (kept >= 0).all(axis=1))

    def _search_everywhere(
        self, request: Request, k: int, mask: Mask | None
    ) -> tuple[Doubles, Rows]:
        """Compare with all rows: their vectors if they are in memory anyway, or their codes."""
        if self._flat is not None:
            return self.scan(request.vectors, k, mask)
        rows = self.info.rows if mask is None else mask.rows
        wanted, allowed = min(rows, FAR_FACTOR * self.count_candidates(request)), None
        if mask is not None:
            allowed = mask.bits if codes.can_select(self._index) else None
        fetched = self.info.rows if mask is not None and allowed is None else wanted
        lists = self.codec.find_lists(request.rotated, self.codec.lists)
        scores, found = codes.search_codes(
            self._index, request.rotated, fetched, lists=lists, allowed=allowed
        )
        if mask is not None and allowed is None:
            scores, found = keep_best(*forbid(scores, found, mask), wanted)
        return self._rank(request.vectors, scores, candidates=found, k=k)

    def _rank(
        self, queries: Floats, scores: Floats, *, candidates: Rows, k: int
    ) -> tuple[Doubles, Rows]:
        """Order candidates, row -1 for none, by their exact cosines."""
        near = []
        for query, values, line in zip(queries, scores, candidates, strict=True):
            rows = line[line >= 0]
            if self._flat is None:
                # In the order they lie in the file.
                near += self._narrow(query[None], np.sort(rows), k)
            else:
                near.append(cut_ties(values[line >= 0], rows, k, slack=FLOAT_SLACK)[1])
        return self._score(queries, near, k)

    def scan(self, queries: Floats, k: int, mask: Mask | None) -> tuple[Doubles, Rows]:
        """Return the exact best of the rows that the mask allows, (n, at most k) each."""
        allowed = self.info.rows if mask is None else mask.rows
        k = min(k, allowed)
        if k == 0:
            return empty_result(len(queries))
        if self._flat is None:
            chosen = np.arange(self.info.rows) if mask is None else np.flatnonzero(mask.flags)
            return self._score(queries, self._narrow(queries, chosen, k), k)
        bits = None if mask is None else mask.bits
        search = partial(codes.search_codes, self._flat, queries, allowed=bits)
        ties = find_ties(search, k, allowed, slack=FLOAT_SLACK)
        return self._score(queries, [rows for _, rows in ties], k)

    def _narrow(self, queries: Floats, chosen: Rows, k: int) -> list[Rows]:
        """Return for each query the rows that may be its ``k`` nearest of those chosen."""
        few = len(queries) <= RANKED_QUERIES
        step, slack = (RANKED_ROWS, HALF_SLACK) if few else (SCAN_ROWS, FLOAT_SLACK)
        ties: list[list[tuple[Floats, Rows]]] = [[] for _ in queries]
        for first in range(0, len(chosen), step):
            block = chosen[first : first + step]
            if few:
                ranker = codes.get_ranker(self.codec.dim)
                search = partial(ranker.rank, queries, self._vectors, block)
            else:
                search = partial(search_block, queries, self.read_vectors(block), block)
            best = find_ties(search, k, len(block), slack=slack)
            for found, more in zip(ties, best, strict=True):
                found.append(more)
        joined = [tuple(map(np.concatenate, zip(*found, strict=True))) for found in ties if found]
        if not joined:
            return [chosen for _ in queries]
        return [cut_ties(scores, rows, k, slack=slack)[1] for scores, rows in joined]

    def _score(self, queries: Floats, near: Sequence[Rows], k: int) -> tuple[Doubles, Rows]:
        """Return the ``k`` best of some rows for each query by their exact cosines."""
        scores, ranked = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)
        for number, (query, rows) in enumerate(zip(queries, near, strict=True)):
            cosines = score_rows(query, self._vectors, rows)
            order = np.lexsort((rows, -cosines))[:k]
            scores[number, : len(order)], ranked[number, : len(order)] = cosines[order], rows[order]
        return scores, ranked

    def read_vectors(self, rows: Rows) -> Floats:
        """Return stored vectors as unit vectors, float32 (n, dim)."""
        return normalise_rows(np.asarray(self._vectors[rows], np.float32))


def widen(params: SearchParams, depth: int, *, share: float = 1.0) -> SearchParams:
    """Return how far to look for ``depth`` neighbours where a filter leaves a share of the rows."""
    times = max(1.0, depth / DEPTHS[0] / share)
    return SearchParams(
        nprobe=math.ceil(params.nprobe * times**WIDENING),
        candidates=math.ceil(params.candidates * max(1.0, depth / DEPTHS[0]) ** WIDENING),
        ef=math.ceil(params.ef * times**WIDENING),
    )


def empty_result(count: int) -> tuple[Doubles, Rows]:
    """Return scores and rows of nothing, (count, 0) each."""
    return np.zeros((count, 0)), np.zeros((count, 0), np.int64)


def keep_best(scores: Scores, rows: Rows, k: int) -> tuple[Scores, Rows]:
    """Return the ``k`` best columns of each line, best first, ties in the order given."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def forbid(scores: Floats, rows: Rows, mask: Mask) -> tuple[Floats, Rows]:
    """Return the same with -inf and row -1 in place of what the mask forbids."""
    allowed = (rows >= 0) & mask.flags[rows]
    return np.where(allowed, scores, np.float32(-np.inf)), np.where(allowed, rows, -1)


def find_ties(
    search: Callable[..., tuple[Floats, Rows]], k: int, rows: int, *, slack: float
) -> list[tuple[Floats, Rows]]:
    """Return for each query its ``k`` best rows and all that ``slack`` may keep from being so.

    Args:
        search: Returns that many of the best scores and rows, best first, when called with ``k=``.
        k: Rows wanted.
        rows: Rows there are.
        slack: How much less than the k-th best a score may be.
    """
    k, reach = min(k, rows), min(rows, 2 * k + SPARE)
    while True:
        scores, found = search(k=reach)
        if reach == rows or (scores[:, -1] < scores[:, k - 1] - slack).all():
            break
        reach = min(rows, 4 * reach)
    return [cut_ties(*line, k, slack=slack) for line in zip(scores, found, strict=True)]


def cut_ties(scores: Floats, rows: Rows, k: int, *, slack: float) -> tuple[Floats, Rows]:
    """Return what scores at most ``slack`` less than the k-th best."""
    if len(scores) <= k:
        return scores, rows
    near = scores >= np.partition(scores, -k)[-k] - slack
    return scores[near], rows[near]


def search_block(queries: Floats, vectors: Floats, rows: Rows, *, k: int) -> tuple[Floats, Rows]:
    """Return the ``k`` best inner products with vectors, and which of ``rows`` they belong to."""
    scores, places = codes.search_exact(queries, vectors, k)
    return scores, rows[places]


def open_codec(files: FileStore, codec: CodecInfo, dim: int) -> Codec:
    """Return the codec of a generation, its file verified."""
    path = files.fetch(codec.file) if codec.file else None
    shown_as = join_uri(files.index, codec.file.path) if codec.file else codec.kind
    return read_codec(codec.kind, dim, path, shown_as=shown_as)
