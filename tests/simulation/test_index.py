"""The index protocol under every crash point, jobs beside others, and mistakes that must show."""

import pytest

from simulation.index import (
    JOBS,
    IndexCrash,
    count_index_operations,
    draw_index_crash,
    play_index_crash,
)
from simulation.mutants import INDEX_MUTANTS, Mutant
from simulation.schedules import ScheduleError
from simulation.store import DISK, S3

PLACES = [S3, DISK]


@pytest.fixture(autouse=True, scope="module")
def _jobs() -> None:
    """Prepare all jobs with the product as it is, before any mistake is put in place."""
    for place in PLACES:
        for job in JOBS:
            count_index_operations(job, place)


def play_all(schedules: int, *, first: int = 0) -> None:
    for seed in range(first, first + schedules):
        play_index_crash(draw_index_crash(seed))


@pytest.mark.parametrize("job", JOBS)
def test_an_index_job_that_dies_is_made_good_by_the_next(job: str):
    for number in range(1, count_index_operations(job, S3) + 1, 8):  # slow tests: at every one
        for fault in ("crash before", "crash after"):
            play_index_crash(IndexCrash(job, fault, number, seed=number))


def test_index_jobs_beside_others_leave_what_serves_whole():
    play_all(30)


def test_who_was_paused_leaves_the_manifest_that_others_made_serve():
    play_index_crash(IndexCrash("first", "pause", 41, "collect", seed=475))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("job", JOBS)
def test_an_index_job_that_dies_at_any_operation_is_made_good(job: str, place: str):
    for number in range(1, count_index_operations(job, place) + 1):
        for fault in ("crash before", "crash after", "lost reply"):
            play_index_crash(IndexCrash(job, fault, number, seed=number, place=place))


@pytest.mark.slow
def test_hundreds_of_schedules_leave_what_serves_whole():
    play_all(800, first=1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant", [m for m in INDEX_MUTANTS if not m.survives], ids=lambda mutant: mutant.name
)
def test_a_mistake_in_the_index_protocol_is_noticed(mutant: Mutant):
    with mutant.in_place(), pytest.raises(ScheduleError):
        play_all(600)
