"""Build cost, size, recall and latency of an index, beside flat search over the same vectors."""

import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.benchmark.index_recall import (
    FilterRecall,
    Paging,
    count_paging,
    measure_filters,
)
from pipeline.benchmark.synthetic import (
    SHARD_ROWS,
    commit_table,
    describe_output,
    generate_vectors,
    iter_vectors,
    write_embeddings,
    write_shard,
)
from pipeline.config import IndexConfig
from pipeline.index.faiss.codes import Floats
from pipeline.index.job import build_index
from pipeline.index.search.search_index import SearchIndex
from pipeline.output.commits import list_commits, retire_commit
from pipeline.records import Commit
from pipeline.storage import Storage, join_uri

WARM_QUERIES = 200
TIMED_QUERIES = 1000
MAX_WARM_S, MAX_TIMED_S = 5.0, 20.0
"""Fewer queries are tried where each takes long."""

PAGED_QUERIES = 2


CLUSTER_ROWS = 500


@dataclass(frozen=True, slots=True)
class Latency:
    """How long single queries take, ten neighbours each, in one thread.

    Attributes:
        p50_ms: Median.
        p99_ms: 99th percentile.
        cpu_ms: Mean CPU time of one, which other load on the machine hardly touches.
        queries: How many were timed.
    """

    p50_ms: float
    p99_ms: float
    cpu_ms: float
    queries: int


@dataclass(frozen=True, slots=True)
class IndexCost:
    """What one index of synthetic vectors cost and gives.

    Attributes:
        kind: Kind of index.
        rows: Number of vectors.
        dim: Their width.
        params: Search parameters as tuned.
        recall_at: Mean recall (``value``) on held-out queries and its 95 % interval (``low``,
            ``high``) at ``"1"``, ``"10"`` and ``"100"`` neighbours.
        search: Queries that were not seen before, from a unit vector to rows and cosines.
        lookup: The same through ``SearchIndex.search``: checks, keys and all columns too.
        build_cpu_s: CPU seconds of the whole build, reading, tuning and measuring included.
        build_cpu_s_per_million: The same for a million rows.
        peak_bytes: Largest resident memory of the building process, mapped files included.
        size_bytes: Size of the index, keys and stored vectors included.
        night_bytes: Bytes that a night wrote which added 1 % and removed 0.5 %.
        night_cpu_s: CPU seconds of that night.
        night_search: ``search`` after that night, with deletions and a delta.
        filters: What searches with filters find.
        paging: What reading answers page by page gives.
    """

    kind: str
    rows: int
    dim: int
    params: Mapping[str, int]
    recall_at: Mapping[str, Mapping[str, float]]
    search: Latency
    lookup: Latency
    build_cpu_s: float
    build_cpu_s_per_million: float
    peak_bytes: int
    size_bytes: int
    night_bytes: int
    night_cpu_s: float
    night_search: Latency
    filters: tuple[FilterRecall, ...]
    paging: Paging


