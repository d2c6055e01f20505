"""Recall and latency of search parameters, measured segment by segment on held-out queries."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.index.build.ground_truth import (
    DEPTH,
    Queries,
    Truth,
    count_hits,
    drop_dead,
    merge_truths,
    read_queries,
    score_as_embedded,
)
from pipeline.index.faiss.codes import Doubles, Floats, Rows
from pipeline.index.faiss.package import set_threads
from pipeline.index.files import FileStore
from pipeline.index.manifest import CodecInfo, FileInfo, SearchParams, SegmentInfo, Tombstones
from pipeline.index.search.segment import DEPTHS, Mask, Request, Segment, keep_best, open_codec
from pipeline.index.vectors import read_bits

RANKS = (1, 10, 100)

GATED_RANKS = (10, 100)
"""Neighbours at which recall has to reach the target; searches for more look further."""

TIMED_QUERIES = 100
SELF_HIT_ROWS = 200


Z_95 = 1.96


@dataclass(frozen=True, slots=True)
class MeasureTask:
    """One segment to measure.

    Attributes:
        files: How to reach the index.
        dim: Width of the vectors.
        codec: How its rows are encoded.
        segment: The segment.
        tombstones: Its deleted rows.
        queries: The held-out queries.
        settings: What to try.
        timed: Whether to measure latency and self-hits too.
    """

    files: FileStore
    dim: int
    codec: CodecInfo
    segment: SegmentInfo
    tombstones: Tombstones | None
    queries: Mapping[str, FileInfo]
    settings: tuple[SearchParams, ...]
    timed: bool


@dataclass(frozen=True, slots=True)
class SegmentMeasure:
    """What was measured in one segment.

    Attributes:
        scores: Best scores of each query for each setting, (n, m).
        embedded: The same rows' scores as embedded; -inf if not among the exact neighbours, (n, m).
        seconds: Time of single queries in the segment for each setting, (t,).
        shared_seconds: Time of what single queries need once for all segments, (t,).
        self_hits: Rows that found themselves.
        self_tried: Rows that should have.
    """

    scores: tuple[Doubles, ...]
    embedded: tuple[Floats, ...]
    seconds: tuple[Floats, ...]
    shared_seconds: tuple[Floats, ...]
    self_hits: int
    self_tried: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Recall and latency of one setting over the whole index.

    Attributes:
        params: The setting.
        recall: Mean recall and the bounds of its 95 % confidence interval, by rank.
        latency_ms: Median and 95th percentile of one query in one thread; None if not measured.
        queries: Number of queries.
        self_hits: Share of sampled rows that found themselves; None if not measured.
    """

    params: SearchParams
    recall: Mapping[int, tuple[float, float, float]]
    latency_ms: tuple[float, float] | None
    queries: int
    self_hits: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values; ``recall`` is that of ten neighbours."""
        named = {
            str(rank): dict(zip(("value", "low", "high"), values, strict=True))
            for rank, values in self.recall.items()
        }
        latency = self.latency_ms and dict(zip(("p50", "p95"), self.latency_ms, strict=True))
        return {
            "params": asdict(self.params),
            "recall": self.recall[10][0],
            "recall_at": named,
            "latency_ms": latency,
            "queries": self.queries,
            "self_hits": self.self_hits,
        }


def measure_segment(task: MeasureTask) -> SegmentMeasure:
    """Search one segment for all queries with each setting, in one thread.

    Opening it verifies its digests, its row count and its keys, which makes this a gate as well.
    """
    set_threads(1)
    codec = open_codec(task.files, task.codec, task.dim)
    segment = Segment(task.segment, codec, task.files)
    queries = read_queries(task.files, task.queries, task.dim)
    dead = read_bits(
        task.files, task.tombstones.file if task.tombstones else None, task.segment.rows
    )
    mask = Mask.from_flags(~dead, chosen=False) if task.tombstones else None
    own = np.array([_find_own(segment, key) for key in queries.keys], np.int64)
    truth = Truth.from_bytes(task.files.fetch(task.segment.files["truth"]).read_bytes())
    scores, embedded = [], []
    for params in task.settings:
        found = _search_others(segment, queries.vectors, own=own, params=params, mask=mask)
        scores.append(found[0])
        embedded.append(score_as_embedded(truth, *found))
    if not task.timed:
        return SegmentMeasure(tuple(scores), tuple(embedded), (), (), 0, 0)
    timed = [
        _time_queries(segment, queries.vectors, params=params, mask=mask)
        for params in task.settings
    ]
    hits, tried = _count_self_hits(segment, task.settings[-1], mask)
    shared, single = tuple(t[0] for t in timed), tuple(t[1] for t in timed)
    return SegmentMeasure(tuple(scores), tuple(embedded), single, shared, hits, tried)


def _find_own(segment: Segment, key: str) -> int:
    row = segment.keys.find_row(key) if key else None
    return -1 if row is None else row


def _make_request(segment: Segment, vectors: Floats, *, params: SearchParams, k: int) -> Request:
    rotated = segment.codec.rotate(vectors)
    lists = segment.codec.find_lists(rotated, params.nprobe)
    return Request(vectors, rotated, k, DEPTHS[0], params, lists)


def _search_others(
    segment: Segment,
    vectors: Floats,
    *,
    own: Rows,
    params: SearchParams,
    mask: Mask | None,
) -> tuple[Doubles, Rows]:
    """Return the best scores and rows of each query, its own row left out."""
    request = _make_request(segment, vectors, params=params, k=max(RANKS) + 1)
    scores, rows = segment.search(request, mask)
    return keep_best(np.where(rows == own[:, None], -np.inf, scores), rows, max(RANKS))


def _time_queries(
    segment: Segment, vectors: Floats, *, params: SearchParams, mask: Mask | None
) -> tuple[Floats, Floats]:
    """Return the seconds that single queries spend before the segment, and in it."""
    shared, single = [], []
    for vector in vectors[:TIMED_QUERIES]:
        started = time.perf_counter()
        request = _make_request(segment, vector[None], params=params, k=10)
        middle = time.perf_counter()
        segment.search(request, mask)
        shared.append(middle - started)
        single.append(time.perf_counter() - middle)
    return np.array(shared, np.float32), np.array(single, np.float32)


def _count_self_hits(segment: Segment, params: SearchParams, mask: Mask | None) -> tuple[int, int]:
    """Search for stored rows by their own vectors."""
    live = np.arange(segment.info.rows) if mask is None else np.flatnonzero(mask.flags)
    random = np.random.default_rng(0)
    rows = random.choice(live, min(SELF_HIT_ROWS, len(live)), replace=False)
    vectors = segment.read_vectors(rows)
    if not len(rows):
        return 0, 0
    scores, _ = segment.search(_make_request(segment, vectors, params=params, k=10), mask)
    return int((scores[:, 0] == 1).sum()), len(rows)  # of exact duplicates, either is right


def combine(
    measures: Sequence[SegmentMeasure],
    settings: Sequence[SearchParams],
    truth: Floats,
) -> list[Measured]:
    """Put what was measured in the segments together.

    Args:
        measures: One of each segment.
        settings: What was tried, in order.
        truth: Exact scores of each query over all segments, best first, (n, DEPTH).
    """
    tried = sum(measure.self_tried for measure in measures)
    hits = sum(measure.self_hits for measure in measures)
    outcomes = []
    for number, params in enumerate(settings):
        scores = np.concatenate([measure.scores[number] for measure in measures], axis=1)
        embedded = np.concatenate([measure.embedded[number] for measure in measures], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : max(RANKS)]
        found = np.take_along_axis(embedded, best, axis=1)
        recall = {rank: estimate_recall(found, truth, rank) for rank in RANKS}
        latency = _sum_latency(measures, number) if tried else None
        share = hits / tried if tried else None
        outcomes.append(Measured(params, recall, latency, len(truth), share))
    return outcomes


def _sum_latency(measures: Sequence[SegmentMeasure], number: int) -> tuple[float, float]:
    shared = np.median([measure.shared_seconds[number] for measure in measures], axis=0)
    total = shared + np.sum([measure.seconds[number] for measure in measures], axis=0)
    p50, p95 = np.quantile(total, [0.5, 0.95]) if len(total) else (0.0, 0.0)
    return round(float(p50) * 1e3, 4), round(float(p95) * 1e3, 4)


def estimate_recall(found: Floats, truth: Floats, rank: int) -> tuple[float, float, float]:
    """Return mean recall and the bounds of its 95 % confidence interval.

    Wilson's interval, with as many independent trials as the spread between queries allows:
    the neighbours of one query are found or missed together.
    """
    hits, possible = count_hits(found, truth, rank)
    usable = possible > 0
    if not usable.any():
        return 1.0, 0.0, 1.0
    shares = hits[usable] / possible[usable]
    mean, count = float(shares.mean()), len(shares)
    spread = float(shares.var())
    trials = float(count)
    if spread > 0:
        trials = min(rank * trials, max(trials, trials * mean * (1 - mean) / spread))
    centre = (mean + Z_95**2 / (2 * trials)) / (1 + Z_95**2 / trials)
    half = Z_95 * math.sqrt(mean * (1 - mean) / trials + (Z_95 / (2 * trials)) ** 2)
    half /= 1 + Z_95**2 / trials
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return round(mean, 5), round(low, 5), round(high, 5)


def read_truth(
    files: FileStore,
    segments: Sequence[SegmentInfo],
    *,
    tombstones: Mapping[str, Tombstones],
    queries: Queries,
) -> Floats:
    """Return exact scores of each query over all live rows, best first, (n, DEPTH)."""
    truths = []
    for segment in segments:
        truth = Truth.from_bytes(files.fetch(segment.files["truth"]).read_bytes())
        if segment.id in tombstones:
            truth = drop_dead(truth, read_bits(files, tombstones[segment.id].file, segment.rows))
        truths.append(truth)
    return merge_truths(truths, len(queries.keys), DEPTH)
