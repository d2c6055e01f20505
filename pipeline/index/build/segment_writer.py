"""One segment: built from rows that stream by, in bounded memory, under a content-derived name."""

import tempfile
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import CorruptionError
from pipeline.index.build.ground_truth import (
    Truth,
    TruthBuilder,
    drop_dead,
    join_truths,
    read_queries,
)
from pipeline.index.build.rows import Block, PartSource, SegmentSource, iter_blocks, sum_shards
from pipeline.index.faiss import codes
from pipeline.index.faiss.codes import Floats
from pipeline.index.faiss.package import describe_engine, set_threads
from pipeline.index.files import FileStore, describe_file
from pipeline.index.manifest import (
    CodecInfo,
    FileInfo,
    SegmentInfo,
    ShardRows,
    digest_bytes,
    seal,
    unseal,
)
from pipeline.index.search.segment import open_codec
from pipeline.index.vectors import unpack_bits
from pipeline.records import digest_json
from pipeline.storage import join_uri

BUILD_VERSION = 2
"""Part of every segment's name: raise it when the same rows would make other files."""

COSINE_STRIDE = 16
"""Checks every 16th row for drift; assigning all rows twice is too slow."""

KEY_GROUP_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class SegmentTask:
    """Everything that decides a segment; pickles, so that any machine can build it.

    Attributes:
        files: The index, and how to reach it and the embeddings.
        embeddings: URI of the embeddings.
        dim: Width of the vectors.
        codec: How rows are encoded.
        sources: Its rows, in order.
        delta: Whether it adds to an existing generation.
        packed: Whether codes are laid out in blocks.
        queries: The held-out queries (``queries``, ``floors``) to find exact neighbours for.
        threads: Threads for FAISS.
    """

    files: FileStore
    embeddings: str
    dim: int
    codec: CodecInfo
    sources: tuple[PartSource | SegmentSource, ...]
    delta: bool
    packed: bool
    queries: Mapping[str, FileInfo]
    threads: int = 1

    @property
    def id(self) -> str:
        """Digest of what decides the files, 16 hex digits."""
        sources = [_identify(source) for source in self.sources]
        queries = {name: file.sha256 for name, file in self.queries.items()}
        kind = [self.dim, self.codec.id, self.codec.kind, self.delta, self.packed]
        tools = [BUILD_VERSION, describe_engine().version]
        return digest_json([tools, kind, queries, sources])


def _identify(source: PartSource | SegmentSource) -> list[Any]:
    if isinstance(source, SegmentSource):
        return [source.segment.id, digest_bytes(source.dead)]
    return [source.path, source.rows_sha256, source.take]


@dataclass(frozen=True, slots=True)
class BuiltSegment:
    """A segment and where its rows came from.

    Attributes:
        info: What the manifest records; without files if no row was usable.
        shards: Ranges of its rows by shard; empty for rows that came from other segments.
        reused: True if it had been built before.
    """

    info: SegmentInfo
    shards: tuple[ShardRows, ...]
    reused: bool = False

    def list_files(self) -> list[FileInfo]:
        """Return the files that it consists of."""
        return list(self.info.files.values())

    def to_json(self) -> bytes:
        """Serialise for ``segment.json``, which is written last: it says the segment is whole."""
        shards = [astuple(item) for item in self.shards]
        return seal({"info": asdict(self.info), "shards": shards})

    @classmethod
    def from_json(cls, data: bytes) -> "BuiltSegment":
        """Read ``to_json``, as a segment that had been built before.

        Raises:
            ValueError: It has been damaged, or is something else; so do KeyError and TypeError.
        """
        values = unseal(data, strict=True)
        shards = tuple(ShardRows(*item) for item in values["shards"])
        return cls(SegmentInfo.from_dict(values["info"]), shards, reused=True)


def build_segment(task: SegmentTask) -> BuiltSegment:
    """Build a segment, or find that it is there already, all its files as they were written.

    Writes into a folder of its own under ``segments/<id>/``, then names it in a marker there. A
    second try never writes over the files of the first: its bytes may differ, and a generation may
    name those of the first.

    Raises:
        CorruptionError: A source is damaged, or two of its rows have one key.
    """
    files, folder = task.files, f"segments/{task.id}"
    marker = f"{folder}/segment.json"
    found = files.find_reusable(marker, BuiltSegment.from_json, BuiltSegment.list_files)
    if found is not None:
        return found
    set_threads(task.threads)
    with tempfile.TemporaryDirectory(prefix="segment-") as scratch, ExitStack() as stack:
        writer = _SegmentWriter(task, files, Path(scratch), stack)
        for block in iter_blocks(
            task.sources, embeddings=task.embeddings, files=files, dim=task.dim
        ):
            writer.add(block)
        built = writer.finish(f"{folder}/{uuid.uuid4().hex[:8]}")
    files.storage.put(join_uri(files.index, marker), built.to_json())
    return built


@dataclass(slots=True)
class _Totals:
    """Counts that a writer keeps as rows pass."""

    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    shards: list[tuple[str, int, int]] = field(default_factory=list)
    cosine_sum: float = 0.0
    cosine_rows: int = 0


