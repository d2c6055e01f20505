import threading

import numpy as np
import pyarrow.compute as pc
import pytest

from index.corpus import Built, build, make_corpus, rank_exactly
from pipeline.errors import ObjectMissingError, QueryError, UnknownKeyError
from pipeline.index.search.search_index import SearchIndex

TOLERANCE = 5e-4


def keys_of(found):
    return [neighbour.key for neighbour in found]


def test_a_search_finds_the_nearest_rows_with_their_cosines(built: Built):
    index = SearchIndex.open(built.index)
    queries = list(built.corpus.vectors)[::97]
    hits = 0
    for key in queries:
        found = index.search(built.corpus.vectors[key], k=10)[0]
        exact = rank_exactly(built.corpus, built.corpus.vectors[key], 10)
        hits += len(set(keys_of(found)) & {name for name, _ in exact})
        scores = [neighbour.score for neighbour in found]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] == pytest.approx(1, abs=TOLERANCE)
        assert max(scores) <= 1
    assert hits / (10 * len(queries)) >= 0.9


def test_scores_are_the_cosines_of_the_embeddings(built: Built):
    index = SearchIndex.open(built.index)
    query = np.random.default_rng(0).random(64)
    for neighbour in index.search(query, k=5)[0]:
        vector = built.corpus.vectors[neighbour.key]
        cosine = vector @ query / np.linalg.norm(vector) / np.linalg.norm(query)
        assert neighbour.score == pytest.approx(cosine, abs=TOLERANCE)


def test_several_vectors_are_answered_in_order(built: Built):
    index = SearchIndex.open(built.index)
    keys = list(built.corpus.vectors)[:20]
    found = index.search(np.stack([built.corpus.vectors[key] for key in keys]), k=1)
    assert [line[0].key for line in found] == keys


def test_exact_search_equals_brute_force(built: Built):
    index = SearchIndex.open(built.index)
    query = list(built.corpus.vectors.values())[5]
    exact = rank_exactly(built.corpus, query, 20)
    for queries in (query[None], np.repeat(query[None], 30, axis=0)):
        found = index.search(queries, k=20, exact=True)[0]
        assert len(set(keys_of(found)) & {key for key, _ in exact}) >= 19  # ties at the end


def test_more_neighbours_than_rows_is_a_shorter_answer(built: Built):
    index = SearchIndex.open(built.index)
    found = index.search(next(iter(built.corpus.vectors.values())), k=9000)[0]
    assert sorted(keys_of(found)) == sorted(built.corpus.vectors)
    assert all(np.isfinite(neighbour.score) for neighbour in found)


@pytest.mark.parametrize("wanted", ["class 3", "class 7"])
def test_a_filter_keeps_what_fulfils_it_and_finds_the_nearest_of_those(built: Built, wanted: str):
    index = SearchIndex.open(built.index)
    query = next(iter(built.corpus.vectors.values()))
    found = index.search(query, k=10, where=pc.field("cls") == wanted)[0]
    assert len(found) == 10
    assert {neighbour.columns["cls"] for neighbour in found} == {wanted}
    everything = index.search(query, k=9000, exact=True)[0]
    expected = [n.key for n in everything if n.columns["cls"] == wanted][:10]
    assert len(set(keys_of(found)) & set(expected)) >= 9


def test_long_lists_that_differ_in_the_middle_find_their_own_rows(built_flat: Built):
    index = SearchIndex.open(built_flat.index)
    keys = sorted(built_flat.corpus.vectors)
    for other in keys[30:33]:
        wanted = [*keys[:15], other, *keys[15:29]]
        for where in (pc.field("key").isin(wanted), {"key": {"$in": wanted}}):
            assert sorted(keys_of(index.search(np.ones(64), 50, where)[0])) == sorted(wanted)


@pytest.mark.parametrize(
    "where", ["cls = 'class 3'", {"cls": "class 3"}, pc.field("cls") == "class 3", pc.field(6) > 0]
)
def test_a_filter_may_be_text_a_mapping_or_an_expression(built_flat: Built, where):
    index = SearchIndex.open(built_flat.index)
    assert index.info.columns.names[6] == "nbytes"
    key = next(iter(built_flat.corpus.vectors))
    by_key, by_vector = index.neighbours_of(key, 5, where), index.search(np.ones(64), 5, where)[0]
    assert len(by_key) == len(by_vector) == 5
    if isinstance(where, str):
        assert {hit.columns["cls"] for hit in (*by_key, *by_vector)} == {"class 3"}


