"""Neighbours of a whole collection as Parquet: the kNN graph, and groups of near duplicates.

One task takes some hundred thousand rows as queries and holds one segment at a time, so neither the
collection nor its graph has to fit into any process; only the pairs of near duplicates do.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.index.faiss.codes import Doubles, Rows
from pipeline.index.faiss.package import set_threads
from pipeline.index.files import FileStore
from pipeline.index.manifest import Manifest, SearchParams, SegmentInfo
from pipeline.index.search.segment import (
    DEPTHS,
    Mask,
    Request,
    Segment,
    keep_best,
    open_codec,
    widen,
)
from pipeline.index.vectors import read_bits
from pipeline.index.workers import Workers
from pipeline.storage import join_uri

TASK_ROWS = 200_000
QUERY_ROWS = 1024
MAX_DUPLICATES = 50
"""Neighbours of one row that can make it a near duplicate; chains of pairs make larger groups."""

_SHIFT = 32


@dataclass(frozen=True, slots=True)
class GraphTask:
    """Rows whose neighbours are wanted.

    Attributes:
        files: How to reach the index.
        manifest: The generation.
        segment: Number of the segment that holds the rows.
        first: Number of the first row.
        rows: How many.
        knn: Neighbours to write per row; None to write none.
        threshold: Cosine from which pairs are returned; None to return none.
        folder: Where to write, under the index.
    """

    files: FileStore
    manifest: Manifest
    segment: int
    first: int
    rows: int
    knn: int | None
    threshold: float | None
    folder: str

    @property
    def path(self) -> str:
        """The file of this task, under the index."""
        return f"{self.folder}/part-{self.segment:04d}-{self.first:09d}.parquet"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows that are near duplicates of each other.

    Attributes:
        left: Segment and row as one number, int64 (n,).
        right: The same of the other row.
        score: Their cosines.
    """

    left: Rows
    right: Rows
    score: Doubles


def write_neighbours(
    files: FileStore,
    manifest: Manifest,
    *,
    knn: int | None,
    threshold: float | None,
    workers: Workers,
) -> dict[str, Any]:
    """Write the kNN graph and the groups of near duplicates of a generation.

    Args:
        files: The index.
        manifest: The generation.
        knn: Neighbours per row, or None.
        threshold: Cosine from which two rows are near duplicates, or None.
        workers: Who does the work.

    Returns:
        URIs and counts, JSON-ready.
    """
    base = f"exports/{manifest.generation}"
    tasks = [
        GraphTask(
            files=files,
            manifest=manifest,
            segment=number,
            first=first,
            rows=min(TASK_ROWS, segment.rows - first),
            knn=knn,
            threshold=threshold,
            folder=f"{base}/knn-{knn}",
        )
        for number, segment in enumerate(manifest.segments)
        for first in range(0, segment.rows, TASK_ROWS)
    ]
    memory_bytes = TASK_ROWS * 16 * (knn or MAX_DUPLICATES) + (1 << 30)
    pairs = workers.run(find_neighbours, tasks, memory_bytes=memory_bytes)
    report: dict[str, Any] = {}
    if knn is not None:
        report["knn"] = {"uri": join_uri(files.index, base, f"knn-{knn}"), "rows": manifest.rows}
    if threshold is not None:
        shown = repr(threshold).removesuffix(".0")  # all digits: two thresholds are two files
        path = f"{base}/near-duplicates-{shown}.parquet"
        report["near_duplicates"] = write_groups(
            files, manifest, pairs=merge_pairs(pairs), path=path
        )
    return report


def find_neighbours(task: GraphTask) -> Pairs:
    """Search for the neighbours of the task's rows in every segment, one after another."""
    set_threads(1)
    manifest, files = task.manifest, task.files
    codec = open_codec(files, manifest.codec, manifest.dim)
    own = Segment(manifest.segments[task.segment], codec, files)
    span = np.arange(task.first, task.first + task.rows)
    mask = read_mask(files, manifest, own.info)
    queries = span if mask is None else span[mask.flags[span]]
    k = 1 + max(task.knn or 0, MAX_DUPLICATES if task.threshold is not None else 0)
    params = widen(manifest.search, k)
    scores, found = search_segments(task, own, queries, k=k, params=params)
    short = np.isneginf(scores).any(axis=1)
    if short.any() and codec.lists:  # few rows lie in the lists that were looked into
        params = replace(params, nprobe=codec.lists)
        scores[short], found[short] = search_segments(task, own, queries[short], k=k, params=params)
    itself = number_rows(task.segment, queries)
    scores, found = drop_itself(scores, found, itself)
    if task.knn is not None:
        write_knn(task, itself, scores=scores[:, : task.knn], found=found[:, : task.knn])
    return select_pairs(itself, scores, found=found, threshold=task.threshold)


def read_mask(files: FileStore, manifest: Manifest, info: SegmentInfo) -> Mask | None:
    """Return the live rows of a segment; None if all are."""
    tombstones = manifest.tombstones.get(info.id)
    if tombstones is None:
        return None
    return Mask.from_flags(~read_bits(files, tombstones.file, info.rows), chosen=False)


