"""A world of simulated processes in one thread: a clock, a scheduler, and faults drawn from a seed.

A process is a greenlet, and switches to the scheduler before each of its operations on the store,
so an operation is a step: nothing else happens during one. What runs next is drawn from the seed.
A process that is killed is unwound without any further operation taking effect, as a dead one
would leave the store.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import greenlet
from botocore.exceptions import ClientError

T = TypeVar("T")

FaultKind = Literal[
    "crash before",  # the process dies, and the operation has no effect
    "crash after",  # the operation takes effect, and the process dies before it hears of it
    "late",  # the process dies, and the operation takes effect some time later
    "lost reply",  # the operation takes effect, and its reply is lost
    "throttle",  # the store is too busy
    "conflict",  # the store is at work on another write of the object: 409
    "short",  # half of the bytes come
    "pause",  # the process stops for longer than its lease lives
    "clock",  # the machine's clock jumps
]
FAULTS: tuple[FaultKind, ...] = FaultKind.__args__  # type: ignore[attr-defined]
WRITES = ("write", "delete")
STEP_S = 0.4  # a run of some fifty steps renews its lease now and then
PAUSE_S = 400.0
LONGEST = 20_000


class Killed(BaseException):
    """The simulated process is dead; nothing that it still does takes effect."""


class StuckError(Exception):
    """A schedule did not end."""


@dataclass(frozen=True)
class Step:
    """One operation on the store.

    Attributes:
        process: Who asked for it.
        number: Position among the process's operations, from 1.
        kind: ``"write"``, ``"read"``, ``"list"``, ``"stat"`` or ``"delete"``.
        uri: Of which object or prefix.
        fault: What went wrong with it.
    """

    process: str
    number: int
    kind: str
    uri: str
    fault: FaultKind | None = None

    def __str__(self) -> str:
        fault = f"  <- {self.fault}" if self.fault else ""
        return f"{self.process:10} {self.number:4} {self.kind:6} {self.uri}{fault}"


class Task(greenlet.greenlet):  # type: ignore[misc]
    """A thread of a simulated process."""

    def __init__(self, process: "Process", run: Callable[[], object]) -> None:
        super().__init__(self._live, parent=process.world.hub)
        self.process = process
        self.wake_s = process.world.now_s
        self.waiting: Callable[[], bool] | None = None
        self.finished = False
        self._work = run

    def _live(self) -> None:
        try:
            self._work()
        except Killed:
            pass
        finally:
            self.finished = True


@dataclass(eq=False)
class Process:
    """A simulated process.

    Attributes:
        world: Where it lives.
        name: For people.
        pid: Its number on the simulated machine.
        boot: The machine it runs on.
        alive: False once it ended or was killed.
        operations: Number of its operations so far.
        result: What its work returned.
        error: What its work raised.
        paused_until_s: It does nothing before.
        state: What a library would keep in the memory of the process.
    """

    world: "World"
    name: str
    pid: int
    boot: str
    alive: bool = True
    operations: int = 0
    result: Any = None
    error: Exception | None = None
    paused_until_s: float = 0.0
    tasks: list[Task] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)

    def spawn(self, run: Callable[[], object]) -> Task:
        """Start another thread of it."""
        task = Task(self, run)
        self.tasks.append(task)
        return task

    def kill(self) -> None:
        """End it at once."""
        self.alive = False
        current = greenlet.getcurrent()
        for task in self.tasks:
            if task is not current and task and not task.finished:
                task.parent = current  # come back here when it is unwound
                task.throw(Killed)


Faults = Callable[[Process, str, str], FaultKind | None]


class World:
    """Processes, the objects of a store, a clock, and one source of chance.

    Args:
        seed: Decides everything.
        objects: The store's content, by URI; copied.
        faults: Tells for each operation what goes wrong with it.
        switching: Probability of going on with another process than the last one's.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        objects: Mapping[str, Any] | None = None,
        faults: Faults = lambda *_: None,
        switching: float = 0.3,
    ) -> None:
        self.dice = random.Random(seed)
        self.objects: dict[str, Any] = dict(objects or {})
        self.faults = faults
        self.now_s = 1.8e9
        self.clock_off_s = 0.0
        self.trace: list[Step] = []
        self.locks: dict[str, Any] = {}
        self.processes: list[Process] = []
        self.watch: Callable[[str], None] = lambda _: None
        self.hub = greenlet.getcurrent()
        self._switching = switching
        self._late: list[tuple[float, str, Callable[[], object]]] = []
        self._last: Task | None = None

    def start(self, name: str, work: Callable[[], object], *, boot: str = "") -> Process:
        """Start a process; it takes its first step when the world runs."""
        pid = 100 + len(self.processes)
        process = Process(self, name, pid, boot or f"machine of {name}")

        def live() -> None:
            try:
                process.result = work()
            except Exception as error:
                process.error = error
            process.kill()

        self.processes.append(process)
        process.spawn(live)
        return process

    def run(self, *, until: Callable[[], bool] = lambda: False) -> None:
        """Let the processes run until all have ended."""
        for _ in range(LONGEST):
            if until() or not any(process.alive for process in self.processes):
                return
            ready = self._find_ready()
            if ready:
                self._last = self._choose(ready)
                self._last.wake_s = self.now_s
                self.now_s += STEP_S
                self._last.switch()
            else:
                self.now_s = self._find_next_s()
            self._carry_out_late()
        raise StuckError(f"{LONGEST} steps and no end")

    def settle(self) -> None:
        """Let what dead processes had sent arrive."""
        for _, uri, effect in self._late:
            self._apply_late(uri, effect)
        self._late.clear()

    def sleep(self, seconds: float) -> None:
        """Let the calling task wait."""
        task = greenlet.getcurrent()
        if isinstance(task, Task):
            self._give_way(task, self.now_s + seconds)

    def wait_for(self, done: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Let the calling task wait until something holds; return whether it does."""
        task = greenlet.getcurrent()
        assert isinstance(task, Task)
        end_s = self.now_s + (1e9 if timeout_s is None else timeout_s)
        while not done() and self.now_s < end_s:
            task.waiting = done
            try:
                self._give_way(task, end_s)
            finally:
                task.waiting = None
        return done()

    def perform(self, kind: str, uri: str, effect: Callable[[], T]) -> T:
        """Carry out one operation of the calling process as one step, or what a fault makes of it.

        Outside of a process it just takes effect.
        """
        task = greenlet.getcurrent()
        if not isinstance(task, Task):
            return effect()
        process = task.process
        self._give_way(task, self.now_s)
        process.operations += 1
        fault = self.faults(process, kind, uri)
        if fault == "late" and (kind not in WRITES or uri.startswith("disk:")):
            fault = "crash after"  # only what travels through a network arrives later
        self.trace.append(Step(process.name, process.operations, kind, uri, fault))
        if fault is None:
            result = effect()
            if kind in WRITES:
                self.watch(uri)
            return result
        return self._perform_faulty(process, self.trace[-1], fault, effect)

    def _perform_faulty(
        self, process: Process, step: Step, fault: FaultKind, effect: Callable[[], T]
    ) -> T:
        if fault == "throttle":
            raise make_error("SlowDown", 503)
        if fault == "conflict":
            raise make_error("ConditionalRequestConflict", 409)
        if fault == "late":
            self._late.append((self.now_s + self.dice.uniform(0, 50), step.uri, effect))
        if fault in ("late", "crash before"):
            process.kill()
            raise Killed
        if fault == "clock":
            self.clock_off_s += self.dice.choice([-7200.0, 7200.0])
        if fault == "pause":  # it wakes, and only then its operation reaches the store
            process.paused_until_s = self.now_s + PAUSE_S
            self._give_way(greenlet.getcurrent(), self.now_s)
        error: Exception | None = None
        try:
            result = effect()
        except Exception as refusal:
            error = refusal
        if step.kind in WRITES:
            self.watch(step.uri)
        if fault == "crash after":
            process.kill()
            raise Killed
        if fault == "lost reply":
            raise ConnectionResetError("the reply was lost")
        if error is not None:
            raise error
        return result

    def _give_way(self, task: Task, wake_s: float) -> None:
        if not task.process.alive:
            raise Killed
        task.wake_s = wake_s
        self.hub.switch()
        if not task.process.alive:
            raise Killed

    def _find_ready(self) -> list[Task]:
        return [
            task
            for process in self.processes
            if process.alive and process.paused_until_s <= self.now_s
            for task in process.tasks
            if not task.finished
            and (task.wake_s <= self.now_s or (task.waiting is not None and task.waiting()))
        ]

    def _choose(self, ready: Sequence[Task]) -> Task:
        if self._last in ready and self.dice.random() >= self._switching:
            return self._last
        return ready[0] if len(ready) == 1 else self.dice.choice(ready)

    def _find_next_s(self) -> float:
        times = [
            max(task.wake_s, process.paused_until_s)
            for process in self.processes
            if process.alive
            for task in process.tasks
            if not task.finished
        ]
        return min([*times, *(when for when, *_ in self._late)])

    def _carry_out_late(self) -> None:
        if not self._late:
            return
        due = [item for item in self._late if item[0] <= self.now_s]
        self._late = [item for item in self._late if item[0] > self.now_s]
        for _, uri, effect in due:
            self._apply_late(uri, effect)

    def _apply_late(self, uri: str, effect: Callable[[], object]) -> None:
        try:
            effect()
        except (ClientError, OSError):
            return
        self.trace.append(Step("(late)", 0, "write", uri))
        self.watch(uri)


def make_error(code: str, status: int) -> ClientError:
    """Return what botocore raises for an answer of S3."""
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "simulated")


WORLDS: list[World] = []
"""The world that simulated stores and clocks belong to: the last one."""


def current_process() -> Process:
    """Return the simulated process that is running."""
    task = greenlet.getcurrent()
    assert isinstance(task, Task), "not in a simulated process"
    return task.process