def test_a_filter_that_few_rows_fulfil_is_answered_exactly(built: Built):
    index = SearchIndex.open(built.index)
    key = "shard-000.tar/000123.jpg"
    query = next(iter(built.corpus.vectors.values()))
    found = index.search(query, k=10, where=pc.field("key") == key)[0]
    assert keys_of(found) == [key]


def test_a_filter_that_no_row_fulfils_finds_nothing(built: Built):
    index = SearchIndex.open(built.index)
    assert index.search(np.ones(64), k=10, where=pc.field("cls") == "none such") == [[]]


def test_a_wide_filter_uses_the_index(built: Built, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.index.search.segment.EXACT_ROWS", 10)
    index = SearchIndex.open(built.index)
    query = next(iter(built.corpus.vectors.values()))
    where = pc.field("cls") != "class 3"
    found = index.search(query, k=10, where=where)[0]
    everything = index.search(query, k=9000, exact=True)[0]
    expected = [n.key for n in everything if n.columns["cls"] != "class 3"][:10]
    assert "class 3" not in {neighbour.columns["cls"] for neighbour in found}
    assert len(set(keys_of(found)) & set(expected)) >= 8


def test_a_filter_over_a_missing_column_names_the_columns(built_flat: Built):
    index = SearchIndex.open(built_flat.index)
    with pytest.raises(QueryError, match=r"cannot filter by .*colour.*columns: key, shard.*cls"):
        index.search(np.ones(64), where=pc.field("colour") == "red")


def test_a_filter_that_is_no_condition_is_refused(built_flat: Built):
    index = SearchIndex.open(built_flat.index)
    with pytest.raises(QueryError, match="is no condition"):
        index.search(np.ones(64), where=pc.field("width") + 1)


def test_deleted_rows_are_never_found(built: Built):
    index = SearchIndex.open(built.index)
    assert len(index) == len(built.corpus.vectors)
    with pytest.raises(UnknownKeyError):
        index.vector("shard-001.tar/000050.jpg")
    everything = index.search(np.ones(64), k=9000)[0]
    assert "shard-001.tar/000050.jpg" not in keys_of(everything)


def test_neighbours_of_a_key_leave_the_key_out(built: Built):
    index = SearchIndex.open(built.index)
    key = "night.tar/000003.jpg"
    found = index.neighbours_of(key, k=5)
    assert len(found) == 5
    assert key not in keys_of(found)


def test_the_stored_vector_of_a_key_is_the_normalised_embedding(built: Built):
    index = SearchIndex.open(built.index)
    vector = index.vector("shard-002.tar/000017.jpg")
    expected = built.corpus.vectors["shard-002.tar/000017.jpg"]
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-3)


def test_a_row_says_where_its_picture_lies(built_flat: Built):
    found = SearchIndex.open(built_flat.index).snapshot.find("shard-002.tar/000017.jpg")
    assert (found.shard, found.row, found.offset, found.nbytes) == (
        "/pictures/shard-002.tar",
        17,
        17 * 512,
        100,
    )
    assert found.columns["cls"] == "class 7"
    assert found.score == 1


def test_a_sample_has_no_repetition_and_no_deleted_row(built_flat: Built):
    sample = SearchIndex.open(built_flat.index).snapshot.sample(5000, seed=1)
    assert sorted(keys_of(sample)) == sorted(built_flat.corpus.vectors)


@pytest.mark.parametrize(
    ("key", "similar"),
    [
        ("shard-000.tar/000123.jpeg", r"similar keys: 'shard-000.tar/000123.jpg', "),
        ("000123.jpg", r"similar keys: 'shard-00\d.tar/000123.jpg', "),
        ("elsewhere/shard-9.tar/000017.jpg", r"similar keys: 'shard-00\d.tar/000017.jpg', "),
        ("shrad-002.tar/000017.jpg", r"similar keys: 'shard-00\d.tar/000017.jpg', "),
        ("something of quite another kind", r"no image with the key '[a-z ]+' in '[^;]*'$"),
        ("x" * 100_000, "no image with the key"),
        ("", "no image with the key ''"),
    ],
)
def test_an_unknown_key_names_similar_ones(built_flat: Built, key, similar):
    with pytest.raises(UnknownKeyError, match=similar):
        SearchIndex.open(built_flat.index).vector(key)


