"""Batches of crops: filled by decode processes in place, or gathered from crops made elsewhere."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import RecordError
from pipeline.images.buffers import Buffer, SharedBuffers
from pipeline.images.decode import image_digest
from pipeline.images.decoder import GROUP_IMAGES, Outcome
from pipeline.images.host import Crop
from pipeline.images.pool import Call, DecodePool, Job
from pipeline.records import Embedding, Record

FILLING = 3
"""Batches that processes fill at once, so that none waits for the end of one batch."""

_GROUP_BYTES = 8 * 2**20


@dataclass(slots=True)
class Batch:
    """Crops that are ready for a forward pass, and images that failed beside them.

    Attributes:
        buffer: Holds the crops, in its first rows; None where they lie on a GPU.
        members: Of each crop, the index of its record, and the outcome but for the vector.
        failed: Of each image without a crop, the same.
        seconds: CPU time to ``decode`` and to ``transform`` its images.
        on_gpu: The crops as a tensor there, where a GPU has made them.
    """

    buffer: Buffer | None
    members: list[tuple[int, Embedding]] = field(default_factory=list)
    failed: list[tuple[int, Embedding]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "transform": 0.0})
    on_gpu: Any = None

    @property
    def pixels(self) -> Any:
        """The crops, uint8 (B, S, S, 3): an array, or a tensor where they lie on a GPU."""
        return self.on_gpu if self.buffer is None else self.buffer.pixels[: len(self.members)]


def gather_batches(
    crops: Iterable[Crop | Embedding], buffers: SharedBuffers, batch_size: Callable[[], int]
) -> Iterator[Batch]:
    """Copy crops that were made elsewhere into batches."""
    buffer = buffers.take()
    batch = Batch(buffer)
    for index, crop in enumerate(crops):
        if not isinstance(crop, Crop):
            batch.failed.append((index, crop))
            continue
        buffer.pixels[len(batch.members)] = crop.pixels
        known = Embedding("ok", None, crop.width, crop.height, crop.digest)
        batch.members.append((index, known))
        batch.seconds["decode"] += crop.decode_s
        batch.seconds["transform"] += crop.transform_s
        if len(batch.members) >= batch_size():
            yield batch
            buffer = buffers.take()
            batch = Batch(buffer)
    yield batch


@contextmanager
def fill_batches(
    pool: DecodePool,
    buffers: SharedBuffers,
    records: Sequence[Record],
    batch_size: Callable[[], int],
) -> Iterator[Iterator[Batch]]:
    """Have a pool decode records straight into batches, from now on; yield these as they get ready.

    Whoever takes a batch gives its buffer back.

    Raises:
        ShortageError: This machine has no memory or no process left to decode with.
    """
    filling = _Filling(pool, buffers, records, batch_size)
    try:
        filling.start()
        yield filling.run()
    finally:
        filling.abandon()


def pass_on(record: Record) -> Embedding:
    """Return the outcome of an image that was not even read."""
    return describe_failure(record, RecordError(record.status, record.error or ""))


def describe_failure(record: Record, error: RecordError) -> Embedding:
    """Return the outcome of an image that cannot be embedded."""
    digest = image_digest(record.data) if record.data else None
    return Embedding(error.status, error.reason, digest=digest)


@dataclass(slots=True)
class _Open:
    """A batch that is being filled: the rows that are free, and those that are on their way."""

    batch: Batch
    buffer: Buffer
    free: list[int]
    under_way: int = 0
    rows: list[int] = field(default_factory=list)

    def close(self) -> Batch:
        """Move the last crops into the rows that failed images left, so that there is no hole."""
        rows, pixels = self.rows, self.buffer.pixels
        holes = sorted(set(range(len(rows))) - set(rows))
        for position in [p for p, row in enumerate(rows) if row >= len(rows)]:
            hole = holes.pop()
            pixels[hole] = pixels[rows[position]]
            rows[position] = hole
        order = np.argsort(rows)
        self.batch.members = [self.batch.members[position] for position in order]
        return self.batch


class _Filling:
    """One call's way through the pool: which image goes to which row of which batch.

    A row whose image failed is given to the next image, so batches are full but for the last.
    """

    def __init__(
        self,
        pool: DecodePool,
        buffers: SharedBuffers,
        records: Sequence[Record],
        batch_size: Callable[[], int],
    ) -> None:
        self._pool, self._buffers, self._batch_size = pool, buffers, batch_size
        self._records = records
        self._todo = deque(i for i, record in enumerate(records) if record.status == "ok")
        self._unread = [(i, pass_on(r)) for i, r in enumerate(records) if r.status != "ok"]
        self._open: dict[int, _Open] = {}
        self._call = Call()

    def start(self) -> None:
        """Have the pool begin."""
        self._hand_out()

    def run(self) -> Iterator[Batch]:
        """Yield batches as they get ready."""
        if self._unread:
            yield Batch(self._buffers.take(), failed=self._unread)
        while self._open:
            self._take_in()
            self._hand_out()
            for number in [n for n, item in self._open.items() if self._is_ready(item)]:
                yield self._open.pop(number).close()
                self._hand_out()

    def abandon(self) -> None:
        """Give back the buffers of batches that nobody wants, once no process writes to them."""
        self._call.cancelled = True
        for item in self._open.values():
            while item.under_way:
                jobs, _ = self._call.replies.get()
                self._open[jobs[0].place[0]].under_way -= len(jobs)
            self._buffers.give_back(item.buffer)
        self._open.clear()

    def _is_ready(self, item: _Open) -> bool:
        return not item.under_way and not (item.free and self._todo)

    def _hand_out(self) -> None:
        """Give every free row an image, as far as there are any."""
        while self._todo:
            item = next((item for item in self._open.values() if item.free), None)
            if item is None:
                if len(self._open) == FILLING:
                    return
                item = self._open_batch()
            jobs = self._make_group(item)
            self._pool.submit(jobs, self._call)
            item.under_way += len(jobs)

    def _open_batch(self) -> _Open:
        buffer = self._buffers.take()
        batch = Batch(buffer, failed=self._unread)
        self._unread = []
        rows = list(range(self._batch_size()))[::-1]
        item = self._open[buffer.number] = _Open(batch, buffer, rows)
        return item

    def _make_group(self, item: _Open) -> list[Job]:
        share = len(item.buffer.pixels) // self._pool.processes  # each costs the lock once
        most = max(1, min(share, GROUP_IMAGES, len(item.free)))
        jobs: list[Job] = []
        nbytes = 0
        while self._todo and len(jobs) < most and (not jobs or nbytes < _GROUP_BYTES):
            index = self._todo.popleft()
            record = self._records[index]
            nbytes += len(record.data)
            place = (item.buffer.number, item.free.pop())
            jobs.append(Job(index, record.key, record.data, place))
        return jobs

    def _take_in(self) -> None:
        """Wait for a group, and book its images."""
        jobs, outcomes = self._call.replies.get()
        self._open[jobs[0].place[0]].under_way -= len(jobs)
        if isinstance(outcomes, Exception):
            raise outcomes
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._book(job, outcome)

    def _book(self, job: Job, outcome: Outcome) -> None:
        item = self._open[job.place[0]]
        if outcome.status != "ok":
            known = Embedding(outcome.status, outcome.reason, digest=outcome.digest)
            item.batch.failed.append((job.index, known))
            item.free.append(job.place[1])
            return
        known = Embedding("ok", None, outcome.width, outcome.height, outcome.digest)
        item.batch.members.append((job.index, known))
        item.rows.append(job.place[1])
        item.batch.seconds["decode"] += outcome.decode_s
        item.batch.seconds["transform"] += outcome.transform_s
