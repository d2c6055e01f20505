"""Loads that kill the process at work on them: counted, looked into image by image, given up.

A decoder that crashes takes its whole process along, again on every retry. Each attempt therefore
leaves a note on its machine that a process which lives on takes away. A load that has killed
before is decoded in a child process first, and the images that kill the child become rows.
"""

import logging
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.embed_job.wire import Load
from pipeline.errors import ClusterError, RecordError
from pipeline.images.decode import ImageLimits, decode_image
from pipeline.records import Chunk, Record, digest_json

_log = logging.getLogger(__name__)

SUSPECT_DEATHS = 2
"""Deaths of a load's processes from which on its images are tried in a child first."""

FATAL_DEATHS = 5
"""Deaths from which on nobody tries again: it was not a decoder then."""


class Quarantine:
    """Knows on this machine which loads of a run have killed their processes.

    Args:
        run_id: The run.
        limits: What is decoded at all.
    """

    def __init__(self, run_id: str, limits: ImageLimits) -> None:
        self._folder = Path(tempfile.gettempdir()) / f"image-embedding-{run_id}"
        self._limits = limits

    @contextmanager
    def enter(self, load: Load) -> Iterator[Load]:
        """Give the load to work on; images that kill their decoder are marked unreadable in it.

        Raises:
            ClusterError: The load has killed too many processes.
        """
        note = self._folder / digest_json([[s.id, chunk.index] for s, chunk in load.chunks])
        deaths = _read_count(note)
        if deaths >= FATAL_DEATHS:
            names = ", ".join(dict.fromkeys(shard.source for shard, _ in load.chunks))
            raise ClusterError(
                f"{deaths} processes died at work on images of {names}; look into Ray's logs for "
                "the cause (memory, a driver), or leave that source out"
            )
        if deaths >= SUSPECT_DEATHS:
            load = self._mark_deadly(load)
        # The note is a help, not a condition: a full /tmp must not stop a run.
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            note.write_text(str(deaths + 1))
        try:
            yield load
        finally:
            with suppress(OSError):
                note.unlink()
                self._folder.rmdir()  # unless another load's note lies there

    def _mark_deadly(self, load: Load) -> Load:
        records = load.records
        deadly = find_deadly([record.data for record in records], self._limits)
        marked = iter([_mark(r) if i in deadly else r for i, r in enumerate(records)])
        _log.warning("quarantine images=%d deadly=%d", len(records), len(deadly))
        chunks = [(shard, _fill(chunk, marked)) for shard, chunk in load.chunks]
        return replace(load, chunks=chunks)


def _read_count(note: Path) -> int:
    try:
        return int(note.read_text())
    except (OSError, ValueError):
        return 0


def _mark(record: Record) -> Record:
    reason = "it kills the process that decodes it"
    return replace(record, status="unreadable", error=reason)


def _fill(chunk: Chunk, records: Iterator[Record]) -> Chunk:
    return replace(chunk, records=[next(records) for _ in chunk.records])


def find_deadly(images: Sequence[bytes], limits: ImageLimits) -> set[int]:
    """Decode images in a child process, one after the other; return which of them killed it.

    One that takes too long is none of them: a time limit is held over it later.
    """
    deadly: set[int] = set()
    child: _Child | None = None
    for index, data in enumerate(images):
        child = child or _Child(limits)
        try:
            child = child if child.decode(data) else None
        except (EOFError, ConnectionError):
            deadly.add(index)
            child = None
    if child is not None:
        child.end()
    return deadly


class _Child:
    """A process that decodes what it is sent."""

    def __init__(self, limits: ImageLimits) -> None:
        context = multiprocessing.get_context("spawn")
        self._limits = limits
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_decode_all, args=(theirs, limits), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()  # it is up; its start is not the image's time

    def decode(self, data: bytes) -> bool:
        """Return whether it was done in time; the child is gone otherwise.

        Raises:
            EOFError: The child died.
            ConnectionError: The same.
        """
        self._connection.send_bytes(data)
        in_time = self._connection.poll(self._limits.timeout_s)
        if in_time:
            self._connection.recv()
        else:
            self.end()
        return in_time

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _decode_all(connection: Connection, limits: ImageLimits) -> None:
    connection.send(None)
    while True:
        with suppress(RecordError):
            decode_image(connection.recv_bytes(), limits=limits)
        connection.send(None)
