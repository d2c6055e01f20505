import numpy as np
import pytest

from index.corpus import STORAGE, build, make_corpus
from pipeline.errors import SettingsError
from pipeline.index.build.ground_truth import read_queries
from pipeline.index.build.kinds import make_plan
from pipeline.index.build.rows import list_parts
from pipeline.index.build.training import Draw, draw_sample, split_sample
from pipeline.index.files import FileStore
from pipeline.index.pointer import read_current
from pipeline.index.search.search_index import SearchIndex
from pipeline.index.workers import LocalWorkers
from pipeline.output.commits import list_commits


@pytest.fixture
def drawn(tmp_path):
    """A sample of 200 of 3,000 rows in 30 parts, and what it was drawn from."""
    corpus = make_corpus(tmp_path / "embeddings", rows=3000, dim=32, shards=10)
    corpus_parts = list_parts(list_commits(corpus.output, STORAGE).values())
    files = FileStore(str(tmp_path / "index"), STORAGE, tmp_path / "cache")

    def draw(rows, seed=0):
        return draw_sample(
            corpus_parts,
            rows,
            corpus.output,
            files=files,
            workers=LocalWorkers(1),
            draw=Draw(10, seed),
        )

    return corpus, draw


def test_a_sample_comes_from_everywhere_without_repetition(drawn):
    corpus, draw = drawn
    keys = draw(640)
    names = keys.keys.column("key").to_pylist()
    assert len(set(names)) == len(names) == 640
    assert len({name.split("/")[0] for name in names}) == 10
    for name, vector in zip(names, keys.vectors, strict=True):
        expected = corpus.vectors[name] / np.linalg.norm(corpus.vectors[name])
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_a_sample_larger_than_everything_is_everything(drawn):
    _, draw = drawn
    assert len(draw(10_000).vectors) == 3000


def test_the_same_seed_draws_the_same_sample(drawn):
    _, draw = drawn
    names = [draw(100, seed).keys.column("key").to_pylist() for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2]


def test_queries_are_kept_out_of_the_training(drawn):
    _, draw = drawn
    sample = draw(1500)
    plan = make_plan(3000, 32, kind="rabitq", memory_bytes=10**9, target_recall=0.95)
    held_out, learned = split_sample(sample, Draw(10, 0), plan)
    assert (len(held_out.vectors), len(learned.vectors)) == (10, 1490)
    np.testing.assert_array_equal(learned.vectors, sample.vectors[10:])


def test_too_few_vectors_for_the_lists_say_so(drawn):
    _, draw = drawn
    plan = make_plan(500_000, 32, kind="ivf-sq8", memory_bytes=10**9, target_recall=0.95)
    with pytest.raises(SettingsError, match=r"needs at least 2048 usable vectors, there are 50"):
        split_sample(draw(50), Draw(10, 0), plan)


def test_held_out_queries_are_stored_with_the_codec(tmp_path):
    corpus = make_corpus(tmp_path / "embeddings", rows=600, dim=32)
    build(corpus, str(tmp_path / "index"), kind="rabitq", queries=40)
    manifest = read_current(str(tmp_path / "index"), STORAGE)
    files = FileStore(str(tmp_path / "index"), STORAGE, tmp_path / "cache")
    queries = read_queries(files, manifest.queries, 32)
    assert len(queries.keys) == 40
    assert set(queries.keys) == {""}
    rows = np.stack(list(corpus.vectors.values()))
    nearest = queries.vectors @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    assert 0.9 < nearest.max(axis=1).mean() < 0.999  # they resemble rows, and are none
    assert np.isfinite(queries.floors).all()
    assert manifest.measured["queries"] == 40


def test_many_lists_are_looked_up_in_a_graph(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.index.build.kinds.HNSW_LISTS", 16)
    corpus = make_corpus(tmp_path / "embeddings", rows=1500, dim=32)
    uri = str(tmp_path / "index")
    build(corpus, uri, kind="ivf-rabitq", queries=100)
    assert SearchIndex.open(uri).info.factory == "HR,IVF46_HNSW32,RaBitQfs"
    corpus.extend("night.tar", rows=20, seed=4)
    assert build(corpus, uri, kind="ivf-rabitq", queries=100)["measured"]["recall"] >= 0.95
    found = SearchIndex.open(uri).search(corpus.vectors["night.tar/000007.jpg"], 1)[0]
    assert found[0].key == "night.tar/000007.jpg"
