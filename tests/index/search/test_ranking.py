"""What is found, and in which order, next to brute force in float64."""

from itertools import pairwise

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.corpus import Corpus, build, draw_vectors
from index.search.conftest import COPIES, DIM, FRAMES, Hard
from pipeline.index.manifest import SearchParams
from pipeline.index.search.search_index import SearchIndex
from pipeline.index.vectors import SAME, normalise_rows, score_rows

FRESH = draw_vectors(20, DIM, seed=99)
TIE = 3e-6


def keys_of(found):
    return [neighbour.key for neighbour in found]


def measure_recall(found, exact, k):
    """Return the share of the k nearest that were found; of equally near rows, any is right."""
    exact_scores = dict(exact)
    last = exact[min(k, len(exact)) - 1][1]
    return sum(exact_scores[item.key] >= last - TIE for item in found) / min(k, len(exact))


def find_rows(index, queries, k, where=None, params=None):
    """Return what is found as segment and row, without reading any column; faster than keys."""
    generation = index.snapshot.opened
    masks = None if where is None else generation.make_masks(where)
    units = normalise_rows(np.atleast_2d(queries))
    scores, numbers, rows = generation.search(units, k, params=params, masks=masks)
    return [
        [(int(n), int(r)) for s, n, r in zip(*line, strict=True) if np.isfinite(s)]
        for line in zip(scores, numbers, rows, strict=True)
    ]


def find_copies(hard: Hard) -> list[str]:
    copy = draw_vectors(1, DIM, seed=6)[0]
    copies = [key for key, row in hard.built.corpus.vectors.items() if np.array_equal(row, copy)]
    assert COPIES - 2 <= len(copies) <= COPIES  # of some, a night deletes one
    return copies


# --- scores ---


@pytest.mark.parametrize("exact", [False, True])
def test_every_score_is_the_cosine_of_the_stored_vector(hard: Hard, exact):
    index = SearchIndex.open(hard.built.index)
    for query in FRESH[:5]:
        for found in index.search(query, 30, exact=exact)[0]:
            stored = index.vector(found.key).astype(np.float64)
            cosine = stored @ query / np.linalg.norm(stored) / np.linalg.norm(query)
            assert found.score == pytest.approx(cosine, abs=1e-7)


@pytest.mark.parametrize("exact", [False, True])
def test_scores_are_those_of_the_embeddings_to_what_storing_them_rounds(hard: Hard, exact):
    index = SearchIndex.open(hard.built.index)
    tolerance = 1e-7 if index.info.kind in ("flat", "hnsw") else 1e-4
    truth = dict(hard.rank(FRESH[0]))
    found = index.search(FRESH[0], 200, exact=exact)[0]
    assert max(abs(item.score - truth[item.key]) for item in found) < tolerance


def test_exact_search_finds_what_brute_force_over_the_stored_vectors_finds(hard: Hard):
    index = SearchIndex.open(hard.built.index)
    stored = np.stack([index.vector(key) for key in hard.keys]).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    many = index.search(FRESH, 100, exact=True)
    for query, found in zip(FRESH, many, strict=True):
        scores = np.sort(stored @ (query / np.linalg.norm(query)))[::-1][:100]
        np.testing.assert_allclose([item.score for item in found], scores, atol=2e-7)
        [alone] = index.search(query, 100, exact=True)
        assert [(n.key, n.score) for n in alone] == [(n.key, n.score) for n in found]


def test_every_image_is_its_own_nearest_neighbour_with_a_score_of_one(hard: Hard):
    index = SearchIndex.open(hard.built.index)
    copies = set(find_copies(hard))
    by_vector = index.search(np.stack(list(hard.built.corpus.vectors.values())[::9]), 1)
    for key, [found] in zip(hard.keys[::9], by_vector, strict=True):
        assert found.score == 1
        assert found.key == key or {key, found.key} <= copies
    for key in hard.keys[::70]:
        [[found]] = index.search(index.vector(key), 1)
        assert found.score == 1
        assert found.key == key or {key, found.key} <= copies