def test_a_deleted_key_is_not_suggested(built_flat: Built):
    with pytest.raises(UnknownKeyError) as caught:
        SearchIndex.open(built_flat.index).vector("shard-001.tar/000050.jpg")
    assert str(caught.value).count("shard-001.tar/000050.jpg") == 1
    assert "/000050.jpg'," in str(caught.value)  # of another shard


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones(63), "shape \\(63,\\).*vectors of 64"),
        (np.ones((2, 65)), "shape \\(2, 65\\)"),
        (np.ones((1, 1, 64)), "shape \\(1, 1, 64\\)"),
        (np.full(64, np.nan), "NaN or infinite"),
        (np.full(64, np.inf), "NaN or infinite"),
        (np.zeros(64), "the query is a zero vector"),
        (np.stack([np.ones(64), np.zeros(64)]), "query 1 of 2 is a zero vector"),
        (np.stack([np.ones(64)] * 3 + [np.full(64, np.nan)]), "query 3 of 4 holds NaN"),
        (["a"] * 64, "not an array of numbers"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(built: Built, vectors, message):
    with pytest.raises(QueryError, match=message):
        SearchIndex.open(built.index).search(vectors)


@pytest.mark.parametrize("k", [0, -1, 10_001])
def test_a_number_of_neighbours_out_of_range_is_refused(built_flat: Built, k):
    with pytest.raises(QueryError, match=f"k is {k}; ask for 1 to 10000"):
        SearchIndex.open(built_flat.index).search(np.ones(64), k=k)


def test_a_missing_index_says_so(tmp_path):
    with pytest.raises(ObjectMissingError, match="CURRENT is missing"):
        SearchIndex.open(str(tmp_path / "nothing"))


def test_the_info_describes_the_generation(built: Built):
    info = SearchIndex.open(built.index).info
    assert info.rows == len(built.corpus.vectors)
    assert info.dim == 64
    assert info.space == built.corpus.info.space
    assert info.weights.endswith("weights/ab.safetensors")
    assert info.measured["recall"] >= 0.9
    assert info.newest_image_s is not None
    assert "cls" in info.columns.names


def test_an_older_generation_can_be_opened_by_name(tmp_path):
    corpus = make_corpus(tmp_path / "embeddings", rows=200)
    first = build(corpus, str(tmp_path / "index"))["generation"]
    corpus.extend("more.tar", rows=10, seed=3)
    build(corpus, str(tmp_path / "index"))
    index = SearchIndex.open(str(tmp_path / "index"), generation=first)
    assert len(index) == 200
    assert index.refresh() is False


def test_many_threads_search_while_generations_change(tmp_path):
    corpus = make_corpus(tmp_path / "embeddings", rows=600)
    uri = str(tmp_path / "index")
    build(corpus, uri, kind="rabitq", queries=50)
    index = SearchIndex.open(uri)
    query = list(corpus.vectors.values())[3]
    expected = index.search(query, 5)[0][0].key
    stop, errors, seen = threading.Event(), [], []

    def search() -> None:
        while not stop.is_set():
            try:
                seen.append((index.info.generation, index.search(query, 5)[0][0].key))
            except Exception as error:  # collected, to be looked at by the test
                errors.append(error)
                return

    threads = [threading.Thread(target=search) for _ in range(8)]
    for thread in threads:
        thread.start()
    for night in range(3):
        corpus.extend(f"night-{night}.tar", rows=5, seed=100 + night)
        build(corpus, uri, kind="rabitq", queries=50)
        assert index.refresh() is True
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {key for _, key in seen} == {expected}
    assert len(index) == 615


def test_a_search_ends_on_the_generation_it_began_with(tmp_path):
    corpus = make_corpus(tmp_path / "embeddings", rows=200)
    uri = str(tmp_path / "index")
    build(corpus, uri)
    index = SearchIndex.open(uri)
    before = index.snapshot
    corpus.extend("more.tar", rows=10, seed=3)
    build(corpus, uri)
    assert index.refresh() is True
    assert index.refresh() is False
    assert (before.info.rows, index.info.rows) == (200, 210)
    assert len(before.search(np.ones(64), 1000)[0]) == 200
