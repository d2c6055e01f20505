"""Training, done once for all segments: draws the held-out queries, trains the codec."""

import math
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import SettingsError
from pipeline.index.build.ground_truth import blend_rows, encode_queries
from pipeline.index.build.kinds import Plan
from pipeline.index.build.rows import Block, PartSource, merge_blocks, read_ahead, read_part_rows
from pipeline.index.faiss.codec import train_codec
from pipeline.index.faiss.codes import Floats
from pipeline.index.faiss.package import describe_engine, set_threads
from pipeline.index.files import FileStore
from pipeline.index.manifest import CodecInfo, FileInfo, put_file, seal, unseal
from pipeline.index.map import MAX_POINTS, choose_method, draw_map
from pipeline.index.workers import Workers
from pipeline.records import digest_json
from pipeline.storage import join_uri

ROWS_PER_PART = 64
"""Rows drawn from one part: fewer would mean reading more of the input for the same sample."""

PARTS_PER_TASK = 256

TRAINING_VERSION = 2
"""Part of every training's identity: raise it when the same input would come to something else."""


@dataclass(frozen=True, slots=True)
class Training:
    """The outcome of training.

    Attributes:
        codec: How rows are encoded.
        queries: The held-out queries.
        map: The sample laid out in two dimensions; None where it could not be, or is lost.
        reused: True if it had been trained before.
    """

    codec: CodecInfo
    queries: Mapping[str, FileInfo]
    map: FileInfo | None
    reused: bool = False

    def list_written(self) -> list[FileInfo]:
        """Return the files that this run wrote."""
        if self.reused:
            return []
        return self.list_needed() + ([] if self.map is None else [self.map])

    def list_needed(self) -> list[FileInfo]:
        """Return the files without which it is worth nothing; the map is only to look at."""
        files = [*self.queries.values(), self.codec.file]
        return [file for file in files if file is not None]

    def to_json(self) -> bytes:
        """Serialise for ``training.json``."""
        queries = {name: asdict(file) for name, file in self.queries.items()}
        plotted = None if self.map is None else asdict(self.map)
        return seal({"codec": asdict(self.codec), "queries": queries, "map": plotted})

    @classmethod
    def from_json(cls, data: bytes) -> "Training":
        """Read ``to_json``, as a training that had been done before.

        Raises:
            ValueError: It has been damaged, or is something else; so do KeyError and TypeError.
        """
        values = unseal(data, strict=True)
        queries = {name: FileInfo(**file) for name, file in values["queries"].items()}
        codec = CodecInfo.from_dict(values["codec"])
        plotted = values["map"]
        return cls(codec, queries, plotted and FileInfo(**plotted), reused=True)


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

    Args:
        plan: The kind and its size.
        parts: The rows to draw from.
        embeddings: URI of the embeddings.
        files: The index.
        workers: Who does the work.
        draw: How to draw.

    Raises:
        SettingsError: There are too few usable vectors to train on.
    """
    folder = f"quantizers/{identify_training(plan, parts, draw)}"
    record = f"{folder}/training.json"
    found = files.find_reusable(record, Training.from_json, Training.list_needed)
    if found is not None:
        lost = found.map is None or files.find_damage([found.map])
        return replace(found, map=None) if lost else found
    rows = max(plan.sample_rows, MAX_POINTS) + draw.queries
    sample = draw_sample(parts, rows, embeddings, files=files, workers=workers, draw=draw)
    if not len(sample.vectors):
        raise SettingsError(f"{embeddings!r} holds no usable vector; look at its rows' status")
    target = Target(f"{folder}/{uuid.uuid4().hex[:8]}", files, workers)
    training = _learn(plan, sample, draw=draw, target=target)
    files.storage.put(join_uri(files.index, record), training.to_json())
    return training


def identify_training(plan: Plan, parts: Sequence[PartSource], draw: "Draw") -> str:
    """Return the digest of all that decides what training comes to, 16 hex digits."""
    decided = [plan.kind, plan.factory, plan.lists, plan.sample_rows, draw.queries, draw.seed]
    tools = [TRAINING_VERSION, describe_engine().version, choose_method(MAX_POINTS)]
    return digest_json([tools, decided, [[p.path, p.rows_sha256, p.take] for p in parts]])


@dataclass(frozen=True, slots=True)
class Target:
    """Where the outcome of training goes.

    Attributes:
        folder: Path under the index that nobody else writes to: what is made again, on other
            threads or by another FAISS, may have other bytes, and older generations name these.
        files: The index.
        workers: Who does the work.
    """

    folder: str
    files: FileStore
    workers: Workers


def _learn(plan: Plan, sample: Block, *, draw: "Draw", target: Target) -> Training:
    files = target.files
    held_out, learned = split_sample(sample, draw, plan)
    queries = encode_queries([""] * len(held_out.vectors), blend_rows(held_out.vectors))
    path = f"{target.folder}/queries.arrow"
    stored = put_file(files.index, path, data=queries, storage=files.storage)
    codec = _train_codec(plan, learned.vectors, target=target, seed=draw.seed)
    keys = sample.keys.column("key").to_pylist()
    plotted = draw_map(sample.vectors, keys, path=f"{target.folder}/map.json", files=files)
    return Training(codec, {"queries": stored}, plotted)


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
    enough = rest[: max(needed, plan.sample_rows)]
    learned = enough if len(enough) >= needed else sample.vectors
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


def _train_codec(plan: Plan, sample: Floats, *, target: Target, seed: int) -> CodecInfo:
    files, workers = target.files, target.workers
    task = CodecTask(plan.kind, plan.factory, sample, seed, workers.threads)
    [data] = workers.run(train_codec_file, [task], memory_bytes=3 * sample.nbytes)
    name = f"{plan.kind} {plan.factory}"
    if not data:
        return CodecInfo(digest_json(name), plan.kind, plan.factory)
    path = f"{target.folder}/trained.faiss"
    stored = put_file(files.index, path, data=data, storage=files.storage)
    return CodecInfo(stored.sha256[:16], plan.kind, plan.factory, plan.lists, stored)
