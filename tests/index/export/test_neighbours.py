import numpy as np
import pyarrow.parquet as pq
import pytest

from index.conftest import KINDS
from index.corpus import Corpus, build, draw_vectors, make_corpus, rank_exactly
from pipeline.errors import SettingsError
from pipeline.index.export.neighbours import join_groups


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    corpus = make_corpus(tmp_path / "embeddings", rows=800, dim=48)
    vectors = draw_vectors(10, 48, seed=9)
    corpus.add_shard("copies.tar", np.concatenate([vectors, 3 * vectors, vectors + 1e-3]))
    return corpus


@pytest.mark.parametrize("kind", ["flat", "ivf-rabitq"])
def test_the_graph_holds_the_nearest_neighbours_of_every_image(corpus, tmp_path, kind):
    uri = str(tmp_path / "index")
    build(corpus, uri, kind=kind, queries=100)
    corpus.extend("night.tar", rows=5, seed=3)
    corpus.drop_rows("shard-001.tar", every=20)
    report = build(corpus, uri, kind=kind, queries=100, knn=4)
    table = pq.read_table(report["knn"]["uri"])
    assert table.num_rows == 4 * len(corpus.vectors)
    lines = table.to_pylist()
    by_key = {}
    for line in lines:
        by_key.setdefault(line["key"], []).append(line)
    assert sorted(by_key) == sorted(corpus.vectors)
    hits = 0
    for key in list(corpus.vectors)[::20]:
        assert [line["rank"] for line in by_key[key]] == [1, 2, 3, 4]
        assert key not in {line["neighbour"] for line in by_key[key]}
        exact = [name for name, _ in rank_exactly(corpus, corpus.vectors[key], 6) if name != key]
        hits += len({line["neighbour"] for line in by_key[key]} & set(exact[:4]))
    assert hits / (4 * len(list(corpus.vectors)[::20])) > 0.9


@pytest.mark.parametrize("kind", ["flat", "rabitq"])
def test_near_duplicates_come_in_groups(corpus, tmp_path, kind):
    settings = {"kind": kind, "queries": 100, "near_duplicates": 0.999}
    report = build(corpus, str(tmp_path / "index"), **settings)["near_duplicates"]
    assert (report["groups"], report["images"]) == (10, 30)
    groups = {}
    for line in pq.read_table(report["uri"]).to_pylist():
        groups.setdefault(line["group"], set()).add(line["key"])
        assert 0.999 <= line["score"] <= 1
    expected = {f"copies.tar/{row:06d}.jpg" for row in (3, 13, 23)}
    assert expected in groups.values()


@pytest.mark.parametrize("kind", KINDS)
def test_near_duplicates_at_a_cosine_of_one_are_the_exact_copies_alone(tmp_path, kind):
    corpus = Corpus(str(tmp_path / "embeddings"), 48)
    corpus.add_shard("pictures.tar", draw_vectors(600, 48, seed=0))
    one, other = draw_vectors(2, 48, seed=9)
    noise = 2e-3 * np.random.default_rng(0).standard_normal((40, 48)) * one.mean()
    near = np.concatenate([one + noise, other + noise]).astype(np.float32)
    copies = np.repeat([one, other], [70, 3], axis=0)
    corpus.add_shard("copies.tar", np.concatenate([near[:40], copies, near[40:]]))
    settings = {"kind": kind, "queries": 50, "near_duplicates": 1.0}
    report = build(corpus, str(tmp_path / "index"), **settings)["near_duplicates"]
    lines = pq.read_table(report["uri"]).to_pylist()
    assert {line["key"] for line in lines} == {f"copies.tar/{40 + n:06d}.jpg" for n in range(73)}
    assert {line["score"] for line in lines} == {1}
    assert report["groups"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_has_all_the_neighbours_that_there_are(tmp_path, kind):
    """More than the few lists that a search looks into, or the links of a graph, would give."""
    corpus = Corpus(str(tmp_path / "embeddings"), 16)
    copies = np.repeat(draw_vectors(2, 16, seed=1), 100, axis=0)
    corpus.add_shard("a.tar", np.concatenate([draw_vectors(300, 16, seed=0), copies]))
    uri = str(tmp_path / "index")
    build(corpus, uri, kind=kind, queries=30)
    corpus.extend("night.tar", rows=5, seed=3)
    report = build(corpus, uri, kind=kind, queries=30, knn=180)
    table = pq.read_table(report["knn"]["uri"])
    counts = np.unique(table.column("key").to_numpy(zero_copy_only=False), return_counts=True)[1]
    assert (counts == 180).all()
    assert len(counts) == 505
    pairs = set(zip(table["key"].to_pylist(), table["neighbour"].to_pylist(), strict=True))
    assert len(pairs) == table.num_rows
    assert build(corpus, uri, knn=900)["knn"]["rows"] == 505
    table = pq.read_table(f"{report['knn']['uri'].rsplit('-', 1)[0]}-900")
    assert table.num_rows == 505 * 504


def test_two_thresholds_however_close_are_two_files(corpus, tmp_path):
    uri = str(tmp_path / "index")
    paths = {
        build(corpus, uri, queries=100, near_duplicates=threshold)["near_duplicates"]["uri"]
        for threshold in (0.99, 0.9900001, 1.0)
    }
    assert {path.rpartition("/")[2] for path in paths} == {
        "near-duplicates-0.99.parquet",
        "near-duplicates-0.9900001.parquet",
        "near-duplicates-1.parquet",
    }


def test_an_index_without_near_duplicates_has_no_groups(tmp_path):
    corpus = Corpus(str(tmp_path / "embeddings"), 48)
    corpus.add_shard("a.tar", np.eye(48, dtype=np.float32))
    report = build(corpus, str(tmp_path / "index"), near_duplicates=0.9)["near_duplicates"]
    assert (report["groups"], report["images"]) == (0, 0)
    assert pq.read_table(report["uri"]).column_names == ["group", "key", "score"]


def test_exports_need_no_embeddings_and_change_no_generation(corpus, tmp_path):
    uri = str(tmp_path / "index")
    generation = build(corpus, uri)["generation"]
    corpus.output = None
    report = build(corpus, uri, knn=2)
    assert (report["action"], report["generation"]) == ("exported", generation)
    assert pq.read_table(report["knn"]["uri"]).num_rows == 2 * 830
    with pytest.raises(SettingsError, match="CURRENT is missing"):
        build(corpus, str(tmp_path / "none"), knn=2)


def test_pairs_that_share_an_image_are_one_group():
    left, right = np.array([0, 1, 5, 7, 2]), np.array([1, 2, 6, 6, 0])
    labels = join_groups(9, left, right)
    np.testing.assert_array_equal(labels, [0, 0, 0, 3, 4, 5, 5, 5, 8])
    chain = np.arange(999)
    np.testing.assert_array_equal(join_groups(1000, chain + 1, chain), np.zeros(1000))
