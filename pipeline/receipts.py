"""What actors tell the driver; nothing heavy is imported to read it."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.errors import AbortError
from pipeline.records import PartInfo


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
