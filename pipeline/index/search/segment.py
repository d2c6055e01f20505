"""An opened segment: immutable, safe to search from many threads."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorruptionError
from pipeline.index.faiss import codes
from pipeline.index.faiss.codec import Codec, read_codec
from pipeline.index.faiss.codes import Bits, Floats, Rows
from pipeline.index.files import FileStore
from pipeline.index.manifest import (
    CodecInfo,
    SearchParams,
    SegmentInfo,
)
from pipeline.index.search.keys import Keys
from pipeline.index.vectors import open_vectors
from pipeline.storage import join_uri

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

MAX_OVERFETCH = 16_384


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
        params: How far to look.
        lists: The nearest lists of each query, for kinds with lists.
    """

    vectors: Floats
    rotated: Floats
    k: int
    params: SearchParams
    lists: tuple[Floats, Rows] | None


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
            raise CorruptionError(f"{shown_as} has {index.ntotal} rows, not {info.rows}")
        codec.attach(index)
        self._index = index
        self._vectors = open_vectors(files.fetch(info.files["vectors"]), info, codec.dim)
        self.keys = Keys(info, files)

    def search(self, request: Request, mask: Mask | None) -> tuple[Floats, Rows]:
        """Return the cosines and rows of the nearest rows, best first.

        Returns:
            (n, at most k) each; where a query has fewer, the score is -inf.
        """
        rows = self.info.rows if mask is None else mask.rows
        k = min(request.k, rows)
        if k == 0:
            return empty_result(len(request.vectors))
        if mask is not None and self._should_scan(mask):
            return self.scan(request.vectors, k, np.flatnonzero(mask.flags))
        if mask is not None and not codes.can_select(self._index):
            return self._search_around(request, k, mask)
        wanted = min(self.count_candidates(k, request.params), rows)
        found = codes.search_codes(
            self._index,
            request.rotated,
            wanted,
            lists=request.lists,
            ef=request.params.ef,
            allowed=None if mask is None else mask.bits,
        )
        return self._rank(request, k, *found)

    def count_candidates(self, k: int, params: SearchParams) -> int:
        """Return how many codes a search for ``k`` neighbours takes for a closer look."""
        return max(k if self.codec.is_exact else OVERFETCH * k, params.candidates)

    def _should_scan(self, mask: Mask) -> bool:
        if self.info.kind == "flat" and len(mask.flags) <= EXACT_ROWS:
            return False
        few = mask.chosen and mask.rows <= EXACT_ROWS
        rare = mask.rows < EXACT_SHARE * self.info.rows and mask.rows <= MAX_EXACT_ROWS
        return few or rare

    def _search_around(self, request: Request, k: int, mask: Mask) -> tuple[Floats, Rows]:
        """Search more than is wanted and drop what the mask forbids; scan where too few stay."""
        share = mask.rows / self.info.rows
        wanted = self.count_candidates(k, request.params)
        fetched = min(self.info.rows, int(1.3 * wanted / share) + 32, MAX_OVERFETCH)
        scores, rows = codes.search_codes(self._index, request.rotated, fetched)
        allowed = (rows >= 0) & mask.flags[rows]
        rows = np.where(allowed, rows, -1)
        scores, rows = self._rank(request, k, np.where(allowed, scores, -np.inf), rows)
        short = ~np.isfinite(scores[:, -1])
        if short.any():
            chosen = np.flatnonzero(mask.flags)
            scores[short], rows[short] = self.scan(request.vectors[short], k, chosen)
        return scores, rows

    def _rank(self, request: Request, k: int, scores: Floats, rows: Rows) -> tuple[Floats, Rows]:
        """Order candidates by their stored vectors, where the codes are not exact."""
        if self.codec.is_exact:
            return keep_best(np.where(rows >= 0, scores, np.float32(-np.inf)), rows, k)
        ranker = codes.get_ranker(self.codec.dim)
        scores = np.full((len(rows), k), -np.inf, np.float32)
        ranked = np.full((len(rows), k), -1, np.int64)
        for number, line in enumerate(rows):
            valid = np.sort(line[line >= 0])  # in the order they lie in the file
            if len(valid):
                query = request.vectors[number : number + 1]
                found, best = ranker.rank(query, self._vectors, valid, k=k)
                scores[number, : found.shape[1]] = found[0]
                ranked[number, : found.shape[1]] = best[0]
        return scores, ranked

    def scan(self, queries: Floats, k: int, chosen: Rows) -> tuple[Floats, Rows]:
        """Return the exact best of ``chosen`` rows by looking at all of them, (n, <= k) each."""
        scores, rows = empty_result(len(queries))
        ranker, few = codes.get_ranker(self.codec.dim), len(queries) <= RANKED_QUERIES
        step = RANKED_ROWS if few else SCAN_ROWS
        for first in range(0, len(chosen), step):
            block = chosen[first : first + step]
            if few:
                found, best = ranker.rank(queries, self._vectors, block, k=k)
            else:
                found, where = codes.search_exact(queries, self.read_vectors(block), k)
                best = block[where]
            scores = np.concatenate([scores, found], axis=1)
            rows = np.concatenate([rows, best], axis=1)
            scores, rows = keep_best(scores, rows, k)
        return scores, rows

    def read_vectors(self, rows: Rows) -> Floats:
        """Return stored unit vectors, float32 (n, dim)."""
        return np.asarray(self._vectors[rows], np.float32)


def empty_result(count: int) -> tuple[Floats, Rows]:
    """Return scores and rows of nothing, (count, 0) each."""
    return np.zeros((count, 0), np.float32), np.zeros((count, 0), np.int64)


def keep_best(scores: Floats, rows: Rows, k: int) -> tuple[Floats, Rows]:
    """Return the ``k`` best columns of each line, best first, ties in the order given."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def open_codec(files: FileStore, codec: CodecInfo, dim: int) -> Codec:
    """Return the codec of a generation, its file verified."""
    path = files.fetch(codec.file) if codec.file else None
    shown_as = join_uri(files.index, codec.file.path) if codec.file else codec.kind
    return read_codec(codec.kind, dim, path, shown_as=shown_as)
