"""Recall and latency of search parameters, measured segment by segment on held-out queries."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.index.faiss.codes import Floats, Rows
from pipeline.index.files import FileStore
from pipeline.index.faiss.package import set_threads
from pipeline.index.manifest import CodecInfo, FileInfo, SearchParams, SegmentInfo, Tombstones
from pipeline.index.search.segment import OVERFETCH, Mask, Request, Segment, keep_best
from pipeline.index.vectors import read_bits
from pipeline.index.search.segment import open_codec
from pipeline.index.build.ground_truth import read_queries
from pipeline.index.build.ground_truth import DEPTH, TIE, Queries, Truth, count_hits, drop_dead, merge_truths


RANKS = (1, 10, 100)
DEPTHS = (10, 100)
"""Neighbours asked for; who asks for more gets more candidates, and so better first ones."""

TIMED_QUERIES = 100
SELF_HIT_ROWS = 200
SELF_TOLERANCE = 2.0**-11 + TIE
"""Exact codes and stored float16 vectors, which round by at most that share, score so far apart."""

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
        scores: Best scores of each query for each setting and each of ``DEPTHS``, (n, <= depth).
        seconds: Time of single queries in the segment for each setting, (t,).
        shared_seconds: Time of what single queries need once for all segments, (t,).
        self_hits: Rows that found themselves.
        self_tried: Rows that should have.
    """

    scores: tuple[Mapping[int, Floats], ...]
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
    scores = tuple(
        _search_others(segment, queries.vectors, own=own, params=p, mask=mask)
        for p in task.settings
    )
    if not task.timed:
        return SegmentMeasure(scores, (), (), 0, 0)
    timed = [
        _time_queries(segment, queries.vectors, params=params, mask=mask)
        for params in task.settings
    ]
    hits, tried = _count_self_hits(segment, task.settings[-1], mask)
    shared, single = tuple(t[0] for t in timed), tuple(t[1] for t in timed)
    return SegmentMeasure(scores, single, shared, hits, tried)


def _find_own(segment: Segment, key: str) -> int:
    row = segment.keys.find_row(key)
    return -1 if row is None else row


def _make_request(segment: Segment, vectors: Floats, *, params: SearchParams, k: int) -> Request:
    rotated = segment.codec.rotate(vectors)
    return Request(vectors, rotated, k, params, segment.codec.find_lists(rotated, params.nprobe))


def _search_others(
    segment: Segment,
    vectors: Floats,
    *,
    own: Rows,
    params: SearchParams,
    mask: Mask | None,
) -> dict[int, Floats]:
    """Return the best scores of each query by depth, its own row left out."""
    found: dict[int, Floats] = {}
    same = segment.info.kind == "flat" or params.candidates >= OVERFETCH * (max(DEPTHS) + 1)
    for depth in DEPTHS[-1:] if same else DEPTHS:
        request = _make_request(segment, vectors, params=params, k=depth + 1)
        scores, rows = segment.search(request, mask)
        scores = np.where(rows == own[:, None], -np.inf, scores).astype(np.float32)
        found[depth] = keep_best(scores, rows, depth)[0]
    return {depth: found.get(depth, found[max(DEPTHS)])[:, :depth] for depth in DEPTHS}


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
    # An exact duplicate is as good as the row itself.
    own = np.einsum("nd,nd->n", vectors, vectors)
    return int((scores[:, 0] >= own - SELF_TOLERANCE).sum()), len(rows)


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
        found = {
            depth: -np.sort(-np.concatenate([m.scores[number][depth] for m in measures], 1), 1)
            for depth in DEPTHS
        }
        recall = {
            rank: estimate_recall(found[min(d for d in DEPTHS if d >= rank)], truth, rank)
            for rank in RANKS
        }
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
