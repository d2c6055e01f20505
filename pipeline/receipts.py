"""What actors tell the driver, and the shards it adds up to; nothing heavy is imported for it."""

import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.errors import AbortError, CorruptionError
from pipeline.records import Commit, PartInfo, Shard


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the driver learns of a chunk; small, and the same however often it is sent.

    Attributes:
        shard_id: The shard.
        chunk: Position among the shard's chunks; -1 when the shard could not be read at all.
        last: True on the shard's final chunk.
        num_records: Records that the reader found in the chunk.
        part: The written part; None for a shard without records, or one that failed.
        nbytes: Encoded bytes of its images.
        seconds: Time by stage; of a whole load, with its first chunk.
        load_s: How long the load was in its actor; with its first chunk, 0 with the others.
        notes: The reader's counts, on the last chunk.
        error: Why the shard could not be read; it stays uncommitted.
        fatal: Why the whole run has to stop. Sent rather than raised: what a worker raises, Ray
            wraps in exceptions of its own.
        batch_size: The embedder's batch size by then.
    """

    shard_id: str
    chunk: int
    last: bool
    num_records: int = 0
    part: PartInfo | None = None
    nbytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    load_s: float = 0.0
    notes: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    fatal: AbortError | None = None
    batch_size: int = 0


def pack_receipts(receipts: Sequence[Receipt]) -> pa.Table:
    """Return a table of one row: a row is a block of its own to Ray, which takes ten a second."""
    return pa.table({"receipts": pa.array([pickle.dumps(tuple(receipts))], pa.binary())})


def unpack_receipts(table: pa.Table) -> Iterator[Receipt]:
    """Yield what ``pack_receipts`` packed."""
    for data in table.column("receipts").to_pylist():
        yield from pickle.loads(data)


class OpenShard:
    """A shard whose parts are coming in.

    Attributes:
        shard: The shard.
        parts: By chunk; None where a chunk holds no record.
        num_chunks: How many there are; None until the last one's receipt is in.
        num_records: Records that were read so far.
        notes: What was noticed while the shard was read, by kind.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.parts: dict[int, PartInfo | None] = {}
        self.num_chunks: int | None = None
        self.num_records = 0
        self.notes: dict[str, int] = {}

    def add(self, receipt: Receipt) -> bool:
        """Take a receipt in; return whether the parts now tile the shard."""
        self.parts[receipt.chunk] = receipt.part
        self.num_records += receipt.num_records
        if receipt.last:
            self.num_chunks = receipt.chunk + 1
            self.notes = receipt.notes
        return self.num_chunks == len(self.parts)

    def make_commit(self, *, space_id: str, sequence: int, run_id: str) -> Commit:
        """Return the commit of the shard, now that it is complete.

        Raises:
            CorruptionError: Its parts do not hold one row for each record that was read.
        """
        shard = self.shard
        parts = (self.parts[chunk] for chunk in range(len(self.parts)))
        commit = Commit(
            shard_id=shard.id,
            kind=shard.kind,
            source=shard.source,
            root=shard.root,
            name=shard.name,
            version=shard.version,
            size_bytes=shard.size_bytes,
            space_id=space_id,
            parts=tuple(part for part in parts if part is not None),
            members=shard.members,
            supersedes=shard.supersedes,
            notes=self.notes,
            sequence=sequence,
            run_id=run_id,
            committed_s=time.time(),
            modified_s=shard.modified_s,
        )
        if commit.rows != self.num_records:
            raise CorruptionError(
                f"{shard.source}: {self.num_records} records were read but {commit.rows} rows "
                "written; the shard is not committed; this is a defect, please report it"
            )
        return commit
