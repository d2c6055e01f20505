import numpy as np
import pytest

from pipeline.index.build.changes import Owner, Range
from pipeline.index.build.merge_policy import (
    Relocation,
    choose_merges,
    compute_imbalance,
    explain_drift,
)
from pipeline.index.manifest import CodecInfo, FileInfo, SegmentInfo


def segment(name, rows, *, delta=False, cosine=None):
    return SegmentInfo(
        id=name, kind="flat", delta=delta, packed=False, rows=rows, files={}, mean_cosine=cosine
    )


def names(segments, live=None, new_rows=0):
    live = {s.id: s.rows for s in segments} | (live or {})
    return [s.id for s in choose_merges(segments, live, new_rows)]


def test_a_small_addition_is_a_delta_of_its_own():
    assert names([segment("main", 1000)], new_rows=10) == []


def test_a_ninth_delta_merges_them_all():
    deltas = [segment(f"d{i}", 5, delta=True) for i in range(8)]
    assert names([segment("main", 1000), *deltas[:7]], new_rows=5) == []
    assert names([segment("main", 1000), *deltas], new_rows=5) == [f"d{i}" for i in range(8)]


def test_deltas_beyond_a_tenth_of_the_rows_are_merged():
    segments = [segment("main", 1000), segment("d", 100, delta=True)]
    assert names(segments, new_rows=5) == []
    assert names(segments, new_rows=50) == ["d"]


def test_a_segment_with_many_deleted_rows_is_written_anew():
    segments = [segment("a", 1000), segment("b", 5000)]
    assert names(segments, {"a": 801}) == []
    assert names(segments, {"a": 799}) == ["a"]


def test_segments_no_larger_than_what_is_rewritten_go_along():
    segments = [segment("main", 10_000), segment("mid", 900), segment("d", 1200, delta=True)]
    assert names(segments, new_rows=100) == ["mid", "d"]


def test_a_segment_without_live_rows_is_not_merged():
    assert names([segment("a", 100), segment("b", 1000)], {"a": 0}) == []


@pytest.fixture
def codec():
    file = FileInfo("x", 1, "0")
    return CodecInfo("c", "ivf-rabitq", "IVF", 64, file, 10_000, imbalance=1.5, mean_cosine=0.9)


def test_training_is_kept_while_nothing_drifts(codec):
    new = [segment("d", 1000, delta=True, cosine=0.89)]
    assert explain_drift(codec, rows=39_000, imbalance=2.9, new=new) is None


@pytest.mark.parametrize(
    ("rows", "imbalance", "cosine", "reason"),
    [
        (41_000, 1.5, 0.9, "rows grew from 10,000 at training to 41,000"),
        (20_000, 3.1, 0.9, "imbalance grew from 1.50 at training to 3.10"),
        (20_000, 1.5, 0.87, "mean cosine 0.870, 0.900 at training"),
    ],
)
def test_each_drift_is_a_reason_to_train_anew(codec, rows, imbalance, cosine, reason):
    new = [segment("d", 1000, delta=True, cosine=cosine)]
    assert reason in explain_drift(codec, rows=rows, imbalance=imbalance, new=new)


def test_few_rows_say_little_about_drift(codec):
    new = [segment("d", 100, delta=True, cosine=0.5)]
    assert explain_drift(codec, rows=20_000, imbalance=1.5, new=new) is None


def test_what_was_never_trained_does_not_drift():
    flat = CodecInfo("c", "flat", "Flat")
    assert explain_drift(flat, rows=10**9, imbalance=None, new=[]) is None


def test_imbalance_is_that_of_all_segments_together():
    assert compute_imbalance([]) is None
    assert compute_imbalance([np.array([10, 0]), np.array([0, 10])]) == pytest.approx(1)
    assert compute_imbalance([np.array([20, 0])]) == pytest.approx(2)


def test_ranges_follow_the_rows_of_merged_segments():
    relocation = Relocation()
    dead = np.zeros(10, bool)
    dead[[0, 4, 9]] = True
    assert relocation.move("a", "new", base=0, dead=dead) == 7
    assert relocation.move("b", "new", base=7, dead=np.zeros(3, bool)) == 10
    owner = Owner({"s": "x"}, (Range("a", 3, 3), Range("b", 1, 2), Range("c", 0, 5)), 1)
    moved = relocation.apply(owner)
    assert moved.ranges == (Range("new", 2, 2), Range("new", 8, 2), Range("c", 0, 5))
    assert relocation.apply(Owner({}, (Range("a", 4, 1),))).ranges == ()