def test_copies_of_a_picture_and_nothing_else_have_a_score_of_one(hard: Hard):
    index = SearchIndex.open(hard.built.index)
    copies = find_copies(hard)
    for query in (hard.built.corpus.vectors[copies[0]], index.vector(copies[3])):
        for exact in (False, True):
            found = index.search(7 * query, 2 * COPIES, exact=exact)[0]
            assert {item.key for item in found if item.score >= 1} == set(copies)
            assert keys_of(found)[: len(copies)] == [k for k in keys_of(found) if k in copies]


def test_frames_of_a_video_are_told_apart(hard: Hard):
    """Their cosines differ by less than rounding changes the length of a vector."""
    index = SearchIndex.open(hard.built.index)
    near = np.sort(hard.units[::31] @ hard.units.T, axis=1)[:, -10] > 1 - 1e-4
    frames = [key for key, is_frame in zip(hard.keys[::31], near, strict=True) if is_frame]
    assert len(frames) > FRAMES
    shares = []
    for key in frames:
        query = hard.built.corpus.vectors[key]
        shares.append(measure_recall(index.search(query, 10)[0], hard.rank(query), 10))
    assert np.mean(shares) >= 0.99


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float16, np.float32]), st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_a_score_depends_on_nothing_but_the_two_vectors(seed, kind, dim):
    random = np.random.default_rng(seed)
    unit = normalise_rows(random.standard_normal((40, dim)).astype(np.float32) + np.float32(1e-3))
    stored = unit.astype(kind)
    stored[10] = stored[33] = stored[3]
    query = unit[random.integers(40)]
    scores = score_rows(query, stored, np.arange(40))
    lengths = np.linalg.norm(stored.astype(np.float64), axis=1)
    lengths *= np.linalg.norm(query.astype(np.float64))
    exact = stored.astype(np.float64) @ query.astype(np.float64) / lengths
    np.testing.assert_allclose(scores, exact, atol=2e-9)
    assert scores[3] == scores[10] == scores[33]
    assert scores.max() <= 1
    some = random.permutation(40)[: random.integers(1, 40)]
    np.testing.assert_array_equal(score_rows(query, stored, some), scores[some])
    assert score_rows(unit[5], stored, np.array([5]))[0] == 1
    assert (scores[np.abs(exact) < 1 - 1e-7] < 1 - SAME[stored.dtype]).all()


# --- filters ---