def search_segments(
    task: GraphTask, own: Segment, queries: Rows, *, k: int, params: SearchParams
) -> tuple[Doubles, Rows]:
    """Return cosines and numbered rows of the neighbours of rows of ``own``, (n, k) each.

    One segment after another, so that only one more than ``own`` is open. Where there are fewer
    neighbours, the score is -inf.
    """
    scores = np.full((len(queries), k), -np.inf)
    found = np.full((len(queries), k), -1)
    for number, info in enumerate(task.manifest.segments):
        segment = own if number == task.segment else Segment(info, own.codec, task.files)
        mask = read_mask(task.files, task.manifest, info)
        for first in range(0, len(queries), QUERY_ROWS):
            block = slice(first, first + QUERY_ROWS)
            vectors = own.read_vectors(queries[block])
            rotated = own.codec.rotate(vectors)
            lists = own.codec.find_lists(rotated, params.nprobe)
            request = Request(vectors, rotated, k, max(DEPTHS[0], k), params, lists)
            values, rows = segment.search(request, mask)
            values = np.concatenate([scores[block], values], axis=1)
            rows = np.concatenate([found[block], number_rows(number, rows)], axis=1)
            scores[block], found[block] = keep_best(values, rows, k)
    return scores, found


def number_rows(segment: int, rows: Rows) -> Rows:
    """Return segment and row as one number; negative where there is no row."""
    return np.where(rows < 0, -1, (segment << _SHIFT) + rows)


def drop_itself(scores: Doubles, found: Rows, itself: Rows) -> tuple[Doubles, Rows]:
    """Return the neighbours without the row that was searched with."""
    own = found == itself[:, None]
    return keep_best(np.where(own, -np.inf, scores), found, found.shape[1])


def write_knn(task: GraphTask, queries: Rows, *, scores: Doubles, found: Rows) -> None:
    """Write one row per neighbour: ``key``, ``rank``, ``neighbour``, ``score``."""
    real = np.isfinite(scores)
    ranks = np.broadcast_to(np.arange(1, scores.shape[1] + 1, dtype=np.int32), scores.shape)
    table = pa.table(
        {
            "key": read_names(task.files, task.manifest, np.repeat(queries, real.sum(axis=1))),
            "rank": ranks[real],
            "neighbour": read_names(task.files, task.manifest, found[real]),
            "score": scores[real].astype(np.float32),
        }
    )
    put_table(task.files, task.path, table)


def put_table(files: FileStore, path: str, table: pa.Table) -> None:
    """Write a table as one Parquet object of the index."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    files.storage.put(join_uri(files.index, path), sink.getvalue())


def read_names(files: FileStore, manifest: Manifest, numbers: Rows) -> pa.Array:
    """Return the keys of numbered rows."""
    names = np.empty(len(numbers), object)
    for segment in np.unique(numbers >> _SHIFT):
        path = files.fetch(manifest.segments[segment].files["keys"])
        keys = pq.ParquetFile(path).read(["key"]).column("key").cast(pa.large_string())
        chosen = np.flatnonzero(numbers >> _SHIFT == segment)
        rows = numbers[chosen] & ((1 << _SHIFT) - 1)
        names[chosen] = keys.combine_chunks().take(pa.array(rows)).to_pylist()
    return pa.array(names, pa.large_string())


def select_pairs(queries: Rows, scores: Doubles, *, found: Rows, threshold: float | None) -> Pairs:
    """Return the pairs that are at least as similar as the threshold."""
    if threshold is None:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    line, column = np.nonzero(scores >= threshold)
    return Pairs(queries[line], found[line, column], scores[line, column])


def merge_pairs(pairs: Sequence[Pairs]) -> Pairs:
    """Put the pairs of all tasks together."""
    return Pairs(
        np.concatenate([item.left for item in pairs]),
        np.concatenate([item.right for item in pairs]),
        np.concatenate([item.score for item in pairs]),
    )


def write_groups(
    files: FileStore, manifest: Manifest, *, pairs: Pairs, path: str
) -> dict[str, Any]:
    """Write one row per image that has a near duplicate: ``group``, ``key``, ``score``.

    ``score`` is the largest cosine to another image of the group.
    """
    nodes, places = np.unique(np.concatenate([pairs.left, pairs.right]), return_inverse=True)
    left, right = np.split(places, 2)
    labels = join_groups(len(nodes), left, right)
    best = np.zeros(len(nodes), np.float32)
    np.maximum.at(best, left, pairs.score)
    np.maximum.at(best, right, pairs.score)
    groups, group = np.unique(labels, return_inverse=True)
    order = np.lexsort((-best, group))
    table = pa.table(
        {
            "group": pa.array(group[order].astype(np.int64)),
            "key": read_names(files, manifest, nodes[order]),
            "score": best[order],
        }
    )
    put_table(files, path, table)
    return {"uri": join_uri(files.index, path), "groups": len(groups), "images": len(nodes)}


def join_groups(count: int, left: Rows, right: Rows) -> npt.NDArray[np.int64]:
    """Return for each of ``count`` nodes the smallest node that pairs connect it with."""
    labels = np.arange(count)
    while True:
        smaller = np.minimum(labels[left], labels[right])
        joined = labels.copy()
        np.minimum.at(joined, left, smaller)
        np.minimum.at(joined, right, smaller)
        joined = joined[joined]
        if (joined == labels).all():
            return labels
        labels = joined
