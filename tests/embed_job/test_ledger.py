"""Receipts as they travel, and the shards they add up to."""

import pytest

from pipeline.embed_job.ledger import OpenShard
from pipeline.embed_job.wire import Receipt, pack_receipts, unpack_receipts
from pipeline.errors import CorruptionError
from pipeline.records import PartInfo, Shard

SHARD = Shard("aa", "tar", "/in/a.tar", "/in", "a.tar", 9, "v", supersedes=("bb",))


def make_receipt(chunk: int, *, rows: int, records: int | None = None, last: bool = False):
    part = PartInfo(f"parts/aa/{chunk:05d}.parquet", rows, "", 1, {"ok": rows})
    notes = {"ignored": 1} if last else {}
    return Receipt("aa", chunk, last, records or rows, part, notes=notes)


def test_receipts_come_back_as_they_were_sent():
    receipts = [make_receipt(0, rows=3), make_receipt(1, rows=2, last=True)]
    assert list(unpack_receipts(pack_receipts(receipts))) == receipts


def test_a_shard_is_complete_once_its_parts_tile_it_in_whatever_order():
    opened = OpenShard(SHARD)
    assert not opened.add(make_receipt(2, rows=1, last=True))
    assert not opened.add(make_receipt(0, rows=3))
    assert opened.add(make_receipt(1, rows=2))
    commit = opened.make_commit(space_id="space", sequence=4, run_id="run")
    assert [part.path for part in commit.parts] == [f"parts/aa/{i:05d}.parquet" for i in range(3)]
    assert (commit.rows, commit.supersedes, commit.notes) == (6, ("bb",), {"ignored": 1})


def test_a_shard_without_a_record_is_a_commit_without_parts():
    opened = OpenShard(SHARD)
    assert opened.add(Receipt("aa", 0, True))
    assert opened.make_commit(space_id="space", sequence=1, run_id="run").parts == ()


def test_a_record_without_a_row_is_never_committed():
    opened = OpenShard(SHARD)
    opened.add(make_receipt(0, rows=2, records=3, last=True))
    with pytest.raises(CorruptionError, match="3 records were read but 2 rows written"):
        opened.make_commit(space_id="space", sequence=1, run_id="run")
