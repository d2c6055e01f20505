import numpy as np
import pyarrow as pa
import pytest

from index.corpus import STORAGE, Corpus, draw_vectors, make_corpus
from pipeline.errors import CorruptionError
from pipeline.index.build.rows import (
    Block,
    list_parts,
    merge_blocks,
    read_part_rows,
    read_vectors,
    split_usable,
    sum_shards,
)
from pipeline.index.vectors import pack_bits, unpack_bits
from pipeline.output.commits import list_commits


def read_all(corpus: Corpus) -> Block:
    parts = list_parts(list_commits(corpus.output, STORAGE).values())
    return merge_blocks([read_part_rows(corpus.output, p, storage=STORAGE) for p in parts])


def test_rows_arrive_normalised_with_their_norms(tmp_path):
    corpus = make_corpus(tmp_path, rows=300, shards=2)
    block = read_all(corpus)
    np.testing.assert_allclose(np.linalg.norm(block.vectors, axis=1), 1, atol=1e-5)
    norms = block.keys.column("norm").to_numpy()
    for key, vector, norm in zip(block.keys["key"].to_pylist(), block.vectors, norms, strict=True):
        np.testing.assert_allclose(vector * norm, corpus.vectors[key], rtol=1e-4, atol=1e-5)


def test_vectors_without_a_direction_are_left_out_and_counted(tmp_path):
    corpus = Corpus(str(tmp_path), 64)
    vectors = draw_vectors(10, 64, seed=0)
    vectors[2] = 0
    vectors[5, 3] = np.nan
    vectors[7, 0] = np.inf
    vectors[8] = 1e-9
    corpus.add_shard("a.tar", vectors, statuses={0: "truncated"})
    block = read_all(corpus)
    names = [key.split("/")[1] for key in block.keys["key"].to_pylist()]
    assert names == ["000001.jpg", "000003.jpg", "000004.jpg", "000006.jpg", "000009.jpg"]
    assert block.skipped == {"non_finite": 2, "zero": 2}
    assert block.shards[0][1:] == (5, 4)


def test_a_norm_beyond_float32_is_not_finite():
    _, _, skipped = split_usable(np.full((1, 64), 1e30, np.float32))
    assert skipped == {"non_finite": 1}


def test_half_precision_embeddings_are_read(tmp_path):
    values = draw_vectors(5, 64, seed=0).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 64)
    table = pa.table({"embedding": column})
    np.testing.assert_array_equal(read_vectors(table, "x"), values.astype(np.float32))


def test_a_part_that_is_missing_cut_or_of_another_length_is_named(tmp_path):
    corpus = make_corpus(tmp_path, rows=100, shards=1)
    [part] = list_parts(list_commits(corpus.output, STORAGE).values())
    path = tmp_path / part.path
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(CorruptionError, match=r"00000-\w+.parquet cannot be read"):
        read_all(corpus)
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(CorruptionError, match=r"00000-\w+.parquet cannot be read"):
        read_all(corpus)
    path.unlink()
    with pytest.raises(CorruptionError, match=r"parquet is missing; delete .* run the embed job"):
        read_all(corpus)


def test_bits_survive_packing():
    flags = np.random.default_rng(0).random(1003) < 0.3
    np.testing.assert_array_equal(unpack_bits(pack_bits(flags), 1003), flags)
    assert not unpack_bits(b"", 5).any()


def test_runs_of_shards_become_ranges():
    ranges = sum_shards([("", 10, 0), ("a", 5, 1), ("a", 3, 0), ("b", 2, 2), ("a", 1, 0)])
    assert [(r.shard_id, r.first, r.rows, r.skipped) for r in ranges] == [
        ("a", 10, 8, 1),
        ("b", 18, 2, 2),
        ("a", 20, 1, 0),
    ]