def measure_index(
    rows: int, dim: int, *, folder: Path, kinds: Sequence[str] = ("flat", "auto"), seed: int = 0
) -> list[IndexCost]:
    """Build indexes of synthetic vectors, each in a process of its own, and search them.

    Args:
        rows: Number of vectors.
        dim: Their width.
        folder: Where to work; needs about ``10 * rows * dim`` bytes, and is emptied afterwards.
        kinds: Kinds to build, ``"flat"`` among them to have something to compare with.
        seed: Draws other vectors.
    """
    embeddings = str(folder / "embeddings")
    write_embeddings(embeddings, rows, dim, clusters=_count_clusters(rows), seed=seed)
    context = multiprocessing.get_context("spawn")
    settings = {"folder": folder, "rows": rows, "seed": seed}
    costs = []
    try:
        for kind in kinds:
            with context.Pool(1) as pool:  # peak memory counts per process
                costs.append(pool.apply(_measure_kind, (kind, embeddings), settings))
    finally:
        for name in ("embeddings", "index"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return costs


def _measure_kind(kind: str, embeddings: str, *, folder: Path, rows: int, seed: int) -> IndexCost:
    index = folder / "index" / kind
    settings: dict[str, Any] = {"kind": kind, "workers": "local", "max_row_drop": 1.0}
    config = IndexConfig(index=str(index), embeddings=embeddings, **settings)
    started = time.process_time()
    built = build_index(config).to_dict()
    cpu_s = time.process_time() - started
    scale = 1 if sys.platform == "darwin" else 1024  # kilobytes, but bytes on macOS
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    dim = built["dim"]
    queries = _draw(rows, WARM_QUERIES + TIMED_QUERIES, dim, seed=seed + 1)
    opened = SearchIndex.open(str(index))
    search, lookup = (time_queries(opened, queries, described=flag) for flag in (False, True))
    blocks = iter_vectors(rows, dim, seed=seed, clusters=_count_clusters(rows))
    filters = measure_filters(opened, blocks, queries[WARM_QUERIES:])
    paging = count_paging(opened, queries[:PAGED_QUERIES])
    night, night_cpu_s = _measure_night(config, embeddings, rows=rows, dim=dim, seed=seed + 2)
    return IndexCost(
        kind=built["kind"],
        rows=rows,
        dim=dim,
        params=built["search"],
        recall_at=built["measured"]["recall_at"],
        search=search,
        lookup=lookup,
        build_cpu_s=round(cpu_s, 2),
        build_cpu_s_per_million=round(cpu_s / rows * 1e6, 1),
        peak_bytes=peak_bytes,
        size_bytes=built["size_bytes"],
        night_bytes=night["written_bytes"],
        night_cpu_s=round(night_cpu_s, 2),
        night_search=time_queries(SearchIndex.open(str(index)), queries, described=False),
        filters=tuple(filters),
        paging=paging,
    )


def _measure_night(
    config: IndexConfig, embeddings: str, *, rows: int, dim: int, seed: int
) -> tuple[dict[str, Any], float]:
    """Add 1 % and remove 0.5 %; return the report and the CPU seconds."""
    storage, info = Storage(), describe_output(dim)
    vectors = _draw(rows, max(1, rows // 100), dim, seed=seed)
    changed = [write_shard(embeddings, "new.tar", vectors=vectors, info=info, storage=storage)]
    left = rows // 200
    for commit in list_commits(embeddings, storage).values():
        if left and commit.shard_id not in changed:
            gone = min(left, commit.rows // 2)
            changed.append(_drop_rows(embeddings, commit, gone, storage=storage))
            left -= gone
    started = time.process_time()
    night = build_index(config).to_dict()
    seconds = time.process_time() - started
    for shard_id in changed:  # the next kind starts from the same rows
        retire_commit(embeddings, shard_id, storage)
    return night, seconds


def _drop_rows(embeddings: str, commit: Commit, number: int, *, storage: Storage) -> str:
    """Replace a shard by one without its first rows; return its id."""
    tables = [pq.read_table(join_uri(embeddings, part.path)) for part in commit.parts]
    shard_id = f"{int(commit.shard_id, 16) ^ 1:016x}"
    smaller = replace(commit, shard_id=shard_id, supersedes=(commit.shard_id,), sequence=2)
    table = pa.concat_tables(tables).slice(number)
    commit_table(embeddings, table, commit=smaller, part_rows=SHARD_ROWS, storage=storage)
    return shard_id


def _draw(rows: int, number: int, dim: int, *, seed: int) -> Floats:
    """Return other images of the collection that ``rows`` vectors were written of."""
    return generate_vectors(number, dim, seed=seed, clusters=_count_clusters(rows))


def _count_clusters(rows: int) -> int:
    return max(20, rows // CLUSTER_ROWS)


def time_queries(index: SearchIndex, queries: Floats, *, described: bool) -> Latency:
    """Search for single vectors, ten neighbours each; the first ones only warm up.

    Args:
        index: The index.
        queries: Vectors that it has not been asked for, (n, dim).
        described: Whether to look up keys and columns of what was found, as users do.
    """
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    search = index.search if described else index.snapshot.opened.search
    _time_each(index.search, queries[:WARM_QUERIES], limit_s=MAX_WARM_S)
    cpu_started = time.process_time()
    seconds = _time_each(search, queries[WARM_QUERIES:], limit_s=MAX_TIMED_S)
    cpu_s = time.process_time() - cpu_started
    p50_s, p99_s = np.quantile(seconds, [0.5, 0.99])
    count = len(seconds)
    return Latency(
        p50_ms=round(float(p50_s) * 1e3, 3),
        p99_ms=round(float(p99_s) * 1e3, 3),
        cpu_ms=round(cpu_s / count * 1e3, 3),
        queries=count,
    )


def _time_each(search: Callable[..., Any], queries: Floats, *, limit_s: float) -> list[float]:
    """Return the seconds of searches for single vectors, as many as fit into the limit."""
    seconds: list[float] = []
    for query in queries:
        started = time.perf_counter()
        search(query[None], 10)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > limit_s:
            break
    return seconds
