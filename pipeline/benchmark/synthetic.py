"""Vectors that look like pooled embeddings, and outputs of them, to measure with.

Clusters of clusters in 32 dimensions, through a fixed two-layer ReLU network, with noise: half of
all values are zero, all vectors lie in a cone (cosine of two about 0.55 ± 0.14), the nearest
neighbour of a fresh vector has a cosine of 0.98 and the hundredth 0.97, all of which resembles real
embeddings of photographs. With five hundred vectors a cluster, neighbours are hard to tell apart:
1-bit codes have 0.86 of the ten nearest among their best 40, and 0.99 among their best 160.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.index.faiss.codes import Floats
from pipeline.output.commits import list_commits, write_commit
from pipeline.output.info import OutputInfo, claim_output
from pipeline.output.parts import write_part
from pipeline.records import Commit, Layout, Space
from pipeline.storage import Storage

LATENT_DIM = 32
BLOCK_ROWS = 16_384
SHARD_ROWS = 1024
"""Rows of one shard, which are one part as well."""


def generate_vectors(
    rows: int, dim: int, *, seed: int = 0, space_seed: int = 0, clusters: int = 200
) -> Floats:
    """Return ``rows`` vectors, float32 (rows, dim), none negative, not normalised.

    Args:
        rows: How many.
        dim: Their width.
        seed: Draws of different seeds are different images of one collection.
        space_seed: Draws of different space seeds have nothing in common.
        clusters: Number of clusters; one for every 500 vectors of the collection is realistic.
    """
    return np.concatenate(
        list(iter_vectors(rows, dim, seed=seed, space_seed=space_seed, clusters=clusters))
    )


def iter_vectors(
    rows: int, dim: int, *, seed: int = 0, space_seed: int = 0, clusters: int = 200
) -> Iterator[Floats]:
    """Yield what ``generate_vectors`` returns in blocks, for more rows than fit in memory."""
    space = np.random.default_rng([space_seed, dim])
    parents = space.standard_normal((max(1, clusters // 20), LATENT_DIM))
    owner = space.integers(0, len(parents), clusters)
    centres = parents[owner] + 0.6 * space.standard_normal((clusters, LATENT_DIM))
    weights = space.dirichlet(np.ones(clusters))
    hidden = space.standard_normal((LATENT_DIM, 4 * LATENT_DIM)) / np.sqrt(LATENT_DIM)
    bias = 0.1 * space.standard_normal(4 * LATENT_DIM)
    out = space.standard_normal((4 * LATENT_DIM, dim)) / np.sqrt(2 * LATENT_DIM)
    random = np.random.default_rng([space_seed, dim, seed])
    for first in range(0, rows, BLOCK_ROWS):
        count = min(BLOCK_ROWS, rows - first)
        chosen = random.choice(clusters, count, p=weights)
        latent = centres[chosen] + 0.2 * random.standard_normal((count, LATENT_DIM))
        latent *= random.lognormal(0.0, 0.1, (count, 1))
        values = np.maximum(latent @ hidden + bias, 0) @ out
        values += 0.1 * random.standard_normal((count, dim))
        yield np.maximum(values, 0).astype(np.float32)


def make_space(dim: int, **changes: Any) -> Space:
    """Return a space of vectors that no backbone has made; ``changes`` are fields of ``Space``."""
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
    return replace(space, **changes)


def write_embeddings(output: str, rows: int, dim: int, *, clusters: int, seed: int = 0) -> None:
    """Write synthetic vectors as the embed job would write embeddings."""
    storage = Storage()
    info = claim_output(output, describe_output(dim), storage)
    blocks = iter_vectors(rows, dim, seed=seed, clusters=clusters)
    starts = range(0, BLOCK_ROWS, SHARD_ROWS)
    shards = (block[first : first + SHARD_ROWS] for block in blocks for first in starts)
    for number, vectors in enumerate(filter(len, shards)):
        write_shard(output, f"shard-{number:05d}.tar", vectors=vectors, info=info, storage=storage)


def describe_output(dim: int) -> OutputInfo:
    """Return what an output of synthetic vectors says about itself."""
    layout = Layout(chunk_images=SHARD_ROWS, chunk_bytes=1 << 30, carry=("side",))
    weights = "weights/none.safetensors"
    carried = pa.schema([pa.field("side", pa.float64())])
    return OutputInfo(make_space(dim), layout, carried, weights, "synthetic")


def find_sides(vectors: Floats) -> npt.NDArray[np.float64]:
    """Return how far vectors lie to one side, (n,): a label that goes with the vectors.

    What lies on one side has hardly a neighbour on the other, so filters by it are hard.
    """
    direction = np.random.default_rng(vectors.shape[1]).standard_normal(vectors.shape[1])
    lengths = np.linalg.norm(vectors, axis=1)
    sides: npt.NDArray[np.float64] = vectors @ direction / np.maximum(lengths, 1e-9)
    return sides


def write_shard(
    output: str, name: str, *, vectors: Floats, info: OutputInfo, storage: Storage
) -> str:
    """Commit vectors as one shard; return its id."""
    commit = make_commit(name, info.space.id)
    table = _make_rows(name, vectors, info)
    commit_table(output, table, commit=commit, part_rows=SHARD_ROWS, storage=storage)
    return commit.shard_id


def make_commit(name: str, space_id: str, **changes: Any) -> Commit:
    """Return the commit of a tar that has no parts yet; ``changes`` are fields of ``Commit``."""
    commit = Commit(
        shard_id=hashlib.sha256(name.encode()).hexdigest()[:16],
        kind="tar",
        source=name,
        root="",
        name=name,
        version="1",
        size_bytes=1,
        space_id=space_id,
        parts=(),
    )
    return replace(commit, **changes)


def commit_table(
    output: str, table: pa.Table, *, commit: Commit, part_rows: int, storage: Storage
) -> None:
    """Write rows as parts of ``part_rows`` each, then the commit that makes them visible.

    A commit that the shard has already is replaced, as by a run that embeds it once more.
    """
    parts = [
        write_part(
            output,
            table.slice(first, part_rows),
            folder=commit.shard_id,
            chunk=chunk,
            space_id=commit.space_id,
            storage=storage,
        )
        for chunk, first in enumerate(range(0, max(1, len(table)), part_rows))
    ]
    present = list_commits(output, storage).get(commit.shard_id)
    write_commit(output, replace(commit, parts=tuple(parts)), storage, replaces=present)


def _make_rows(name: str, vectors: Floats, info: OutputInfo) -> pa.Table:
    numbers = range(len(vectors))
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
        "side": find_sides(vectors),
    }
    return pa.table(columns, schema=info.schema)
