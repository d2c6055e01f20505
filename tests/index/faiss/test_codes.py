"""FAISS as we use it, and the traps that the way we use it avoids."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.benchmark.synthetic import generate_vectors
from pipeline.errors import CorruptionError, SettingsError
from pipeline.index.build.kinds import make_factory
from pipeline.index.faiss import codes
from pipeline.index.faiss.codec import read_codec, train_codec
from pipeline.index.faiss.package import (
    check_packages,
    describe_engine,
    find_packages,
    load_faiss,
    set_threads,
)
from pipeline.index.vectors import normalise_rows

WIDTHS = (1024, 2152, 1984, 2048)
TRAINED = ("rabitq", "ivf-rabitq", "ivf-sq8")


@pytest.fixture(autouse=True)
def _one_thread():
    set_threads(1)


def make_index(kind, vectors, *, packed, lists=16):
    factory = make_factory(kind, vectors.shape[1], lists if kind.startswith("ivf") else 0)
    codec = train_codec(kind, factory, vectors, seed=0)
    index = codec.make_index(packed=packed)
    index.add(codec.rotate(vectors))
    return codec, index


def reopen(codec, index, folder):
    codes.write_index(index, folder / "index.faiss")
    path = None
    if codec.is_trained:
        path = folder / "trained.faiss"
        codec.write(path)
    again = read_codec(codec.kind, codec.dim, path, shown_as="codec")
    opened = codes.read_index(folder / "index.faiss", shown_as="index")
    again.attach(opened)
    return again, opened


def search(codec, index, queries, k, **settings):
    rotated = codec.rotate(queries)
    return codes.search_codes(
        index, rotated, k, lists=codec.find_lists(rotated, 8), ef=64, **settings
    )


def recall(rows, truth):
    pairs = zip(rows, truth, strict=True)
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs])


@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("kind", ["flat", "rabitq", "ivf-rabitq"])
def test_every_width_is_encoded_stored_and_found(dim, kind, tmp_path):
    vectors = normalise_rows(generate_vectors(1500, dim, clusters=40))
    codec, index = reopen(*make_index(kind, vectors, packed=True), tmp_path)
    truth = codes.search_exact(vectors[:50], vectors, 10)[1]
    _, rows = search(codec, index, vectors[:50], 100)
    assert recall(rows, truth) > 0.97


@pytest.mark.parametrize("kind", ["flat", "hnsw", *TRAINED])
@pytest.mark.parametrize("packed", [True, False])
def test_a_stored_index_answers_as_it_did_before(kind, packed, tmp_path):
    vectors = normalise_rows(generate_vectors(1500, 64, clusters=40))
    codec, index = make_index(kind, vectors, packed=packed)
    before = search(codec, index, vectors[:20], 10)
    after = search(*reopen(codec, index, tmp_path), vectors[:20], 10)
    np.testing.assert_array_equal(before[1], after[1])


@pytest.mark.parametrize("kind", ["ivf-rabitq", "ivf-sq8"])
def test_segments_that_share_centroids_find_what_one_index_finds(kind):
    vectors = normalise_rows(generate_vectors(1500, 64, clusters=40))
    codec, whole = make_index(kind, vectors, packed=False)
    halves = [codec.make_index(packed=False) for _ in range(2)]
    halves[0].add(codec.rotate(vectors[:700]))
    halves[1].add(codec.rotate(vectors[700:]))
    scores, rows = search(codec, whole, vectors[:30], 10)
    found = [search(codec, half, vectors[:30], 10) for half in halves]
    merged = np.concatenate([found[0][0], found[1][0]], axis=1)
    order = np.argsort(-merged, axis=1)[:, :10]
    both = np.concatenate([found[0][1], found[1][1] + 700], axis=1)
    np.testing.assert_allclose(np.take_along_axis(merged, order, 1), scores, atol=1e-5)
    assert recall(np.take_along_axis(both, order, 1), rows) > 0.99


def test_a_segment_file_holds_no_centroids(tmp_path):
    vectors = normalise_rows(generate_vectors(1500, 64, clusters=40))
    codec, _ = make_index("ivf-rabitq", vectors, packed=False, lists=32)
    codes.write_index(codec.make_index(packed=False), tmp_path / "empty")
    codec.write(tmp_path / "codec")
    centroids_bytes = 32 * 64 * 4
    assert (
        (tmp_path / "empty").stat().st_size < centroids_bytes < (tmp_path / "codec").stat().st_size
    )


def test_the_same_seed_trains_the_same_codec(tmp_path):
    vectors = normalise_rows(generate_vectors(1500, 64, clusters=40))
    for name in ("a", "b"):
        make_index("ivf-rabitq", vectors, packed=True)[0].write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- traps ---


def test_one_bit_codes_are_compared_with_eight_bits_of_the_query():
    """The library's default is four, which costs recall on vectors that are not rotated."""
    vectors = normalise_rows(generate_vectors(1500, 1024, clusters=40))
    codec = train_codec("ivf-rabitq", "IVF16,RaBitQfs", vectors, seed=0)
    index = codec.make_index(packed=False)
    index.add(vectors)
    assert index.qb == 8
    truth = codes.search_exact(vectors[:100], vectors, 10)[1]
    lists = codec.find_lists(vectors[:100], 16)
    good = codes.search_codes(index, vectors[:100], 10, lists=lists)[1]
    index.qb = 4
    bad = codes.search_codes(index, vectors[:100], 10, lists=lists)[1]
    assert recall(good, truth) > recall(bad, truth)


