import numpy as np
import pyarrow as pa

from index.corpus import STORAGE, build, make_corpus
from pipeline.benchmark.synthetic import generate_vectors
from pipeline.index.build.ground_truth import (
    DEPTH,
    Queries,
    Truth,
    TruthBuilder,
    blend_rows,
    count_hits,
    decode_queries,
    drop_dead,
    encode_queries,
    find_floors,
    look_up,
    merge_truths,
    read_queries,
    score_as_embedded,
)
from pipeline.index.build.measure import read_truth
from pipeline.index.files import FileStore
from pipeline.index.pointer import read_current
from pipeline.index.vectors import normalise_rows

DIM = 32


def collect(queries, vectors, names, *, block=400):
    builder = TruthBuilder(queries)
    for first in range(0, len(vectors), block):
        keys = pa.chunked_array([names[first : first + block]])
        builder.add(vectors[first : first + block], keys, first)
    return builder.finish()


def brute_force(queries, vectors, names):
    scores = queries.vectors @ vectors.T
    for number, key in enumerate(queries.keys):
        scores[number, [i for i, name in enumerate(names) if name == key]] = -np.inf
    return -np.sort(-scores, axis=1)[:, :DEPTH]


def make_case(count=20, rows=1500):
    vectors = normalise_rows(generate_vectors(rows, DIM, clusters=30))
    names = [f"k{row:05d}" for row in range(rows)]
    floors = np.full(count, -np.inf, np.float32)
    return Queries(tuple(names[:count]), vectors[:count], floors), vectors, names


def test_truth_over_segments_is_the_truth_over_everything():
    queries, vectors, names = make_case()
    first = collect(queries, vectors[:700], names[:700])
    second = collect(queries, vectors[700:], names[700:])
    merged = merge_truths([first, second], 20)
    np.testing.assert_allclose(merged, brute_force(queries, vectors, names), atol=1e-5)


def test_deletions_strike_entries_out_and_the_rest_stays_exact():
    queries, vectors, names = make_case()
    truth = collect(queries, vectors, names)
    dead = np.random.default_rng(0).random(len(vectors)) < 0.1
    merged = merge_truths([drop_dead(truth, dead)], 20)
    live = [i for i in range(len(vectors)) if not dead[i]]
    exact = brute_force(queries, vectors[live], [names[i] for i in live])
    np.testing.assert_allclose(merged[:, :100], exact[:, :100], atol=1e-5)


def test_floors_keep_later_segments_small_and_the_truth_exact():
    queries, vectors, names = make_case(rows=1500)
    base = collect(queries, vectors[:1400], names[:1400])
    floors = find_floors(merge_truths([base], 20))
    later = Queries(queries.keys, queries.vectors, floors)
    delta = collect(later, vectors[1400:], names[1400:])
    assert len(delta.score) < 20 * 100 / 4
    merged = merge_truths([base, delta], 20)
    np.testing.assert_allclose(merged, brute_force(queries, vectors, names), atol=1e-5)


def test_a_query_is_not_its_own_neighbour():
    queries, vectors, names = make_case(count=5)
    truth = collect(queries, vectors, names)
    assert not any(row == query for query, row in zip(truth.query, truth.row, strict=True))


def test_truth_and_queries_survive_storage():
    queries, vectors, names = make_case(count=5)
    truth = collect(queries, vectors, names)
    again = Truth.from_bytes(truth.to_bytes())
    for name in ("query", "row", "score"):
        np.testing.assert_array_equal(getattr(again, name), getattr(truth, name))
    read = decode_queries(encode_queries(queries.keys, queries.vectors), None)
    assert read.keys == queries.keys
    np.testing.assert_array_equal(read.vectors, queries.vectors)
    empty = TruthBuilder(queries).finish()
    assert len(Truth.from_bytes(empty.to_bytes()).score) == 0


