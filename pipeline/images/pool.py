"""Processes that decode for one process: fed in groups, replaced when they die.

A thread keeps each process: hands it two groups at a time, waits, and passes outcomes on to the
call that asked. What happens to a decoder is settled here, once:

==========================  ================================================================
it crashes                  its image is tried once more; the second time it is ``unreadable``
it overruns the time limit  its image is ``unreadable``
it is killed from outside,  its image is tried again, a little later; the fifth time the call
or short of memory          fails, for that is a shortage and no property of an image
==========================  ================================================================

In each case the process is replaced at once, and the other images it held go back to the queue.
"""

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from pipeline.errors import ShortageError
from pipeline.images.buffers import SharedBuffers
from pipeline.images.decode import image_digest
from pipeline.images.decoder import Outcome, Setup
from pipeline.images.process import Death, DecodeProcess

CRASHES = 2
"""Crashes of its decoder that make an image unreadable."""

TRIES = 5
"""How often something is tried for which the machine has no memory or descriptor left."""

_UNDER_WAY = 2  # groups that a process holds, so that it never waits for the next one
_FIRST_PAUSE_S = 0.1
_JOIN_S = 10.0

_REMEDY = "give the machine more memory, or its actors fewer cores, or lower --max-pixels"


@dataclass(slots=True)
class Job:
    """One image on its way through the pool.

    Attributes:
        index: Its position in the call.
        name: What messages call it.
        data: The encoded image.
        place: Buffer and row where its crop goes.
        crashes: How often its decoder crashed.
        shortages: How often its decoder was killed from outside or ran short of memory.
    """

    index: int
    name: str
    data: bytes | memoryview
    place: tuple[int, int]
    crashes: int = 0
    shortages: int = 0


@dataclass(slots=True)
class Call:
    """Who waits for jobs.

    Attributes:
        replies: Jobs with their outcomes, in the order they are done, or why there are none.
        cancelled: Nobody wants the rest; jobs that have not begun come back without outcomes.
    """

    replies: "SimpleQueue[tuple[Sequence[Job], Sequence[Outcome] | Exception]]" = field(
        default_factory=SimpleQueue
    )
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class _Group:
    jobs: Sequence[Job]
    call: Call

    def answer(self, outcomes: Sequence[Outcome] | Exception) -> None:
        self.call.replies.put((self.jobs, outcomes))


_Queue = SimpleQueue[_Group | None]


class DecodePool:
    """Decode processes; several callers may share them.

    They are started at once and end with ``close``, with the pool, and with this process, however
    that ends.

    Args:
        setup: How they decode.
        buffers: Where they write crops.
        processes: How many, at least 1.
    """

    def __init__(self, setup: Setup, buffers: SharedBuffers, *, processes: int) -> None:
        self.processes = processes
        self._queue: _Queue = SimpleQueue()
        self._lock = threading.Lock()
        self._keepers = [
            _Keeper(self._queue, setup, buffers, cell, prefetch_from=processes)
            for cell in range(processes)
        ]
        # keepers do not know the pool, so that one that is dropped without a word ends as well
        self._end = weakref.finalize(self, _end_keepers, self._keepers, self._queue)
        for keeper in self._keepers:
            keeper.thread.start()

    @property
    def pids(self) -> list[int]:
        """Process ids of those that live."""
        return [keeper.process.pid for keeper in self._keepers if keeper.process is not None]

    def submit(self, jobs: Sequence[Job], call: Call) -> None:
        """Queue jobs of a call, at most ``decoder.GROUP_IMAGES`` of them, as one group.

        Raises:
            RuntimeError: The pool is closed.
        """
        with self._lock:
            if not self._end.alive:
                raise RuntimeError("the decode pool is closed; make another one")
            self._queue.put(_Group(jobs, call))

    def close(self) -> None:
        """End the processes; calls under way fail."""
        with self._lock:
            self._end()


def _end_keepers(keepers: "Sequence[_Keeper]", queue: _Queue) -> None:
    for keeper in keepers:
        keeper.stop()
        queue.put(None)
    for keeper in keepers:  # who waits for an answer has it then, even if the interpreter ends
        if keeper.thread is not threading.current_thread():
            keeper.thread.join(_JOIN_S)