def test_rows_of_a_packed_index_are_found_again():
    """Adding preassigned rows to it would store garbage without an error; plain add does not."""
    vectors = normalise_rows(generate_vectors(1500, 64, clusters=40))
    codec, index = make_index("ivf-rabitq", vectors, packed=True)
    _, rows = search(codec, index, vectors[:200], 10)
    assert np.mean([own in line for own, line in enumerate(rows)]) > 0.99


def test_a_query_of_another_width_is_refused_before_it_reaches_the_library():
    vectors = normalise_rows(generate_vectors(100, 64, clusters=4))
    _codec, index = make_index("flat", vectors, packed=False)
    for queries, k in ((vectors[:, :32], 5), (vectors, 0), (vectors.astype(np.float64), 5)):
        with pytest.raises(ValueError, match="for width 64"):
            codes.search_codes(index, queries, k)


def test_rows_that_are_missing_are_minus_one_here_and_nowhere_else():
    vectors = normalise_rows(generate_vectors(100, 64, clusters=4))
    _codec, index = make_index("flat", vectors, packed=False)
    allowed = np.packbits(np.arange(100) < 3, bitorder="little")
    _, rows = codes.search_codes(index, vectors[:1], 5, allowed=allowed)
    assert sorted(rows[0]) == [-1, -1, 0, 1, 2]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf-rabitq", "ivf-sq8", "rabitq"])
def test_deleted_rows_are_not_found_where_the_library_can_select(kind):
    vectors = normalise_rows(generate_vectors(1500, 64, clusters=40))
    codec, index = make_index(kind, vectors, packed=False)
    assert codes.can_select(index)
    allowed = np.packbits(np.arange(1500) % 2 == 0, bitorder="little")
    _, rows = search(codec, index, vectors[:50], 10, allowed=allowed)
    assert (rows[rows >= 0] % 2 == 0).all()


def test_a_packed_exhaustive_index_cannot_select():
    vectors = normalise_rows(generate_vectors(1500, 64, clusters=40))
    assert not codes.can_select(make_index("rabitq", vectors, packed=True)[1])


def test_adding_to_a_mapped_index_kills_the_process(tmp_path):
    """Why an opened index is never added to, and additions make new segments."""
    program = """
import sys, numpy as np
from pathlib import Path
from pipeline.index.faiss import codes
from pipeline.index.faiss.package import load_faiss
faiss = load_faiss()
index = faiss.IndexFlatIP(64)
index.add(np.ones((100, 64), np.float32))
codes.write_index(index, Path(sys.argv[1]))
opened = codes.read_index(Path(sys.argv[1]), shown_as="x")
print("opened", flush=True)
opened.add(np.ones((1, 64), np.float32))
"""
    path = str(tmp_path / "index.faiss")
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, check=False)
    assert done.stdout == b"opened\n"
    assert done.returncode < 0  # by a signal


