"""Threads that decode in order, and lose none of their number to a decoder that hangs."""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

from pipeline.errors import RecordError

Item = TypeVar("Item")
Result = TypeVar("Result")

_START_POLL_S = 0.1


class _Task:
    """One call on its way through the pool; its fields change under the pool's lock only."""

    __slots__ = ("call", "error", "result", "settled", "started_s")

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.started_s = 0.0
        self.settled = False
        self.result: Any = None
        self.error: BaseException | None = None

    def settle(self, result: Any = None, error: BaseException | None = None) -> None:
        self.result, self.error, self.settled = result, error, True


class DecodePool:
    """Threads that decode images in order, each image within a time limit.

    The limit counts from the start of an image's own work. A thread that overruns it is left
    behind and replaced, so a decoder that hangs costs its own row and nothing else. (Out of reach
    is one that hangs in native code without giving up the interpreter lock.) The threads are
    daemons and never hold up the end of the process. Several callers may share a pool.

    Attributes:
        abandoned: Number of threads left behind so far.
    """

    def __init__(self, threads: int, *, timeout_s: float = 30.0) -> None:
        """Start the threads; with 0 the caller's own thread decodes and no limit is held."""
        self.abandoned = 0
        self._threads = threads
        self._timeout_s = timeout_s
        self._closed = False
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._running: set[_Task] = set()
        for _ in range(threads):
            self._start_thread()

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the threads end once the queue is empty; does not wait for them."""
        self._closed = True
        for _ in range(self._threads):
            self._queue.put(None)

    def map_images(
        self, items: Iterable[Item], decode: Callable[[Item], Result]
    ) -> Iterator[Result | RecordError]:
        """Yield ``decode(item)`` for each item, in order.

        ``items`` is read ahead by twice the number of threads, no further. A ``RecordError`` that
        ``decode`` raises is yielded in the item's place, and so is one for an image that takes
        too long; any other exception is raised here.

        Raises:
            RuntimeError: The pool is closed.
        """
        if self._closed:
            raise RuntimeError("the decode pool is closed; make another one")
        pending: deque[_Task] = deque()
        try:
            for item in items:
                pending.append(_Task(functools.partial(decode, item)))
                self._submit(pending[-1])
                if len(pending) > 2 * self._threads:
                    yield self._wait(pending.popleft())
            while pending:
                yield self._wait(pending.popleft())
        finally:
            self._cancel(pending)

    def _submit(self, task: _Task) -> None:
        if self._threads:
            self._queue.put(task)
        else:
            task.settle(*_call(task.call))

    def _cancel(self, tasks: Iterable[_Task]) -> None:
        with self._changed:
            for task in tasks:
                if task not in self._running:
                    task.settle()

    def _wait(self, task: _Task) -> Any:
        with self._changed:
            while not task.settled:
                self._changed.wait(self._settle_overdue(task))
        if task.error is None or isinstance(task.error, RecordError):
            return task.error or task.result
        raise task.error

    def _settle_overdue(self, waited_for: _Task) -> float:
        """Give up on calls that overran; return how long to wait before looking again."""
        now_s = time.monotonic()
        overdue = [t for t in self._running if now_s - t.started_s >= self._timeout_s]
        for task in overdue:
            reason = f"decoding took longer than {self._timeout_s:g} s"
            task.settle(error=RecordError("unreadable", reason))
            self._running.remove(task)
            self.abandoned += 1
            self._start_thread()
        if overdue:
            self._changed.notify_all()
        if waited_for.settled:
            return 0.0
        earliest_s = min((task.started_s for task in self._running), default=None)
        if earliest_s is None:
            return min(self._timeout_s, _START_POLL_S)
        return earliest_s + self._timeout_s - now_s

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, name="decode", daemon=True).start()

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            with self._changed:
                if task.settled:
                    continue
                task.started_s = time.monotonic()
                self._running.add(task)
            result, error = _call(task.call)
            with self._changed:
                if task not in self._running:
                    return  # given up on; another thread has taken this one's place
                self._running.remove(task)
                task.settle(result, error)
                self._changed.notify_all()


def _call(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return call(), None
    except BaseException as error:  # handed to the caller's thread, which raises it
        return None, error