class _Keeper:
    """The thread that keeps one decode process alive and busy."""

    def __init__(
        self,
        queue: _Queue,
        setup: Setup,
        buffers: SharedBuffers,
        cell: int,
        *,
        prefetch_from: int,
    ) -> None:
        self.process: DecodeProcess | None = None
        self.thread = threading.Thread(target=self._run, name=f"decode-{cell}", daemon=True)
        self._queue, self._setup, self._buffers, self._cell = queue, setup, buffers, cell
        self._prefetch_from = prefetch_from
        self._under_way: deque[tuple[int, _Group]] = deque()
        self._deaths_at_rest = 0
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Have the thread end soon, whatever its process is at."""
        self._stopped.set()
        if self.process is not None:
            self.process.kill()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # a fault of ours: whoever waits must hear of it
            for _, group in self._under_way:
                group.answer(error)
            while (waiting := self._queue.get()) is not None:
                waiting.answer(error)
        finally:
            if self.process is not None:
                self.process.end()

    def _serve(self) -> None:
        try:
            self.process = self._start()
        except OSError:
            self.process = None  # tried again for the first group, which can fail
        while self._fill():
            assert self.process is not None
            result = self.process.receive()
            if isinstance(result, Death):
                self._bury(result)
            else:
                self._deaths_at_rest = 0
                _, group = self._under_way.popleft()
                group.answer(result)

    def _start(self) -> DecodeProcess:
        return DecodeProcess(self._setup, self._buffers, self._cell)

    def _fill(self) -> bool:
        """Hand over groups, waiting for one if need be; return False when it is time to end."""
        while len(self._under_way) < _UNDER_WAY:
            group = self._take()
            if group is None:
                break
            if group.call.cancelled:
                group.answer([])
            else:
                self._send(group)
        return bool(self._under_way)

    def _take(self) -> _Group | None:
        if not self._under_way:
            return self._queue.get()
        if self._queue.qsize() <= self._prefetch_from:
            return None  # others may be idle
        try:
            group = self._queue.get_nowait()
        except Empty:
            return None
        if group is None:
            self._queue.put(None)  # for whoever it was, or for this one when it is done
        return group

    def _send(self, group: _Group) -> None:
        images = [job.data for job in group.jobs]
        places = [job.place for job in group.jobs]
        for attempt in range(TRIES):
            try:
                if self.process is None:
                    self.process = self._start()
                self._under_way.append((self.process.send(images, places), group))
                return
            except OSError as error:
                failure = error
            if self._pause(attempt):
                break
        words = f"no decode process can be started or fed: {failure}"
        group.answer(ShortageError(f"{words}; tried {TRIES} times: {_REMEDY}"))

    def _pause(self, attempt: int) -> bool:
        return self._stopped.wait(_FIRST_PAUSE_S * 2**attempt)

    def _bury(self, death: Death) -> None:
        """Settle what a dead process leaves behind."""
        self.process = None
        groups, self._under_way = self._under_way, deque()
        self._deaths_at_rest += not death.task
        if self._deaths_at_rest >= TRIES:
            words = f"{TRIES} decode processes in a row ended before they began ({death.words})"
            remedy = _REMEDY if death.cause == "shortage" else "see their words on standard error"
            for _, group in groups:
                group.answer(ShortageError(f"{words}: {remedy}"))
            return
        for number, group in groups:
            rest = list(group.jobs)
            if number == death.task:
                self._judge(_Group([rest.pop(death.index)], group.call), death)
            if rest:
                self._requeue(_Group(rest, group.call))

    def _judge(self, culprit: _Group, death: Death) -> None:
        """Decide what becomes of the image that a process died at."""
        [job] = culprit.jobs
        job.crashes += death.cause == "crashed"
        job.shortages += death.cause == "shortage"
        if death.cause == "overran":
            culprit.answer([_refuse(job, f"decoding took longer than {self._setup.timeout_s:g} s")])
        elif job.crashes >= CRASHES:
            culprit.answer([_refuse(job, f"it kills the process that decodes it ({death.words})")])
        elif job.shortages >= TRIES:
            words = f"the process that decodes {job.name} was ended {TRIES} times ({death.words})"
            culprit.answer(ShortageError(f"{words}, as happens where memory runs out: {_REMEDY}"))
        else:
            if death.cause == "shortage":
                self._pause(job.shortages)
            self._requeue(culprit)

    def _requeue(self, group: _Group) -> None:
        if self._stopped.is_set():
            group.answer(RuntimeError("the decode pool was closed while it decoded"))
        else:
            self._queue.put(group)


def _refuse(job: Job, reason: str) -> Outcome:
    return Outcome("unreadable", reason, digest=image_digest(job.data))
