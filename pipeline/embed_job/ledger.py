"""The shards of a run that receipts add up to."""

import time

from pipeline.embed_job.wire import Receipt
from pipeline.errors import CorruptionError
from pipeline.records import Commit, PartInfo, Shard


class OpenShard:
    """A shard whose parts are coming in.

    Attributes:
        shard: The shard.
        parts: By chunk; None where a chunk holds no record.
        num_chunks: How many there are; None until the last one's receipt is in.
        num_records: Records that were read so far.
        notes: What was noticed while the shard was read, by kind.
        absent: Images that could not be had, by row, with the reasons.
        kept: Older rows that stand in for absent images, as a part of their own.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.parts: dict[int, PartInfo | None] = {}
        self.num_chunks: int | None = None
        self.num_records = 0
        self.notes: dict[str, int] = {}
        self.absent: dict[int, str] = {}
        self.kept: PartInfo | None = None

    def add(self, receipt: Receipt) -> bool:
        """Take a receipt in; return whether the parts now tile the shard."""
        self.parts[receipt.chunk] = receipt.part
        self.num_records += receipt.num_records
        self.absent |= dict(receipt.absent)
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
        parts = [*(self.parts[chunk] for chunk in range(len(self.parts))), self.kept]
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
        expected = self.num_records + (self.kept.rows if self.kept else 0)
        if commit.rows != expected:
            raise CorruptionError(
                f"{shard.source}: {expected} records were read but {commit.rows} rows "
                "written; the shard is not committed; this is a defect, please report it"
            )
        return commit