@pytest.mark.parametrize("kind", ["flat", "rabitq", "ivf-rabitq"])
def test_damaged_bytes_end_in_an_error_or_an_index_never_in_a_crash(kind, tmp_path):
    vectors = normalise_rows(generate_vectors(600, 64, clusters=10))
    _, index = make_index(kind, vectors, packed=True)
    codes.write_index(index, tmp_path / "whole")
    data = bytearray((tmp_path / "whole").read_bytes())
    random = np.random.default_rng(0)
    refused = 0
    for position in [*range(0, 60, 4), *random.integers(60, len(data), 20)]:
        broken = bytearray(data)
        broken[position] ^= 0xFF
        (tmp_path / "broken").write_bytes(broken)
        try:
            codes.read_index(tmp_path / "broken", shown_as="broken")
        except CorruptionError:
            refused += 1
    assert refused > 5
    (tmp_path / "broken").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptionError, match="FAISS cannot read broken"):
        codes.read_index(tmp_path / "broken", shown_as="broken")


def test_threads_are_counted_per_thread():
    """Setting it once for the process would leave every other thread with all cores."""
    import threading

    faiss = load_faiss()
    counts = []

    def look() -> None:
        set_threads(1)
        counts.append(faiss.omp_get_max_threads())

    set_threads(2)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert counts == [1]
    assert faiss.omp_get_max_threads() == 2


# --- packages ---


def test_two_faiss_packages_at_once_are_refused_with_the_way_out():
    with pytest.raises(SettingsError, match="pip uninstall -y faiss-cpu faiss-gpu, then pip"):
        check_packages({"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"})


def test_one_faiss_package_is_found_and_described():
    found = find_packages()
    assert len(found) == 1
    described = describe_engine()
    assert described.package in found
    assert described.gpus >= 0


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        ("raise ImportError('no')", "FAISS is not installed; pip install"),
        ("", "a remnant of two packages"),
        ("__version__ = '1.9.0'\nIndexFlatIP = 1", "FAISS 1.9.0 is too old; install at least 1.15"),
    ],
)
def test_a_faiss_that_will_not_do_is_explained(stub, message, tmp_path):
    (tmp_path / "faiss.py").write_text(stub)
    program = "from pipeline.index.faiss.package import load_faiss; load_faiss()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{tmp_path}:."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert message in done.stderr


def test_half_vectors_are_ranked_as_they_are_multiplied():
    vectors = normalise_rows(generate_vectors(3000, 72, clusters=10))
    halves = vectors.astype(np.float16)
    ranker = codes.HalfRanker(72)
    for chosen in (np.arange(300), np.arange(3000), np.array([0, 1, 2, 2999, 7])):
        scores, rows = ranker.rank(vectors[:3], halves, chosen, k=5)
        exact = vectors[:3] @ halves[chosen].astype(np.float32).T
        np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :5], atol=1e-6)
        np.testing.assert_array_equal(rows[:, 0], [0, 1, 2])
        assert set(rows.ravel()) <= set(chosen)


def test_fewer_rows_than_neighbours_are_all_ranked():
    halves = normalise_rows(generate_vectors(20, 72)).astype(np.float16)
    scores, rows = codes.HalfRanker(72).rank(np.ones((1, 72), "f4"), halves, np.array([4, 9]), k=5)
    assert scores.shape == (1, 2)
    assert set(rows[0]) == {4, 9}


def test_each_thread_keeps_one_ranker_of_a_width():
    assert codes.get_ranker(72) is codes.get_ranker(72)
    assert codes.get_ranker(72) is not codes.get_ranker(64)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(codes.get_ranker, 72).result() is not codes.get_ranker(72)
