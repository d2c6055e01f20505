"""What an index costs and gives, next to flat search over the same vectors in the same run."""

import hashlib
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import IndexConfig
from pipeline.index.build import build_index
from pipeline.index.engine import Floats
from pipeline.index.installed import set_threads
from pipeline.index.search import SearchIndex
from pipeline.index.synthetic import generate_vectors, iter_vectors
from pipeline.parts import OutputInfo, claim_output, retire_commit, write_commit, write_part
from pipeline.records import Commit, Layout, PartInfo, Space
from pipeline.storage import Storage

PART_ROWS = 1024
SHARD_ROWS = 16_384
TIMED_QUERIES = 200
CLUSTER_ROWS = 500


@dataclass(frozen=True, slots=True)
class IndexCost:
    """What one index of synthetic vectors cost and gives.

    Attributes:
        kind: Kind of index.
        rows: Number of vectors.
        dim: Their width.
        cpu_s: CPU seconds of the whole build, reading and measuring included.
        peak_bytes: Largest resident memory of the building process.
        size_bytes: Size of the index.
        recall: Mean recall at 10 on held-out queries, with its 95 % interval.
        p50_ms: Median time of one fresh query through ``SearchIndex``, one thread.
        p95_ms: Its 95th percentile.
        cpu_ms: CPU time of one such query, which other load on the machine does not touch.
        night_bytes: Bytes that a night wrote which added 1 % and removed 0.5 %.
        night_cpu_s: CPU seconds of that night.
    """

    kind: str
    rows: int
    dim: int
    cpu_s: float
    peak_bytes: int
    size_bytes: int
    recall: dict[str, float]
    p50_ms: float
    p95_ms: float
    cpu_ms: float
    night_bytes: int
    night_cpu_s: float


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
    clusters = max(20, rows // CLUSTER_ROWS)
    write_embeddings(embeddings, rows, dim, clusters=clusters, seed=seed)
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


def write_embeddings(output: str, rows: int, dim: int, *, clusters: int, seed: int = 0) -> None:
    """Write synthetic vectors as the embed job would write embeddings."""
    storage, info = Storage(), _describe_output(dim)
    claim_output(output, info, storage)
    blocks = iter_vectors(rows, dim, seed=seed, clusters=clusters)
    for number, block in enumerate(blocks):
        write_shard(output, f"shard-{number:05d}.tar", vectors=block, info=info, storage=storage)


def _describe_output(dim: int) -> OutputInfo:
    space = Space(
        backbone="synthetic",
        weights_sha256="0" * 64,
        image_size=224,
        crop_pct=1.0,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        exif="apply",
        decode="exact",
        precision="fp32",
        dim=dim,
    )
    layout = Layout(chunk_images=PART_ROWS, chunk_bytes=1 << 30)
    return OutputInfo(space, layout, pa.schema([]), "weights/none.safetensors", "synthetic")


def write_shard(
    output: str, name: str, *, vectors: Floats, info: OutputInfo, storage: Storage
) -> str:
    """Commit vectors as one shard; return its id."""
    shard_id = hashlib.sha256(name.encode()).hexdigest()[:16]
    parts = []
    for chunk, first in enumerate(range(0, len(vectors), PART_ROWS)):
        table = _make_rows(name, first, vectors=vectors[first : first + PART_ROWS], info=info)
        parts.append(
            _write_part(output, table, folder=shard_id, chunk=chunk, info=info, storage=storage)
        )
    commit = Commit(
        shard_id=shard_id,
        kind="tar",
        source=name,
        root="",
        name=name,
        version="1",
        size_bytes=1,
        space_id=info.space.id,
        parts=tuple(parts),
    )
    write_commit(output, commit, storage)
    return shard_id


def _write_part(
    output: str, table: pa.Table, *, folder: str, chunk: int, info: OutputInfo, storage: Storage
) -> PartInfo:
    return write_part(
        output, table, folder=folder, chunk=chunk, space_id=info.space.id, storage=storage
    )


def _make_rows(name: str, first: int, *, vectors: Floats, info: OutputInfo) -> pa.Table:
    numbers = range(first, first + len(vectors))
    keys = [f"{name}/{number:08d}.jpg" for number in numbers]
    flat = pa.array(np.ascontiguousarray(vectors).ravel(), pa.float32())
    count = len(keys)
    columns = {
        "key": keys,
        "shard": [name] * count,
        "row": list(numbers),
        "status": ["ok"] * count,
        "error": [None] * count,
        "width": [640] * count,
        "height": [480] * count,
        "offset": [100_000 * number for number in numbers],
        "nbytes": [99_000] * count,
        "sha256": [hashlib.sha256(key.encode()).digest()[:16] for key in keys],
        "embedding": pa.FixedSizeListArray.from_arrays(flat, info.space.dim),
    }
    return pa.table(columns, schema=info.schema)


def _measure_kind(kind: str, embeddings: str, *, folder: Path, rows: int, seed: int) -> IndexCost:
    index = folder / "index" / kind
    settings: dict[str, Any] = {"kind": kind, "workers": "local", "max_row_drop": 1.0}
    config = IndexConfig(index=str(index), embeddings=embeddings, **settings)
    started = time.process_time()
    built = build_index(config).to_dict()
    cpu_s = time.process_time() - started
    scale = 1 if sys.platform == "darwin" else 1024  # kilobytes, but bytes on macOS
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    queries = _draw(rows, TIMED_QUERIES, built["dim"], seed=seed + 1)
    seconds, cpu_ms = time_queries(str(index), queries)
    night, night_cpu_s = _measure_night(
        config, embeddings, rows=rows, dim=built["dim"], seed=seed + 2
    )
    return IndexCost(
        kind=built["kind"],
        rows=rows,
        dim=built["dim"],
        cpu_s=round(cpu_s, 2),
        peak_bytes=peak_bytes,
        size_bytes=built["size_bytes"],
        recall=built["measured"]["recall_at"]["10"],
        p50_ms=round(float(np.median(seconds)) * 1e3, 3),
        p95_ms=round(float(np.quantile(seconds, 0.95)) * 1e3, 3),
        cpu_ms=round(cpu_ms, 3),
        night_bytes=night["written_bytes"],
        night_cpu_s=round(night_cpu_s, 2),
    )


def _measure_night(
    config: IndexConfig, embeddings: str, *, rows: int, dim: int, seed: int
) -> tuple[dict[str, Any], float]:
    """Add 1 % and remove 0.5 %; return the report and the CPU seconds."""
    storage, info = Storage(), _describe_output(dim)

    def add(name: str, number: int, draw: int) -> str:
        vectors = _draw(rows, max(1, number), dim, seed=draw)
        return write_shard(embeddings, name, vectors=vectors, info=info, storage=storage)

    gone = add("gone.tar", rows // 200, seed)
    build_index(config)
    retire_commit(embeddings, gone, storage)
    fresh = add("new.tar", rows // 100, seed + 1)
    started = time.process_time()
    night = build_index(config).to_dict()
    seconds = time.process_time() - started
    retire_commit(embeddings, fresh, storage)
    return night, seconds


def _draw(rows: int, number: int, dim: int, *, seed: int) -> Floats:
    """Return other images of the collection that ``rows`` vectors were written of."""
    return generate_vectors(number, dim, seed=seed, clusters=max(20, rows // CLUSTER_ROWS))


def time_queries(index: str, queries: Floats) -> tuple[list[float], float]:
    """Search for single vectors, ten neighbours each, after as many searches to warm up.

    Returns:
        Seconds of each, and the mean CPU time in milliseconds, which other load does not touch.
    """
    opened = SearchIndex.open(index).snapshot.opened
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    set_threads(1)
    seconds: list[float] = []
    for query in np.concatenate([queries, queries]):
        if len(seconds) == len(queries):
            cpu_started = time.process_time()
        started = time.perf_counter()
        opened.search(query[None], 10)
        seconds.append(time.perf_counter() - started)
    cpu_ms = (time.process_time() - cpu_started) / len(queries) * 1e3
    return seconds[len(queries) :], cpu_ms
