"""Whole programs, measured from outside: time, CPU time of all their processes, memory.

A program is run on few images and on many. What the additional images cost is its rate; what is
left of the short run is its start-up. Nothing inside the program has to be trusted, or changed.
"""

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pipeline.errors import AbortError

_TAG = "IMAGE_BENCHMARK_TAG"
_SAMPLE_EVERY_S = 0.2
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a program.

    Attributes:
        images: Images it was given.
        wall_s: Wall-clock time.
        cpu_s: CPU time of all its processes, started directly or not.
        output: What it printed on standard output.
        peak_bytes: Largest anonymous memory of one process by kind: ``driver`` (the program
            itself), ``actor`` and ``task`` (Ray's).
    """

    images: int
    wall_s: float
    cpu_s: float
    output: str
    peak_bytes: dict[str, int]


def run_command(command: Sequence[str], *, images: int, tail_chars: int = 3000) -> Run:
    """Run a Python program to its end.

    Raises:
        AbortError: It failed; the end of what it said is in the message.
    """
    tag = uuid.uuid4().hex
    start_s = time.perf_counter()
    with (
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {_TAG: tag, "RAY_USAGE_STATS_ENABLED": "0"},
        ) as process,
        ProcessWatch(tag, process.pid) as watch,
    ):
        output, errors = process.communicate()
        wall_s = time.perf_counter() - start_s
    if process.returncode:
        raise AbortError(
            f"{' '.join(command[:2])} ended with exit code {process.returncode}: "
            f"{errors[-tail_chars:].strip()}"
        )
    return Run(images, wall_s, watch.cpu_s, output, watch.peak_bytes)


class ProcessWatch:
    """Follows all processes with a tag in their environment, whoever their parent is now."""

    def __init__(self, tag: str, driver: int) -> None:
        self.peak_bytes: dict[str, int] = {}
        self._mark = f"{_TAG}={tag}".encode()
        self._driver = driver
        self._cpu_s: dict[int, float] = {}
        self._others: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "ProcessWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        """CPU time of all processes that were ever seen."""
        return sum(self._cpu_s.values())

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_EVERY_S):
            self._look()

    def _look(self) -> None:
        present = {int(name) for name in os.listdir("/proc") if name.isdecimal()}  # noqa: PTH208
        self._others &= present
        for pid in present - self._others:
            try:
                self._look_at(pid)
            except (OSError, ValueError, IndexError):
                continue  # it has just ended

    def _look_at(self, pid: int) -> None:
        folder = Path("/proc") / str(pid)
        environment = (folder / "environ").read_bytes() if pid not in self._cpu_s else self._mark
        if self._mark not in environment.split(b"\0"):
            self._others.add(pid)
            return
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        self._cpu_s[pid] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        title = (folder / "cmdline").read_bytes()
        kind = self._name_kind(pid, title)
        status = (folder / "status").read_text()
        anonymous = int(status.partition("RssAnon:")[2].split()[0]) * 1024
        self.peak_bytes[kind] = max(self.peak_bytes.get(kind, 0), anonymous)

    def _name_kind(self, pid: int, title: bytes) -> str:
        if pid == self._driver:
            return "driver"
        if title.startswith(b"ray::"):
            return "actor" if b"MapWorker" in title else "task"
        return "other"
