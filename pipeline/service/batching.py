"""Micro-batches: what waits together is computed together, in threads, in a bounded queue."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import pyarrow.compute as pc

from pipeline.index.search.generation import Snapshot
from pipeline.index.search.search_index import Neighbour
from pipeline.index.search.where import serialise_where
from pipeline.service.metrics import Metrics
from pipeline.service.problems import overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Result]):
    """Runs waiting items in batches on worker threads while the event loop stays free.

    There is no timer: a free worker takes whatever waits, at most ``max_batch`` items. So a lone
    item starts at once, and batches grow by themselves when work arrives faster than it is done.
    All methods belong to one event loop.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Item]], Sequence[Result | Exception]],
        *,
        max_batch: int,
        max_waiting: int,
        workers: int = 1,
    ) -> None:
        """Start no thread yet; they come with the first items.

        Args:
            name: What the items are, in the plural; for messages and thread names.
            run: Computes a batch. Returns one result per item, in order; an exception in an
                item's place fails that item alone.
            max_batch: Most items in one call of ``run``.
            max_waiting: Most items waiting; more are turned away.
            workers: Batches that may run at the same time.
        """
        self.name = name
        self._run = run
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._idle = workers
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=name)

    def __len__(self) -> int:
        """Return the number of items that no worker has taken yet."""
        return len(self._waiting)

    async def submit(self, item: Item) -> Result:
        """Return the result of ``item``.

        Raises:
            Problem: 503, the queue is full.
        """
        if len(self._waiting) >= self._max_waiting:
            raise overloaded(self.name)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._idle:
            self._idle -= 1
            task = asyncio.create_task(self._drain())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def close(self) -> None:
        """Finish what waits, then stop the threads."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        self._pool.shutdown(wait=False)

    async def _drain(self) -> None:
        try:
            while batch := self._take():
                await self._run_batch(batch)
        finally:
            self._idle += 1

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._max_batch:
            item, future = self._waiting.popleft()
            if not future.done():  # its request was given up: nobody waits for it any more
                batch.append((item, future))
        return batch

    async def _run_batch(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        items = [item for item, _ in batch]
        results: Sequence[Result | Exception]
        try:
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self._pool, self._run, items)
        except Exception as error:
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


@dataclass(frozen=True, slots=True)
class Search:
    """One vector to search for; searches of equal ``group`` run as one.

    Attributes:
        snapshot: Where to search.
        vector: float32, shape (dim,).
        k: Neighbours wanted.
        where: Only rows that fulfil it; compiled.
        exact: Compare with every vector.
    """

    snapshot: Snapshot
    vector: np.ndarray
    k: int
    where: pc.Expression | None
    exact: bool

    @property
    def group(self) -> tuple[object, ...]:
        """What searches have in common that run as one."""
        # The size of k takes part, so that one huge answer does not slow all others down.
        where = None if self.where is None else serialise_where(self.where)
        return self.snapshot, where, self.exact, (self.k - 1).bit_length()


def run_searches(searches: Sequence[Search], metrics: Metrics) -> list[list[Neighbour] | Exception]:
    """Return the neighbours of each search, in order, or why there are none."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, search in enumerate(searches):
        groups.setdefault(search.group, []).append(position)
    answers: list[list[Neighbour] | Exception] = [[] for _ in searches]
    metrics.batch_size.labels("search").observe(len(searches))
    for positions in groups.values():
        with metrics.stage_s.labels("search").time():
            found = _search_group([searches[p] for p in positions])
        for position, hits in zip(positions, found, strict=True):
            answers[position] = hits
    return answers


def _search_group(searches: Sequence[Search]) -> list[list[Neighbour] | Exception]:
    first = searches[0]
    vectors = np.stack([search.vector for search in searches])  # (B, dim)
    k = max(search.k for search in searches)
    try:
        found = first.snapshot.search(vectors, k, first.where, exact=first.exact)
    except Exception as error:  # of this group alone, whatever it is
        return [error] * len(searches)
    return [hits[: search.k] for hits, search in zip(found, searches, strict=True)]
