"""Loads that kill the process at work on them: counted on its machine, given up in the end.

Decoders run in processes of their own, so what is left are the faults of drivers, and of memory.
Ray would start the process again for ever. Each attempt therefore leaves a note on its machine
that a process which lives on takes away.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.embed_job.wire import Load
from pipeline.errors import ClusterError
from pipeline.records import digest_json

FATAL_DEATHS = 5
"""Deaths of a load's processes from which on nobody tries again."""


@contextmanager
def count_deaths(run_id: str, load: Load) -> Iterator[None]:
    """Work on a load of a run; a process that dies inside has been counted.

    Raises:
        ClusterError: The load has killed too many processes.
    """
    folder = Path(tempfile.gettempdir()) / f"image-embedding-{run_id}"
    note = folder / digest_json([[s.id, chunk.index] for s, chunk in load.chunks])
    deaths = _read_count(note)
    if deaths >= FATAL_DEATHS:
        names = ", ".join(dict.fromkeys(shard.source for shard, _ in load.chunks))
        raise ClusterError(
            f"{deaths} processes died at work on images of {names}; look into Ray's logs for "
            "the cause (memory, a driver), or leave that source out"
        )
    # The note is a help, not a condition: a full /tmp must not stop a run.
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        note.write_text(str(deaths + 1))
    try:
        yield
    finally:
        with suppress(OSError):
            note.unlink()
            folder.rmdir()  # unless another load's note lies there


def _read_count(note: Path) -> int:
    try:
        return int(note.read_text())
    except (OSError, ValueError):
        return 0
