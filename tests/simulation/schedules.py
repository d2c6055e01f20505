"""Schedules: a history, what goes wrong and when, and what has to hold in the end."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any

from pipeline.embed_job.run import embed
from pipeline.errors import (
    ConflictError,
    CorruptionError,
    IncompleteError,
    LeaseError,
    StorageError,
)
from pipeline.output.commits import list_commits
from simulation.checks import Watch, check_end, read_part
from simulation.histories import HISTORIES, INPUTS, prepare, run_alone
from simulation.machine import STORAGE, make_config, simulating
from simulation.store import DISK, S3
from simulation.world import FAULTS, WORLDS, FaultKind, Process, World


class ScheduleError(AssertionError):
    """A schedule after which something does not hold; shows its script."""


@dataclass(frozen=True)
class Crash:
    """A run that meets one fault, and what is started after it.

    Attributes:
        history: Name of the history.
        fault: What goes wrong.
        number: At which operation of the run.
        companion: Whether two runs are started after it at once, rather than one.
        same_machine: Whether all runs are on one machine, where a dead one is known to be dead.
        seed: Decides the order of everything else.
        place: Where, and so the kind of store.
    """

    history: str
    fault: FaultKind | None = None
    number: int = 0
    companion: bool = False
    same_machine: bool = True
    seed: int = 0
    place: str = S3

    def faults(self, process: Process, kind: str, uri: str) -> FaultKind | None:
        """Give the fault at its operation."""
        hit = process.name == "run" and process.operations == self.number
        return self.fault if hit else None


def play_crash(crash: Crash) -> World:
    """Play a crash and what follows; return the world.

    Raises:
        ScheduleError: Something does not hold.
    """
    world = World(crash.seed, objects=prepare(crash.history, crash.place), faults=crash.faults)
    settings = HISTORIES[crash.history].settings
    boot = "one machine" if crash.same_machine else ""
    with playing(world, crash):
        Watch(world)
        first = world.start("run", lambda: embed(make_config(crash.place, **settings)), boot=boot)
        world.run(until=lambda: first.paused_until_s > world.now_s)
        names = ["again", "beside"] if crash.companion else ["again"]
        for name in names:
            world.start(name, lambda: embed(make_config(crash.place, **settings)), boot=boot)
        world.run()
        world.settle()
        beside = crash.companion or crash.fault in ("pause", "late")
        if beside:  # each of two may have stopped for the other
            world.start("last", lambda: embed(make_config(crash.place, **settings)), boot=boot)
            world.run()
        check_ends(world, crash.place, allowed=(LeaseError, ConflictError) if beside else ())
    return world


def check_ends(world: World, place: str, *, allowed: Any) -> None:
    """Check that somebody came to the end, that nobody else failed, and what they left."""
    for process in world.processes:
        if process.error is not None and not isinstance(process.error, allowed):
            raise process.error
    assert any(process.result is not None for process in world.processes), "nobody came to an end"
    check_end(world.objects)
    again = run_alone(world.objects, place)
    both = world.objects.keys() | again.keys()
    written = {uri for uri in both if world.objects.get(uri) != again.get(uri)}
    # A report is new each time; a lease may be left by who died over it.
    extra = [uri for uri in written if "/out/runs/" not in uri and not uri.endswith("lease.json")]
    assert not extra, f"a run with nothing to do wrote {extra}"


class playing:  # noqa: N801
    """Make a world the current one; what fails in it is shown with its script."""

    def __init__(self, world: World, script: object) -> None:
        self._world = world
        self._script = script
        self._simulating = simulating()

    def __enter__(self) -> None:
        WORLDS.append(self._world)
        self._simulating.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        self._simulating.__exit__(None, None, None)
        WORLDS.pop()
        if isinstance(error, Exception):
            steps = "\n".join(map(str, self._world.trace))
            raise ScheduleError(
                f"{self._script}\n{steps}\n{type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True)
class Race:
    """Runs that go on at once, beside a reader and somebody who changes the input.

    Attributes:
        seed: Decides everything: the history, who takes part, the order, the faults.
        place: Where, and so the kind of store.
    """

    seed: int
    place: str = S3


_TOLERATED = (LeaseError, ConflictError, StorageError, IncompleteError)
"""What a run may end with when others run beside it and the store fails now and then."""


def play_race(race: Race) -> World:
    """Play a race, then let one run end alone; return the world.

    Raises:
        ScheduleError: Something does not hold.
    """
    dice = random.Random(race.seed)
    history = dice.choice(list(HISTORIES))
    settings = HISTORIES[history].settings
    rate = dice.choice([0.0, 0.01, 0.05, 0.2])
    faults = dice.choice([FAULTS, FAULTS, ("pause", "late"), ("pause",)])
    world = World(
        race.seed,
        objects=prepare(history, race.place),
        faults=lambda *_: dice.choice(faults) if dice.random() < rate else None,
        switching=dice.choice([0.05, 0.3, 0.9]),
    )
    with playing(world, (race, history)):
        watch = Watch(world)
        _start_writers(world, dice, race.place, settings)
        if dice.random() < 0.7 and not HISTORIES[history].damage:
            world.start("reader", lambda: read(watch, race.place))
        if dice.random() < 0.4:
            files = INPUTS[dice.choice(["base", "changed", "grown"])]
            world.start("user", lambda: change_input(race.place, files))
        world.run()
        world.settle()
        for process in world.processes:
            if process.error is not None and not isinstance(process.error, _TOLERATED):
                raise process.error
        world.faults = lambda *_: None
        Watch(world)
        world.start("last", lambda: embed(make_config(race.place, **settings)))
        world.run()
        check_ends(world, race.place, allowed=_TOLERATED)
    return world


def _start_writers(
    world: World, dice: random.Random, place: str, settings: Mapping[str, Any]
) -> None:
    boots = dice.choice([("here", "here", "here"), ("here", "there", "elsewhere")])
    for number in range(dice.choice([1, 2, 2, 3])):
        own = {**settings, "prune": dice.random() < 0.3 or settings.get("prune", False)}
        config = make_config(place, **own)
        world.start(f"writer {number}", lambda config=config: embed(config), boot=boots[number])


def change_input(place: str, files: Mapping[str, bytes]) -> None:
    """Put another input in place of the one there, file by file, as a user would."""
    for uri in [uri for uri in WORLDS[-1].objects if uri.startswith(f"{place}/in/")]:
        if uri.rpartition("/")[2] not in files:
            STORAGE.delete([uri])
    for name, data in files.items():
        STORAGE.put(f"{place}/in/{name}", data)


def read(watch: Watch, place: str) -> None:
    """Read all rows as a reader does, and compare with what was live the whole time."""
    steady = watch.follow()
    rows: dict[str, str] = {}
    try:
        for commit in list_commits(f"{place}/out", STORAGE).values():
            for part in commit.parts:
                for key, _, digest in read_part(STORAGE.read(f"{place}/out/{part.path}"))[1]:
                    assert key not in rows, f"a reader sees two rows of {key}"
                    rows[key] = digest
    except StorageError:  # a file was deleted that it had yet to read; that is no wrong answer
        return
    missing = steady.keys() - rows.keys()
    assert not missing, f"a reader misses {sorted(missing)}, live all the time"


@dataclass(frozen=True)
class Sleep:
    """A run that is paused past its lease while the input changes and another run goes on.

    Attributes:
        history: Name of the history.
        number: The operation before which the run is paused.
        files: Name of the input that takes the place of the history's last.
        prune: Whether the other run prunes.
        seed: Decides the order of everything else.
        place: Where, and so the kind of store.
    """

    history: str
    number: int
    files: str
    prune: bool = False
    seed: int = 0
    place: str = S3

    def faults(self, process: Process, _kind: str, _uri: str) -> FaultKind | None:
        """Give the pause at its operation."""
        return "pause" if (process.name, process.operations) == ("run", self.number) else None


def play_sleep(sleep: Sleep) -> World:
    """Play a pause and what goes on meanwhile, until the run has woken; return the world.

    Raises:
        ScheduleError: Something does not hold.
    """
    place, settings = sleep.place, HISTORIES[sleep.history].settings
    world = World(sleep.seed, objects=prepare(sleep.history, place), faults=sleep.faults)
    with playing(world, sleep):
        watch = Watch(world)
        if sleep.prune:
            # A process that sleeps between its last look at the lease and the write that brings a
            # commit back may do so after another one has pruned its parts. Readers get an error
            # until the next run, which embeds the shard again; only that end is looked at.
            world.watch = lambda _: None
        first = world.start("run", lambda: embed(make_config(place, **settings)))
        world.run(until=lambda: first.paused_until_s > world.now_s)
        change_input(place, INPUTS[sleep.files])
        watch.learn_input()
        world.start("other", lambda: embed(make_config(place, prune=sleep.prune)))
        world.run()
        for process in world.processes:
            # Books do not balance where a commit came from a process that slept over it.
            if not isinstance(process.error, (*_TOLERATED, CorruptionError, NoneType)):
                raise process.error
        world.start("last", lambda: embed(make_config(place)))
        world.run()
        check_ends(world, place, allowed=(*_TOLERATED, CorruptionError))
    return world


Schedule = Crash | Sleep | Race


def draw_schedule(seed: int) -> Schedule:
    """Return one of all schedules, drawn from a seed."""
    dice = random.Random(seed)
    place, history = dice.choice([S3, DISK]), dice.choice(list(HISTORIES))
    kind, number = (
        dice.choice([Crash, Sleep, Race]),
        dice.randint(1, count_operations(history, place)),
    )
    if kind is Crash:
        fault, chances = dice.choice(FAULTS), [dice.random() < 0.5 for _ in range(2)]
        return Crash(history, fault, number, *chances, seed=seed, place=place)
    if kind is Sleep:
        files, prune = dice.choice(list(INPUTS)), dice.random() < 0.5
        return Sleep(history, number, files, prune=prune, seed=seed, place=place)
    return Race(seed, place)


def play(schedule: Schedule) -> World:
    """Play any schedule; return the world as it was in the end.

    Raises:
        ScheduleError: Something does not hold; its text is the script.
    """
    if isinstance(schedule, Crash):
        return play_crash(schedule)
    return play_sleep(schedule) if isinstance(schedule, Sleep) else play_race(schedule)


@cache
def count_operations(history: str, place: str = S3) -> int:
    """Return how many operations the last run of a history makes when nothing goes wrong."""
    world = play_crash(Crash(history, place=place))
    return sum(step.process == "run" for step in world.trace)
