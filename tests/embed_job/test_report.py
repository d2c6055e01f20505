"""Counters, limits and the books of a run."""

import logging
from itertools import pairwise

import pytest

from pipeline.embed_job.report import Counters, ImageCounts, show_progress
from pipeline.errors import CorruptionError, TooManyFailuresError
from pipeline.log import configure_logging


def test_books_that_do_not_balance_are_an_error():
    counts = ImageCounts(10, embedded=4, failed={"truncated": 1}, carried_over=3, removed=2)
    assert counts.listed == 10
    with pytest.raises(CorruptionError, match="11 images listed, 10 accounted for; run with --ver"):
        ImageCounts(11, embedded=4, failed={"truncated": 1}, carried_over=3, removed=2)


def count(ok: int, failed: int) -> Counters:
    counters = Counters()
    counters.statuses.update({"ok": ok, "truncated": failed})
    return counters


@pytest.mark.parametrize(
    ("ok", "failed", "limit", "final", "stops"),
    [
        (10, 3, (3, None), False, False),
        (10, 4, (3, None), False, True),
        (0, 1, (0, None), False, True),
        (0, 50, (None, 0.01), False, False),  # too early to judge a share
        (0, 50, (None, 0.01), True, True),
        (990, 10, (None, 0.01), False, False),
        (989, 11, (None, 0.01), False, True),
        (0, 10**6, (None, None), True, False),
        (0, 0, (None, 0.0), True, False),
    ],
)
def test_a_run_stops_above_its_limit_and_not_at_it(ok, failed, limit, final, stops):
    counters = count(ok, failed)
    if not stops:
        counters.check_limit(*limit, final=final)
        return
    with pytest.raises(TooManyFailuresError) as caught:
        counters.check_limit(*limit, final=final)
    assert f"{failed} of {ok + failed} images failed ({failed} truncated)" in str(caught.value)
    assert "committed shards stay" in str(caught.value)
    assert caught.value.exit_code == 3


def test_without_a_terminal_progress_is_a_log_line(caplog, monkeypatch):
    monkeypatch.setattr("pipeline.log.LOG.handlers", [caplog.handler])
    monkeypatch.setattr("pipeline.log.LOG.propagate", False)
    with caplog.at_level(logging.INFO, "pipeline"), show_progress(1000) as progress:
        progress.update(images=1, failures=0, done_bytes=1, seconds=9.0)
        progress.update(images=50, failures=1, done_bytes=250, seconds=10.0)
        progress.update(images=60, failures=1, done_bytes=300, seconds=12.0)
    assert [record.getMessage() for record in caplog.records] == [
        "progress images=50 failed=1 images_per_s=5.0 done=25.0% eta_s=30"
    ]


def test_log_lines_go_to_standard_error_once(capsys):
    logger = logging.getLogger("pipeline")
    before = (list(logger.handlers), logger.level, logger.propagate)
    try:
        configure_logging("warning")
        configure_logging("warning")
        logger.warning("event=%s", "one")
        logging.getLogger("pipeline.embed_job.lease").info("unseen")
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("WARNING event=one") == 1
    assert "unseen" not in captured.err


def test_the_timeline_of_a_long_run_stays_short_and_evenly_spread():
    counters = Counters()
    for number in range(1, 10_001):
        counters.statuses["ok"] = number
        counters.mark(0.01 * number)
    assert len(counters.timeline) <= 401
    assert counters.timeline[0] == (0.01, 1)
    assert counters.timeline[-1] == (100.0, 10_000)
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(counters.timeline)]
    assert max(gaps) < 2.0