def test_equal_pictures_are_equally_right():
    truth = np.array([[0.9, 0.8, 0.8, 0.7]], np.float32)
    found = np.array([[0.9, 0.8, 0.7, 0.6]], np.float32)
    assert count_hits(found, truth, 2)[0][0] == 2
    assert count_hits(found, truth, 3)[0][0] == 2
    short = np.array([[0.9, -np.inf, -np.inf, -np.inf]], np.float32)
    hits, possible = count_hits(short, short, 3)
    assert (hits[0], possible[0]) == (1, 1)


def test_what_a_search_found_is_scored_as_embedded_or_not_at_all():
    queries, vectors, names = make_case(count=7)
    truth = collect(queries, vectors, names)
    held = {(q, r): s for q, r, s in zip(truth.query, truth.row, truth.score, strict=True)}
    random = np.random.default_rng(0)
    rows = random.integers(-1, len(vectors), (7, 400))
    expected = [[held.get((q, row), -np.inf) for row in line] for q, line in enumerate(rows)]
    np.testing.assert_array_equal(look_up(truth, rows), np.array(expected, np.float32))
    order = random.permutation(len(truth.row))
    mixed = Truth(truth.query[order], truth.row[order], truth.score[order])
    np.testing.assert_array_equal(look_up(mixed, rows), np.array(expected, np.float32))
    assert np.isneginf(look_up(TruthBuilder(queries).finish(), rows)).all()


def test_which_of_many_equal_rows_are_kept_as_truth_does_not_count_against_a_search():
    vectors = normalise_rows(generate_vectors(900, DIM, clusters=30))
    vectors[200:500] = vectors[200]
    query = normalise_rows(vectors[200:201] + np.float32(0.01))
    queries = Queries(("",), query, np.full(1, -np.inf, np.float32))
    truth = collect(queries, vectors, [f"k{row}" for row in range(900)])
    exact = merge_truths([truth], 1)
    scores = query.astype(np.float64) @ vectors.T
    for found in (np.arange(200, 300), np.arange(400, 500)):
        values = score_as_embedded(truth, scores[:, found], found[None])
        assert count_hits(values, exact, 100)[0][0] == 100
    wrong = np.argsort(scores[0])[:100]
    values = score_as_embedded(truth, scores[:, wrong], wrong[None])
    assert count_hits(values, exact, 100)[0][0] == 0


def test_queries_are_no_rows_and_lie_nearer_to_one_row_than_to_another():
    vectors = normalise_rows(generate_vectors(200, DIM, clusters=30))
    blended = blend_rows(vectors)
    np.testing.assert_allclose(np.linalg.norm(blended, axis=1), 1, atol=1e-6)
    own, other = (np.sum(blended * rows, axis=1) for rows in (vectors, np.roll(vectors, 1, axis=0)))
    assert (own > other - 1e-6).all()
    assert own.max() < 1 - 1e-4
    np.testing.assert_allclose(blend_rows(vectors[:1]), vectors[:1], atol=1e-6)


def test_merged_segments_remember_the_exact_neighbours_of_the_vectors_as_embedded(tmp_path):
    """Their own vectors are rounded, which moves the neighbours of near copies."""
    corpus = make_corpus(tmp_path / "embeddings", rows=400, dim=DIM, shards=8)
    uri = str(tmp_path / "index")
    build(corpus, uri, kind="rabitq", queries=30)
    corpus.drop_rows("shard-001.tar", every=20)
    corpus.extend("more.tar", rows=450, seed=2)
    report = build(corpus, uri, kind="rabitq", queries=30)
    assert "merged" in report["why"]
    files = FileStore(uri, STORAGE, tmp_path / "cache")
    manifest = read_current(uri, STORAGE)
    queries = read_queries(files, manifest.queries, DIM)
    truth = read_truth(files, manifest.segments, tombstones=manifest.tombstones, queries=queries)
    rows = np.stack(list(corpus.vectors.values())).astype(np.float64)
    exact = queries.vectors @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    exact = -np.sort(-exact, axis=1)[:, :100]
    np.testing.assert_allclose(truth[:, :100], exact, atol=1e-6)
