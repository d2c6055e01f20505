"""What is decided once for all segments: the held-out queries and the codec."""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ObjectMissingError, SettingsError
from pipeline.index.faiss.codec import train_codec
from pipeline.index.faiss.codes import Floats
from pipeline.index.files import FileStore
from pipeline.index.faiss.package import set_threads
from pipeline.index.manifest import CodecInfo, FileInfo, put_file
from pipeline.index.map import MAX_POINTS, compute_map, write_map
from pipeline.index.build.rows import Block, PartSource, merge_blocks, read_ahead, read_part_rows
from pipeline.index.build.kinds import Plan
from pipeline.index.workers import Workers
from pipeline.index.build.ground_truth import encode_queries
from pipeline.records import digest_json
from pipeline.storage import join_uri


ROWS_PER_PART = 64
"""Rows drawn from one part: fewer would mean reading more of the input for the same sample."""

PARTS_PER_TASK = 256


@dataclass(frozen=True, slots=True)
class Training:
    """The outcome of training.

    Attributes:
        codec: How rows are encoded.
        queries: The held-out queries.
        map: The sample laid out in two dimensions.
        reused: True if it had been trained before.
    """

    codec: CodecInfo
    queries: Mapping[str, FileInfo]
    map: FileInfo
    reused: bool = False

    def list_written(self) -> list[FileInfo]:
        """Return the files that this run wrote."""
        files = [*self.queries.values(), self.map, self.codec.file]
        return [] if self.reused else [file for file in files if file is not None]

    def to_json(self) -> bytes:
        """Serialise for ``training.json``."""
        queries = {name: asdict(file) for name, file in self.queries.items()}
        values = {"codec": asdict(self.codec), "queries": queries, "map": asdict(self.map)}
        return json.dumps(values).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Training":
        """Read ``to_json``, as a training that had been done before."""
        values = json.loads(data)
        queries = {name: FileInfo(**file) for name, file in values["queries"].items()}
        codec = CodecInfo.from_dict(values["codec"])
        return cls(codec, queries, FileInfo(**values["map"]), reused=True)


@dataclass(frozen=True, slots=True)
class SampleTask:
    """Some rows of some parts.

    Attributes:
        embeddings: URI of the embeddings.
        parts: The parts to draw from.
        rows_per_part: How many rows of each, at most.
        seed: Makes the draw repeatable.
        files: How to reach the embeddings.
    """

    embeddings: str
    parts: tuple[PartSource, ...]
    rows_per_part: int
    seed: int
    files: FileStore