class _SegmentWriter:
    """The files of a segment, which grow block by block; ``stack`` closes what is open."""

    def __init__(
        self, task: SegmentTask, files: FileStore, scratch: Path, stack: ExitStack
    ) -> None:
        self._task, self._scratch, self._files, self._stack = task, scratch, files, stack
        self._codec = open_codec(files, task.codec, task.dim)
        self._index = self._codec.make_index(packed=task.packed)
        self._truth = TruthBuilder(read_queries(files, task.queries, task.dim))
        self._vectors = stack.enter_context((scratch / "vectors.f16").open("wb"))
        self._keys: pq.ParquetWriter | None = None
        self._names: list[pa.ChunkedArray] = []
        self._totals = _Totals()

    def add(self, block: Block) -> None:
        """Append rows to all files."""
        totals = self._totals
        for reason, number in block.skipped.items():
            totals.skipped[reason] = totals.skipped.get(reason, 0) + number
        totals.shards += block.shards
        if not len(block.vectors):
            return
        self._vectors.write(block.vectors.astype(np.float16).tobytes())
        self._write_keys(block.keys)
        self._truth.add(block.vectors, block.keys.column("key"), totals.rows)
        rotated = self._codec.rotate(block.vectors)
        self._index.add(rotated)
        self._measure_cosine(rotated)
        totals.rows += len(block.vectors)

    def _write_keys(self, keys: pa.Table) -> None:
        if self._keys is None:
            path = self._scratch / "keys.parquet"
            self._keys = self._stack.enter_context(
                pq.ParquetWriter(path, keys.schema, compression="zstd", write_page_checksum=True)
            )
        self._keys.write_table(keys, row_group_size=KEY_GROUP_ROWS)
        self._names.append(keys.column("key"))

    def _measure_cosine(self, rotated: Floats) -> None:
        found = self._codec.find_lists(rotated[::COSINE_STRIDE], 1)
        if found is not None:
            self._totals.cosine_sum += float(found[0].sum())
            self._totals.cosine_rows += len(found[0])

    def finish(self, folder: str) -> BuiltSegment:
        """Write what is left, put all files into the index, and describe them."""
        self._vectors.close()
        if self._keys is None:
            return BuiltSegment(self._describe({}, "", ""), sum_shards(self._totals.shards))
        self._keys.close()
        first_key, last_key = self._write_order(folder)
        codes.write_index(self._index, self._scratch / "index.faiss")
        truth = self._truth.finish(self._read_known_truth())
        (self._scratch / "truth.bin").write_bytes(truth.to_bytes())
        sizes = codes.count_list_sizes(self._index)
        if len(sizes):
            sizes.tofile(self._scratch / "lists.u32")
        info = self._describe(self._upload(folder), first_key, last_key)
        return BuiltSegment(info, sum_shards(self._totals.shards))

    def _read_known_truth(self) -> Truth | None:
        """Return what the segments that are merged knew of the queries, at their rows' new places.

        They saw the vectors as embedded, and hold them rounded.
        """
        known, first = [], 0
        for source in self._task.sources:
            if isinstance(source, SegmentSource):  # these come before all others
                path = self._files.fetch(source.segment.files["truth"])
                dead = unpack_bits(source.dead, source.segment.rows)
                truth = drop_dead(Truth.from_bytes(path.read_bytes()), dead)
                places = first + np.cumsum(~dead) - 1
                known.append(replace(truth, row=places[truth.row].astype(np.uint32)))
                first += int((~dead).sum())
        return join_truths(known) if known else None

    def _describe(
        self, files: Mapping[str, FileInfo], first_key: str, last_key: str
    ) -> SegmentInfo:
        totals, task = self._totals, self._task
        cosine = totals.cosine_sum / totals.cosine_rows if totals.cosine_rows else None
        return SegmentInfo(
            id=task.id,
            kind=task.codec.kind,
            delta=task.delta,
            packed=task.packed,
            rows=totals.rows,
            files=files,
            skipped=totals.skipped,
            mean_cosine=cosine,
            first_key=first_key,
            last_key=last_key,
        )

    def _write_order(self, folder: str) -> tuple[str, str]:
        chunks = [chunk for names in self._names for chunk in names.chunks]
        keys = pa.concat_arrays([chunk.cast(pa.large_string()) for chunk in chunks])
        order = pc.sort_indices(keys)
        in_order = keys.take(order)
        repeated = pc.equal(in_order[1:], in_order[:-1])
        if pc.any(repeated).as_py():
            key = in_order[pc.index(repeated, True).as_py()].as_py()
            raise CorruptionError(
                f"two rows of {folder} have the key {key!r}; keys must be unique: "
                "is one input given twice?"
            )
        order.to_numpy().astype(np.uint32).tofile(self._scratch / "order.u32")
        return in_order[0].as_py(), in_order[-1].as_py()

    def _upload(self, folder: str) -> dict[str, FileInfo]:
        files: dict[str, FileInfo] = {}
        for path in sorted(self._scratch.iterdir()):
            files[path.stem] = describe_file(path, f"{folder}/{path.name}")
            self._files.storage.upload(path, join_uri(self._files.index, folder, path.name))
        return files
