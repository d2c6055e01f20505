import numpy as np
import pytest

from pipeline.index.build.gates import check_recall
from pipeline.index.build.measure import Measured, estimate_recall
from pipeline.index.build.tune import choose, limit_candidates, meets, order_by_cost, tune
from pipeline.index.manifest import SearchParams


def measured(params, value, low, *, timed=True):
    recall = {1: (value, low, 1.0), 10: (value, low, 1.0), 100: (value, low, 1.0)}
    return Measured(params, recall, (1.0, 2.0) if timed else None, 1000, 1.0)


def test_perfect_recall_has_an_interval_that_ends_at_one():
    scores = np.tile(np.linspace(0.9, 0.5, 10, dtype=np.float32), (1000, 1))
    assert estimate_recall(scores, scores, 10) == (1.0, pytest.approx(0.996, abs=1e-3), 1.0)


def test_the_interval_holds_the_truth_nineteen_times_of_twenty():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        hits = random.binomial(10, random.beta(18, 2, 300))  # mean 0.9, correlated within a query
        truth = np.ones((300, 10), np.float32)
        found = np.where(np.arange(10) < hits[:, None], 1, 0).astype(np.float32)
        _, low, high = estimate_recall(found, truth, 10)
        held += low <= 0.9 <= high
    assert 0.92 <= held / 400 <= 0.99


def test_more_queries_make_the_interval_narrower():
    widths = []
    for count in (100, 10_000):
        found = np.zeros((count, 10), np.float32)
        found[:, :9] = 1
        _, low, high = estimate_recall(found, np.ones_like(found), 10)
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_queries_without_neighbours_say_nothing():
    nothing = np.full((5, 10), -np.inf, np.float32)
    assert estimate_recall(nothing, nothing, 10) == (1.0, 0.0, 1.0)


def test_a_hundred_neighbours_have_to_meet_the_target_like_ten():
    recall = {1: (1.0, 1.0, 1.0), 10: (0.99, 0.98, 1.0), 100: (0.9, 0.89, 0.91)}
    few = Measured(SearchParams(ef=128), recall, (1.0, 2.0), 1000, 1.0)
    enough = measured(SearchParams(ef=256), 0.97, 0.96)
    assert choose([few, enough], 0.95) is enough
    gate = check_recall(few, 0.95)
    assert not gate.passed
    assert "recall@10 is 0.9900" in gate.detail
    assert "recall@100 is 0.9000 (0.8900 to 0.9100), the target 0.95" in gate.detail
    assert check_recall(enough, 0.95).passed


def test_the_first_setting_that_meets_the_bound_is_chosen():
    curve = [
        measured(SearchParams(candidates=128), 0.955, 0.94),
        measured(SearchParams(candidates=256), 0.97, 0.96),
        measured(SearchParams(candidates=512), 0.99, 0.985),
    ]
    assert choose(curve, 0.95).params.candidates == 256
    assert choose(curve, 0.999).params.candidates == 512
    assert meets(measured(SearchParams(), 1.0, 0.9), 0.95)


def fake_measure(calls):
    """Recall as a function of lists and candidates, as a real index has it."""

    def measure(settings, timed):
        calls.append((list(settings), timed))
        values = []
        for params in settings:
            value = min(1.0, 0.7 + 0.05 * np.log2(max(1, params.nprobe)))
            value = min(value, 0.9 + 0.01 * np.log2(params.candidates / 64))
            values.append(measured(params, value, value - 0.005, timed=timed))
        return values

    return measure


def test_the_fewest_lists_are_found_first_then_the_fewest_candidates():
    calls = []
    tuned = tune("ivf-rabitq", lists=1024, rows=100_000, target=0.949, measure=fake_measure(calls))
    assert tuned.chosen.params == SearchParams(nprobe=64, candidates=4096)
    assert [timed for _, timed in calls] == [False, False, True, True]
    tried = [max(params.nprobe for params in settings) for settings, _ in calls[:2]]
    assert tried == [16, 128]  # all lists only where needed


def test_more_lists_are_tried_where_an_eighth_does_not_suffice():
    calls = []
    tune("ivf-rabitq", lists=1024, rows=100_000, target=0.999, measure=fake_measure(calls))
    assert [timed for _, timed in calls] == [False, False, False, True, True]
    assert max(params.nprobe for params in calls[2][0]) == 1024


def test_lists_between_powers_of_two_are_tried_where_they_are_cheaper():
    calls = []
    tuned = tune("ivf-rabitq", lists=1024, rows=100_000, target=0.91, measure=fake_measure(calls))
    assert tuned.chosen.params == SearchParams(nprobe=20, candidates=512)


def test_settings_are_ordered_by_codes_to_compare_and_candidates_to_rank():
    ordered = order_by_cost([64, 32], [128, 256], 150)
    assert ordered == [
        SearchParams(32, 128),
        SearchParams(64, 128),
        SearchParams(32, 256),
        SearchParams(64, 256),
    ]


def test_candidates_beyond_the_rows_are_not_tried():
    assert limit_candidates(3000) == [512, 1024, 2048]
    assert limit_candidates(5) == [512]