def train(
    plan: Plan,
    parts: Sequence[PartSource],
    *,
    embeddings: str,
    files: FileStore,
    workers: Workers,
    draw: "Draw",
) -> Training:
    """Draw a sample over all parts, hold queries out of it, train the codec on the rest.

    The outcome is kept under a name derived from what decides it, so that a build that was
    stopped goes on with the same codec.

    Raises:
        SettingsError: There are too few usable vectors to train on.
    """
    identity = digest_json([plan.factory, asdict(draw), [[p.path, p.rows_sha256] for p in parts]])
    folder = f"quantizers/{identity}"
    record = join_uri(files.index, folder, "training.json")
    try:
        return Training.from_json(files.storage.read(record))
    except ObjectMissingError:
        pass
    rows = max(plan.sample_rows, MAX_POINTS) + draw.queries
    sample = draw_sample(parts, rows, embeddings, files=files, workers=workers, draw=draw)
    if not len(sample.vectors):
        raise SettingsError(f"{embeddings!r} holds no usable vector; look at its rows' status")
    held_out, learned = split_sample(sample, draw, plan)
    queries = encode_queries(held_out.keys.column("key").to_pylist(), held_out.vectors)
    stored = put_file(files.index, f"{folder}/queries.arrow", data=queries, storage=files.storage)
    codec = _train_codec(
        plan, learned.vectors, folder=folder, files=files, seed=draw.seed, workers=workers
    )
    points = compute_map(sample.vectors, sample.keys.column("key").to_pylist(), seed=draw.seed)
    plotted = write_map(points, files.index, files.storage)
    training = Training(codec, {"queries": stored}, plotted)
    files.storage.put(record, training.to_json())
    return training


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw.

    Attributes:
        queries: Number of held-out queries.
        seed: Makes everything repeatable.
    """

    queries: int
    seed: int


def draw_sample(
    parts: Sequence[PartSource],
    rows: int,
    embeddings: str,
    *,
    files: FileStore,
    workers: Workers,
    draw: Draw,
) -> Block:
    """Return about ``rows`` rows from parts spread evenly over all of them, in random order."""
    random = np.random.default_rng(draw.seed)
    wanted = min(len(parts), max(1, math.ceil(rows / ROWS_PER_PART)))
    edges = np.linspace(0, len(parts), wanted + 1)
    picked = [
        parts[min(len(parts) - 1, int(random.uniform(low, high)))] for low, high in pairwise(edges)
    ]
    each = math.ceil(rows / wanted)
    tasks = [
        SampleTask(embeddings, tuple(picked[i : i + PARTS_PER_TASK]), each, draw.seed + i, files)
        for i in range(0, len(picked), PARTS_PER_TASK)
    ]
    sample = merge_blocks(workers.run(read_sample, tasks))
    order = random.permutation(len(sample.vectors))[:rows]
    return Block(sample.vectors[order], sample.keys.take(order))


def read_sample(task: SampleTask) -> Block:
    """Return up to ``rows_per_part`` random usable rows of each part."""
    random = np.random.default_rng(task.seed)
    blocks: list[Block] = []
    read = partial(read_part_rows, task.embeddings, storage=task.files.storage)
    for block in read_ahead(read, task.parts):
        number = min(task.rows_per_part, len(block.vectors))
        chosen = random.choice(len(block.vectors), number, replace=False)
        blocks.append(Block(block.vectors[chosen], block.keys.select(["key"]).take(chosen)))
    return merge_blocks(blocks)


def split_sample(sample: Block, draw: Draw, plan: Plan) -> tuple[Block, Block]:
    """Return the queries, and the rows to learn from, which they are kept out of.

    In a tiny index there is no room for both; then the codec learns from the queries too.
    """
    count = min(draw.queries, len(sample.vectors))
    held_out = Block(sample.vectors[:count], sample.keys.slice(0, count))
    rest = sample.vectors[count:]
    needed = max(1, plan.lists, min(plan.sample_rows, 1000))
    learned = rest if len(rest) >= needed else sample.vectors
    if len(learned) < plan.lists:
        raise SettingsError(
            f"{plan.factory} needs at least {plan.lists} usable vectors, there are {len(learned)}; "
            "use --kind auto"
        )
    return held_out, Block(learned, sample.keys.slice(0, 0))


@dataclass(frozen=True, slots=True)
class CodecTask:
    """A codec to train.

    Attributes:
        kind: The kind of index.
        factory: FAISS factory string.
        sample: Unit vectors to learn from.
        seed: Makes it repeatable.
        threads: Threads for FAISS.
    """

    kind: str
    factory: str
    sample: Any
    seed: int
    threads: int


def train_codec_file(task: CodecTask) -> bytes:
    """Return the bytes of a trained codec; none for kinds without training."""
    set_threads(task.threads)
    codec = train_codec(task.kind, task.factory, task.sample, seed=task.seed)
    if not codec.is_trained:
        return b""
    with tempfile.TemporaryDirectory(prefix="codec-") as scratch:
        path = Path(scratch) / "trained.faiss"
        codec.write(path)
        return path.read_bytes()


def _train_codec(
    plan: Plan, sample: Floats, *, folder: str, files: FileStore, seed: int, workers: Workers
) -> CodecInfo:
    task = CodecTask(plan.kind, plan.factory, sample, seed, workers.threads)
    [data] = workers.run(train_codec_file, [task], memory_bytes=3 * sample.nbytes)
    name = f"{plan.kind} {plan.factory}"
    if not data:
        return CodecInfo(digest_json(name), plan.kind, plan.factory)
    stored = put_file(files.index, f"{folder}/trained.faiss", data=data, storage=files.storage)
    return CodecInfo(stored.sha256[:16], plan.kind, plan.factory, plan.lists, stored)
