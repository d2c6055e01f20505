"""Columns of an index whose first shards held nothing but nulls in them."""

from dataclasses import replace

import pyarrow as pa
import pytest

from index.corpus import STORAGE, Corpus, build, draw_vectors
from pipeline import SearchIndex
from pipeline.output.info import write_output_info


@pytest.mark.parametrize("full", [False, True])
def test_a_column_of_nulls_is_searched_by_the_type_that_it_got_later(tmp_path, full: bool):
    corpus = Corpus(str(tmp_path / "embeddings"), 32)
    known = corpus.info
    corpus.info = replace(known, carried=pa.schema([("cls", pa.null())]))
    write_output_info(corpus.output, corpus.info, STORAGE)
    index = str(tmp_path / "index")
    corpus.add_shard("a.tar", draw_vectors(600, 32, seed=0))
    build(corpus, index)
    corpus.info = known
    write_output_info(corpus.output, known, STORAGE)
    for number in range(2):
        corpus.add_shard(f"b{number}.tar", draw_vectors(40, 32, seed=1 + number))
        build(corpus, index, full=full)
    corpus.drop_rows("b0.tar", every=7)
    build(corpus, index, full=full)
    with_class = {f"b1.tar/{row:06d}.jpg" for row in range(3, 40, 10)}
    with_class |= {f"b0.tar/{row:06d}.jpg" for row in range(3, 40, 10) if row % 7}
    opened, query = SearchIndex.open(index), draw_vectors(1, 32, seed=9)
    for condition in ("= 'class 3'", "in ('class 3', x)", "~ 'CLASS 3'", "^= 'class 3'"):
        found = opened.search(query, k=600, where=f"cls {condition}")[0]
        assert {neighbour.key for neighbour in found} == with_class
        assert {neighbour.columns["cls"] for neighbour in found} == {"class 3"}
    nulls = opened.search(query, k=700, where="cls is null")[0]
    assert {neighbour.columns["cls"] for neighbour in nulls} == {None}
    assert len(nulls) == 600
