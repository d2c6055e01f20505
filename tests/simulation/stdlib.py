"""Stand-ins for what the product takes from the standard library: time, chance, threads.

Each has the few names that the product uses. They act on the current world, so that one seed
decides all of it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from simulation.world import WORLDS, Killed, Process, current_process


class SimulatedTime:
    """The module ``time``, by the clock of the current world."""

    CLOCK_MONOTONIC = time.CLOCK_MONOTONIC
    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME
    strftime = staticmethod(time.strftime)
    gmtime = staticmethod(time.gmtime)

    def time(self) -> float:
        """Return what the clock on the wall says, which may have jumped."""
        return WORLDS[-1].now_s + WORLDS[-1].clock_off_s

    def monotonic(self) -> float:
        """Return seconds that passed."""
        return WORLDS[-1].now_s

    perf_counter = monotonic

    def clock_gettime(self, _clock: int) -> float:
        """Return seconds that passed."""
        return WORLDS[-1].now_s

    def sleep(self, seconds: float) -> None:
        """Let others go on."""
        WORLDS[-1].sleep(seconds)


class SimulatedUuid:
    """The module ``uuid``, drawn from the seed."""

    class _Drawn:
        def __init__(self, bits: int) -> None:
            self.hex = f"{bits:032x}"

    def uuid4(self) -> "SimulatedUuid._Drawn":
        """Return a random one."""
        return self._Drawn(WORLDS[-1].dice.getrandbits(128))


class SimulatedEvent:
    """``threading.Event``."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Wake who waits."""
        self._set = True

    def is_set(self) -> bool:
        """Tell whether it is set."""
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set."""
        return WORLDS[-1].wait_for(self.is_set, timeout)


class SimulatedLock:
    """``threading.Lock``."""

    def __init__(self) -> None:
        self._free = True

    def __enter__(self) -> None:
        WORLDS[-1].wait_for(lambda: self._free)
        self._free = False

    def __exit__(self, *_: object) -> None:
        self._free = True


class SimulatedThread:
    """``threading.Thread``: a task of the process that starts it."""

    def __init__(self, *, target: Callable[[], object], name: str, daemon: bool) -> None:
        self._target = target

    def start(self) -> None:
        """Begin."""
        self._task = current_process().spawn(self._target)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        WORLDS[-1].wait_for(lambda: self._task.finished, timeout)


class SimulatedThreading:
    """The module ``threading``."""

    Event = SimulatedEvent
    Lock = SimulatedLock
    Thread = SimulatedThread


class SimulatedFuture:
    """``concurrent.futures.Future``."""

    def __init__(self, process: Process, work: Callable[[], Any]) -> None:
        self._outcome: Any = None
        self._error: Exception | None = None

        def run() -> None:
            try:
                self._outcome = work()
            except Exception as error:
                self._error = error

        self._task = process.spawn(run)

    def done(self) -> bool:
        """Tell whether it has ended."""
        return self._task.finished

    def result(self) -> Any:
        """Wait for the outcome."""
        WORLDS[-1].wait_for(self.done)
        if self._error is not None:
            raise self._error
        return self._outcome


class SimulatedPool:
    """``ThreadPoolExecutor``: what is submitted are tasks; ``map`` works one after the other."""

    def __init__(self, *_: object, **__: object) -> None:
        self._futures: list[SimulatedFuture] = []

    def __enter__(self) -> "SimulatedPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not Killed:
            self.shutdown()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> SimulatedFuture:
        """Begin some work."""
        self._futures.append(SimulatedFuture(current_process(), lambda: work(*arguments)))
        return self._futures[-1]

    def map(self, work: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
        """Do some work for each item."""
        return iter([work(*arguments) for arguments in zip(*items, strict=True)])

    def shutdown(self, *, wait: bool = True, cancel_futures: bool = False) -> None:
        """Wait for what was submitted."""
        if wait and not cancel_futures:
            for future in self._futures:
                WORLDS[-1].wait_for(future.done)
