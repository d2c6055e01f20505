"""What travels from read tasks to embedders."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import make_bundle, make_jpeg, make_shard, write_loose, write_parquet, write_tar

from pipeline.embed_job.wire import LoadBounds, bound_loads, group_shards, read_loads, unpack_loads
from pipeline.errors import SettingsError
from pipeline.input.container import ReadOptions
from pipeline.input.reader import read_chunks
from pipeline.records import Shard
from pipeline.storage import Storage

STORAGE = Storage()


def make_sizes(sizes: list[int]) -> list[Shard]:
    return [Shard(str(i), "tar", "", "", "", size, "") for i, size in enumerate(sizes)]


@given(st.lists(st.integers(0, 500 * 2**20), max_size=40), st.integers(1, 16))
def test_shards_are_dealt_out_once_each_in_order_and_within_bounds(sizes, num_groups):
    shards = make_sizes(sizes)
    groups = group_shards(shards, num_groups=num_groups)
    assert [shard for group in groups for shard in group] == shards
    assert all(groups)
    for group in groups:
        assert len(group) == 1 or sum(s.size_bytes for s in group) <= 256 * 2**20


def test_small_shards_travel_together_but_leave_work_for_every_actor():
    groups = group_shards(make_sizes([10] * 1000), num_groups=8)
    assert 8 <= len(groups) <= 9


def test_a_gpu_is_sent_many_chunks_at_once_but_no_large_share_of_the_input():
    options = ReadOptions(chunk_images=100)
    large, small = make_sizes([2**30] * 64), make_sizes([2**20] * 64)
    assert bound_loads(large, options, actors=8, to_gpu=True) == LoadBounds(1600, 128 * 2**20)
    assert bound_loads(small, options, actors=8, to_gpu=True) == LoadBounds(1600, 2**20)
    narrow = ReadOptions(chunk_images=100, chunk_bytes=2**20)
    assert bound_loads(large, narrow, actors=8, to_gpu=True) == LoadBounds(1600, 16 * 2**20)
    on_cpu = bound_loads(large, options, actors=8, to_gpu=False)
    assert on_cpu == LoadBounds(100, options.chunk_bytes)


def test_chunks_of_a_large_shard_travel_together_where_bounds_allow(shards):
    options = ReadOptions(chunk_images=2)
    loads = read_loads(shards, storage=STORAGE, options=options, bounds=LoadBounds(6, 2**20))
    numbers = [[len(c.records) for _, c in load.chunks] for t in loads for load in unpack_loads(t)]
    assert numbers == [[2, 2, 1, 0], [2, 1]]


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    tar = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", make_jpeg(i)) for i in range(5)])
    empty = write_tar(tmp_path / "b.tar", [])
    write_loose(tmp_path / "loose", {f"{i} ü.jpg": make_jpeg(i) for i in range(3)})
    return [
        replace(make_shard(tar), id="tar"),
        replace(make_shard(empty), id="empty"),
        make_bundle(tmp_path / "loose"),
    ]


@pytest.mark.parametrize("chunk_images", [1, 2, 4, 100])
def test_chunks_arrive_as_they_were_read_and_loads_keep_a_chunks_bounds(shards, chunk_images):
    options = ReadOptions(chunk_images=chunk_images)
    bounds = LoadBounds(chunk_images, options.chunk_bytes)
    tables = list(read_loads(shards, storage=STORAGE, options=options, bounds=bounds))
    loads = [load for table in tables for load in unpack_loads(table)]
    assert all(table.num_rows == 1 for table in tables)
    arrived = [chunk for load in loads for _, chunk in load.chunks]
    sent = [c for s in shards for c in read_chunks(s, storage=STORAGE, options=options)]
    assert arrived == sent
    for load in loads:
        assert sum(len(chunk.records) for _, chunk in load.chunks) <= chunk_images
        assert all(shard.members == () for shard, _ in load.chunks)


def test_a_shard_that_cannot_be_read_does_not_hold_up_the_others(shards, tmp_path: Path):
    alien = write_parquet(tmp_path / "x.parquet", [make_jpeg()])
    bad = replace(make_shard(alien), id="bad")
    options = ReadOptions(image_column="nope")
    bounds = LoadBounds(options.chunk_images, options.chunk_bytes)
    (table,) = read_loads([bad, *shards], storage=STORAGE, options=options, bounds=bounds)
    (load,) = unpack_loads(table)
    assert [shard.id for shard, _ in load.chunks] == ["tar", "empty", "fedcba9876543210"]
    (failed,) = load.failed
    assert failed.shard_id == "bad"
    assert isinstance(failed.error, SettingsError)
    assert "has no column 'nope'" in str(failed.error)


def test_reading_needs_no_torch():
    code = "import sys, pipeline.embed_job.wire; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
