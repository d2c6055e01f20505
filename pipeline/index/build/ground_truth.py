"""Queries to measure with and their exact neighbours, kept segment by segment.

The exact neighbours of a query over the whole index are the best of its exact neighbours in each
segment. So every segment computes its own while its rows stream by, no later run has to read the
vectors again, and deletions only strike entries out. A *floor* per query (the score of its last
neighbour when the queries were drawn) keeps what later segments add down to what matters.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.index.faiss.codes import Doubles, Floats, Rows, search_exact
from pipeline.index.files import FileStore
from pipeline.index.manifest import FileInfo
from pipeline.index.vectors import normalise_rows

DEPTH = 128
"""Exact neighbours kept per query: 100 to measure by, the rest so that deletions leave 100."""

TIE = 3e-6
"""Scores closer than this are equal: the order of summation moves a cosine less."""

ROUNDING = 1e-4
"""How much storing a vector as float16 moves its cosine to another, at most."""

BLEND = 0.2
"""How far queries lie on the way from one held-out row to another."""


@dataclass(frozen=True, slots=True)
class Queries:
    """Vectors to measure with, which no training has seen.

    Attributes:
        keys: The keys of those that are rows of the index, where a row is not its own neighbour;
            empty for others.
        vectors: Unit vectors, float32 (n, dim).
        floors: Scores below which neighbours are not kept, float32 (n,).
    """

    keys: tuple[str, ...]
    vectors: Floats
    floors: Floats


@dataclass(frozen=True, slots=True)
class Truth:
    """Exact neighbours in one segment, or merged over several, sorted by query, then score.

    Attributes:
        query: Position of the query, uint32 (m,).
        row: Row in the segment, uint32 (m,).
        score: Cosine, float32 (m,).
    """

    query: npt.NDArray[np.uint32]
    row: npt.NDArray[np.uint32]
    score: Floats

    def to_bytes(self) -> bytes:
        """Serialise: number of queries, neighbours of each, then rows, then scores."""
        queries = int(self.query[-1]) + 1 if len(self.query) else 0
        counts = np.bincount(self.query, minlength=queries).astype(np.uint32)
        head = np.array([queries], np.uint32)
        return b"".join(array.tobytes() for array in (head, counts, self.row, self.score))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Truth":
        """Read ``to_bytes``."""
        values = np.frombuffer(data, np.uint32)
        counts, rest = np.split(values[1:], [int(values[0])])
        row, score = np.split(rest, 2)
        return cls(
            np.repeat(np.arange(len(counts), dtype=np.uint32), counts), row, score.view("f4")
        )


class TruthBuilder:
    """Collects the exact neighbours of queries in rows that stream by."""

    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        self._keys = pa.array(queries.keys, pa.string())
        count = len(queries.keys)
        self._scores = np.full((count, 0), -np.inf, np.float32)
        self._rows = np.zeros((count, 0), np.int64)

    def add(self, vectors: Floats, keys: pa.ChunkedArray, first_row: int) -> None:
        """Look at the next rows: unit vectors (n, dim), their keys, the number of the first."""
        if not len(self._keys) or not len(vectors):
            return
        scores, rows = search_exact(self._queries.vectors, vectors, DEPTH + 1)
        own = pc.index_in(keys, value_set=self._keys).fill_null(-1).to_numpy()
        itself = own[rows] == np.arange(len(rows))[:, None]
        scores[itself] = -np.inf
        self._scores = np.concatenate([self._scores, scores], axis=1)
        self._rows = np.concatenate([self._rows, rows + first_row], axis=1)
        if self._scores.shape[1] > DEPTH:
            best = np.argpartition(-self._scores, DEPTH - 1, axis=1)[:, :DEPTH]
            self._scores = np.take_along_axis(self._scores, best, axis=1)
            self._rows = np.take_along_axis(self._rows, best, axis=1)

    def finish(self, known: Truth | None = None) -> Truth:
        """Return what was found, without what lies below the floors.

        Args:
            known: Better scores of some of the rows: those of the vectors as embedded, where the
                rows were read from a segment, which has rounded them.
        """
        if known is not None and self._scores.shape[1]:
            better = look_up(known, self._rows)
            self._scores = np.where(np.isfinite(better), better, self._scores)
        order = np.argsort(-self._scores, axis=1, kind="stable")
        scores = np.take_along_axis(self._scores, order, axis=1)
        rows = np.take_along_axis(self._rows, order, axis=1)
        kept = (scores >= self._queries.floors[:, None]) & np.isfinite(scores)
        query = np.nonzero(kept)[0].astype(np.uint32)
        return Truth(query, rows[kept].astype(np.uint32), scores[kept])


def read_queries(files: FileStore, queries: Mapping[str, FileInfo], dim: int) -> Queries:
    """Return the held-out queries; none where there is no such file."""
    if "queries" not in queries:
        return Queries((), np.zeros((0, dim), np.float32), np.zeros(0, np.float32))
    floors = files.fetch(queries["floors"]).read_bytes() if "floors" in queries else None
    return decode_queries(files.fetch(queries["queries"]).read_bytes(), floors)


"""Exact neighbours kept per query: 100 to measure by, the rest so that deletions leave 100."""


def join_truths(truths: Sequence[Truth]) -> Truth:
    """Put together what is known of different rows of one segment, in no order."""
    return Truth(
        np.concatenate([truth.query for truth in truths]),
        np.concatenate([truth.row for truth in truths]),
        np.concatenate([truth.score for truth in truths]),
    )


def merge_truths(truths: Sequence[Truth], count: int, depth: int = DEPTH) -> Floats:
    """Return the best scores of each query over all segments, (count, depth), -inf padded."""
    query = np.concatenate([truth.query for truth in truths])
    score = np.concatenate([truth.score for truth in truths])
    order = np.lexsort((-score, query))
    query, score = query[order], score[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    merged = np.full((count, depth), -np.inf, np.float32)
    kept = rank < depth
    merged[query[kept], rank[kept]] = score[kept]
    return merged


def look_up(truth: Truth, rows: Rows) -> Floats:
    """Return the exact scores of rows for each query, (n, m); -inf for those that it does not hold.

    Args:
        truth: The exact neighbours in a segment.
        rows: Row numbers in that segment, -1 for none, (n, m).
    """
    known = truth.query.astype(np.int64) << 32 | truth.row
    order = np.argsort(known)
    wanted = np.arange(len(rows))[:, None] << 32 | rows
    places = np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)
    if not len(known):
        return np.full(rows.shape, -np.inf, np.float32)
    held = (known[order[places]] == wanted) & (rows >= 0)
    return np.where(held, truth.score[order[places]], np.float32(-np.inf))


def score_as_embedded(truth: Truth, scores: Doubles, rows: Rows) -> Floats:
    """Return the exact scores of what a search found; -inf for what is no exact neighbour.

    Where more rows are equally near than a query's exact neighbours that are kept, which of them
    were kept is chance; others that score like the last one count as much.

    Args:
        truth: The exact neighbours in a segment.
        scores: What the search says of the rows, (n, m).
        rows: What it found, (n, m).
    """
    exact = look_up(truth, rows)
    counts = np.bincount(truth.query, minlength=len(rows))[: len(rows)]
    last = np.full(len(rows), np.inf, np.float32)
    full = counts >= DEPTH
    last[full] = truth.score[np.cumsum(counts)[full] - 1]
    tied = ~np.isfinite(exact) & (scores >= last[:, None] - ROUNDING)
    return np.where(tied, last[:, None], exact)


def drop_dead(truth: Truth, dead: npt.NDArray[np.bool_]) -> Truth:
    """Return the neighbours in a segment that are not deleted."""
    live = ~dead[truth.row]
    return Truth(truth.query[live], truth.row[live], truth.score[live])


def blend_rows(vectors: Floats) -> Floats:
    """Return queries that resemble rows but are none: each moved some way to the next one.

    A row that is its own query has its near duplicates for neighbours, such as the frames of its
    video, which any index finds; a picture that is new to the collection has none.

    Args:
        vectors: Unit vectors in random order, float32 (n, dim).
    """
    return normalise_rows((1 - BLEND) * vectors + BLEND * np.roll(vectors, 1, axis=0))


def encode_queries(keys: Sequence[str], vectors: Floats) -> bytes:
    """Serialise queries as an Arrow stream."""
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table({"key": pa.array(keys, pa.string()), "vector": flat})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def decode_queries(data: bytes, floors: bytes | None) -> Queries:
    """Read ``encode_queries`` and the floors, which are -inf where None."""
    table = pa.ipc.open_stream(data).read_all()
    column = table.column("vector").combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    keys = tuple(table.column("key").to_pylist())
    lowest: Any = np.full(len(keys), -np.inf, np.float32)
    return Queries(keys, vectors, np.frombuffer(floors, np.float32) if floors else lowest)


def find_floors(scores: Floats, slack: float = TIE) -> Floats:
    """Return each query's lowest kept score from merged truth; -inf where fewer were found."""
    last = scores[:, -1]
    return cast(Floats, np.where(np.isfinite(last), last - slack, -np.inf).astype(np.float32))


def count_hits(found: Floats, truth: Floats, k: int) -> tuple[Floats, Rows]:
    """Compare found scores with exact ones.

    A found row counts if it is as near as the exact k-th neighbour: of two equal pictures either
    is right.

    Args:
        found: Scores found, best first, (n, >= k), -inf padded.
        truth: Exact scores, best first, (n, >= k), -inf padded.
        k: How many neighbours are asked for.

    Returns:
        Hits and possible hits of each query, (n,) each.
    """
    possible = np.isfinite(truth[:, :k]).sum(axis=1)
    last = truth[np.arange(len(truth)), np.maximum(possible, 1) - 1]
    hits = (found[:, :k] >= (last - TIE)[:, None]).sum(axis=1)
    return np.minimum(hits, possible).astype(np.float32), possible
