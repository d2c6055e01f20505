"""The embed protocol under every crash point, many interleavings, and mistakes that must show."""

import pytest

from simulation.histories import HISTORIES, INPUTS
from simulation.mutants import MUTANTS, Mutant
from simulation.schedules import (
    Crash,
    ScheduleError,
    Sleep,
    count_operations,
    draw_schedule,
    play,
    play_crash,
    play_sleep,
)
from simulation.store import DISK, S3
from simulation.world import FAULTS

PLACES = [S3, DISK]


def play_all(schedules: int, *, first: int = 0) -> None:
    for seed in range(first, first + schedules):
        play(draw_schedule(seed))


@pytest.fixture(autouse=True, scope="module")
def _histories() -> None:
    """Make all histories with the product as it is, before any mistake is put in place."""
    for place in PLACES:
        for history in HISTORIES:
            count_operations(history, place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("history", HISTORIES)
def test_a_run_that_dies_is_made_good_by_the_next(history: str, place: str):
    for number in range(1, count_operations(history, place) + 1, 4):  # slow tests: at every one
        for fault in ("crash before", "crash after"):
            play_crash(Crash(history, fault, number, seed=number, place=place))


def test_schedules_of_all_kinds_keep_every_row():
    play_all(300)


def test_a_seed_plays_the_same_schedule_again():
    for seed in (3, 5, 8):
        assert play(draw_schedule(seed)).trace == play(draw_schedule(seed)).trace


def test_a_failing_schedule_shows_its_script():
    with MUTANTS[0].in_place(), pytest.raises(ScheduleError) as caught:
        play_all(100)
    script = str(caught.value)
    assert "Race(seed=" in script or "Crash(history=" in script or "Sleep(history=" in script
    assert "/out/commits/" in script


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("history", HISTORIES)
def test_a_run_that_meets_any_fault_at_any_operation_loses_nothing(history: str, place: str):
    for number in range(1, count_operations(history, place) + 1):
        for fault in FAULTS:
            play_crash(Crash(history, fault, number, seed=number, place=place))
            if fault.startswith("crash"):
                play_crash(Crash(history, fault, number, True, False, number, place))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("history", HISTORIES)
def test_a_run_that_sleeps_past_its_lease_at_any_operation_spoils_nothing(history: str, place: str):
    for number in range(1, count_operations(history, place) + 1):
        for files in INPUTS:
            play_sleep(Sleep(history, number, files, seed=number, place=place))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thousands_of_schedules_keep_every_row():
    play_all(4000, first=1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant", [m for m in MUTANTS if not m.survives], ids=lambda mutant: mutant.name
)
def test_a_mistake_in_the_protocol_is_noticed(mutant: Mutant):
    with mutant.in_place(), pytest.raises(ScheduleError):
        play_all(3000)
