import numpy as np
import pyarrow as pa

from pipeline.index.vectors import normalise_rows
from pipeline.benchmark.synthetic import generate_vectors
from pipeline.index.build.ground_truth import DEPTH, Queries, Truth, TruthBuilder, count_hits, decode_queries, drop_dead, encode_queries, find_floors, merge_truths

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