@pytest.fixture
def indexed_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan so few rows that even a small index has to be used for filters."""
    monkeypatch.setattr("pipeline.index.search.segment.EXACT_ROWS", 3)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.01, 0.001])
@pytest.mark.usefixtures("indexed_filters")
def test_recall_holds_whether_a_filter_goes_with_the_query_or_against_it(hard: Hard, share):
    index = SearchIndex.open(hard.built.index)
    keep = hard.labels < f"{share:.6f}"
    where = pc.field("cls") < f"{share:.6f}"
    ends = np.argsort(hard.built.corpus.label(FRESH))
    for queries in (FRESH[ends[:4]], FRESH[ends[-4:]]):
        for k in (10, 100, 500):
            shares = []
            for query in queries:
                found, exact = index.search(query, k, where)[0], hard.rank(query, keep)
                assert len(found) == min(k, len(exact))
                shares.append(measure_recall(found, exact, k))
            assert np.mean(shares) >= 0.95, (share, k)


@pytest.mark.usefixtures("indexed_filters")
def test_everything_but_what_the_query_resembles_is_searched_as_well(hard: Hard):
    index = SearchIndex.open(hard.built.index)
    shares = []
    for query in FRESH:
        exact = hard.rank(query)
        near = [key for key, _ in exact[:400]]
        where, keep = ~pc.field("key").isin(near), ~np.isin(hard.keys, near)
        shares.append(measure_recall(index.search(query, 10, where)[0], exact[400:], 10))
        assert keep.sum() == len(exact) - 400
    assert np.mean(shares) >= 0.95


# --- how many, and pages ---


@pytest.mark.parametrize("k", [1, 10, 100, 1000])
def test_recall_holds_for_any_number_of_neighbours(hard: Hard, k):
    index = SearchIndex.open(hard.built.index)
    found = index.search(FRESH, k)
    pairs = zip(found, map(hard.rank, FRESH), strict=True)
    assert np.mean([measure_recall(line, exact, k) for line, exact in pairs]) >= 0.95


@pytest.mark.parametrize("params", [SearchParams(1, 1, 1), SearchParams(1, 128, 16)])
def test_never_fewer_are_found_than_there_are(hard: Hard, params):
    """However little is looked at, as by an index that was tuned for ten neighbours only."""
    index = SearchIndex.open(hard.built.index)
    queries = np.stack([FRESH[0], hard.built.corpus.vectors[find_copies(hard)[0]]])
    for k in (1, 127, 128, 129, 1025, 4900, 9000):
        for found in find_rows(index, queries, k, params=params):
            assert len(found) == len(set(found)) == min(k, len(index))


@pytest.mark.parametrize("where", [None, pc.field("cls") < "0.7"])
@pytest.mark.usefixtures("indexed_filters")
def test_more_neighbours_continue_the_list_of_fewer(hard: Hard, where):
    index = SearchIndex.open(hard.built.index)
    copies = hard.built.corpus.vectors[find_copies(hard)[0]]
    for query in (FRESH[1], copies):
        [everything] = find_rows(index, query, 9000, where)
        assert len(everything) == len(set(everything))
        for k in (7, 128, 129, 1024, 1025):
            [alone] = find_rows(index, query, k, where)
            among_others = find_rows(index, np.stack([*FRESH, query]), k, where)[-1]
            assert alone == among_others == everything[:k]


def test_pages_neither_double_nor_lose_a_row(hard: Hard):
    index = SearchIndex.open(hard.built.index)
    rows = len(index)
    for size in (170, 999):
        seen = []
        for offset in range(0, rows, size):
            seen += find_rows(index, FRESH[2], offset + size)[0][offset:]
        assert len(seen) == len(set(seen)) == rows


def test_lists_are_sorted_and_equal_scores_come_in_the_order_of_rows(hard: Hard):
    index = SearchIndex.open(hard.built.index)
    for k in (10, 128, 1000):
        scores = [item.score for item in index.search(FRESH[3], k)[0]]
        assert all(one >= other for one, other in pairwise(scores))
    copies = find_copies(hard)
    found = index.search(hard.built.corpus.vectors[copies[0]], COPIES)[0]
    assert keys_of(found)[: len(copies)] == sorted(copies)


def test_rows_that_a_graph_cannot_reach_are_found(tmp_path):
    """Among many copies of one picture, a graph links copies to copies and to little else."""
    rows = np.repeat(draw_vectors(3, 16, seed=1), 400, axis=0)
    corpus = Corpus(str(tmp_path / "embeddings"), 16)
    corpus.add_shard("a.tar", np.concatenate([rows, draw_vectors(100, 16, seed=2)]))
    build(corpus, str(tmp_path / "index"), kind="hnsw", queries=50, force=True)
    index = SearchIndex.open(str(tmp_path / "index"))
    for k in (10, 128, 500, 1300):
        for query in (rows[0], rows[-1], draw_vectors(1, 16, seed=3)[0]):
            found = index.search(query, k)[0]
            assert len({item.key for item in found}) == k


def test_the_recall_that_a_generation_claims_is_what_new_pictures_get(hard: Hard):
    """Of a video that is in the index, and of things that are not."""
    index = SearchIndex.open(hard.built.index)
    random = np.random.default_rng(1)
    starts = draw_vectors(40, DIM, seed=5)
    frames = starts + 2e-3 * random.standard_normal(starts.shape) * np.abs(starts).mean()
    queries = np.concatenate([draw_vectors(80, DIM, seed=98), frames]).astype(np.float32)
    truths = list(map(hard.rank, queries))
    for k in (10, 100):
        pairs = zip(index.search(queries, k), truths, strict=True)
        measured = np.mean([measure_recall(found, exact, k) for found, exact in pairs])
        claimed = index.info.measured["recall_at"][str(k)]
        assert measured >= 0.95
        assert claimed["low"] <= measured + 0.01
