"""Whole programs, measured from outside: rate, CPU time of all their processes, memory.

A program writes Parquet files as it goes, or says on standard output how far it is. Its rate is
taken between the first such mark and the last, and what comes before is start-up. Nothing inside
the program has to be trusted.
"""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.benchmark.rounds import Sample
from pipeline.errors import AbortError

_TAG = "IMAGE_BENCHMARK_TAG"
_LOOK_EVERY_S = 0.2
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_TAIL_CHARS = 3000

Marks = list[tuple[float, int]]
"""How far a program was: (seconds since 1970, images done by then), in order."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a program.

    Attributes:
        sample: Images, time and CPU time between the first and the last mark.
        startup_s: Wall-clock time that is not embedding, at the rate between the marks.
        output: What it printed on standard output.
        peak_bytes: Largest anonymous memory of one process by kind: ``driver`` (the program
            itself), ``actor`` and ``task`` (Ray's), ``other``.
    """

    sample: Sample
    startup_s: float
    output: str
    peak_bytes: dict[str, int]


def run_program(
    command: Sequence[str],
    *,
    images: int,
    output: Path,
    workers: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Run a Python program that embeds ``images`` images into ``output``.

    Args:
        command: Its file and its arguments.
        images: Number of images.
        output: Passed on as ``--output``.
        workers: How many processes make progress at the same time.
        environment: Variables set for it and the processes it starts.

    Raises:
        AbortError: It failed; the end of what it said is in the message.
    """
    tag = uuid.uuid4().hex
    started_s = time.time()
    with (
        subprocess.Popen(
            [sys.executable, *command, "--output", str(output)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {_TAG: tag, "RAY_USAGE_STATS_ENABLED": "0"} | dict(environment or {}),
        ) as process,
        ProcessWatch(tag, process.pid) as watch,
    ):
        said, errors = process.communicate()
    if process.returncode:
        raise AbortError(
            f"{' '.join(command[:2])} ended with exit code {process.returncode}: "
            f"{errors[-_TAIL_CHARS:].strip()}"
        )
    marks = read_marks(output) or parse_marks(said)
    sample = take_sample(marks, watch, workers=workers)
    startup_s = marks[-1][0] - started_s - images * sample.wall_s / sample.images
    return Run(sample, startup_s, said, watch.peak_bytes)


def run_module(module: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Run a module of ours with a specification; return the JSON of the last line it prints.

    Raises:
        AbortError: It failed; the end of what it said is in the message.
    """
    command = [sys.executable, "-m", module, json.dumps(spec)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise AbortError(
            f"{module} ended with exit code {ended.returncode}: "
            f"{ended.stderr[-_TAIL_CHARS:].strip()}"
        )
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def read_marks(folder: Path) -> Marks:
    """Return when each Parquet file below a folder was written, and the rows until then."""
    files = sorted(
        (path.stat().st_mtime, pq.read_metadata(path).num_rows)
        for path in folder.rglob("*.parquet")
    )
    totals = np.cumsum([rows for _, rows in files]).tolist()
    return [(time_s, total) for (time_s, _), total in zip(files, totals, strict=True)]


def parse_marks(output: str) -> Marks:
    """Return the marks among what a program printed: lines ``{"time": …, "images": …}``."""
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"time"')]
    return [(line["time"], line["images"]) for line in lines]


def take_sample(marks: Marks, watch: "ProcessWatch", *, workers: int = 1) -> Sample:
    """Return what happened between the first mark of the last worker and the last mark of all.

    When the first of equal workers leaves its first mark, the others are about to, and what they
    have done until then would count as done afterwards.

    Raises:
        AbortError: There are no two marks at different times.
    """
    start = max(0, min(workers, len(marks) - 1) - 1)
    if len(marks) < 2 or marks[-1][0] <= marks[start][0]:
        raise AbortError(f"only {len(marks)} marks of progress; measure with more --images")
    (first_s, before), (last_s, total) = marks[start], marks[-1]
    cpu_s = watch.cpu_until(last_s) - watch.cpu_until(first_s)
    return Sample(total - before, last_s - first_s, cpu_s)


class ProcessWatch:
    """Follows all processes with a tag in their environment, whoever their parent is now."""

    def __init__(self, tag: str, driver: int) -> None:
        self.peak_bytes: dict[str, int] = {}
        self._mark = f"{_TAG}={tag}".encode()
        self._driver = driver
        self._cpu_s: dict[int, float] = {}
        self._totals: list[tuple[float, float]] = [(time.time(), 0.0)]
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

    def cpu_until(self, time_s: float) -> float:
        """Return the CPU time of all processes until then."""
        times, totals = zip(*self._totals, strict=True)
        return float(np.interp(time_s, times, totals))

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        present = {int(name) for name in os.listdir("/proc") if name.isdecimal()}  # noqa: PTH208
        self._others &= present
        for pid in present - self._others:
            try:
                self._look_at(pid)
            except (OSError, ValueError, IndexError):
                continue  # it has just ended
        self._totals.append((time.time(), sum(self._cpu_s.values())))

    def _look_at(self, pid: int) -> None:
        folder = Path("/proc") / str(pid)
        environment = (folder / "environ").read_bytes() if pid not in self._cpu_s else self._mark
        if self._mark not in environment.split(b"\0"):
            self._others.add(pid)
            return
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        self._cpu_s[pid] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        kind = self._name_kind(pid, (folder / "cmdline").read_bytes())
        status = (folder / "status").read_text()
        anonymous = int(status.partition("RssAnon:")[2].split()[0]) * 1024
        self.peak_bytes[kind] = max(self.peak_bytes.get(kind, 0), anonymous)

    def _name_kind(self, pid: int, title: bytes) -> str:
        if pid == self._driver:
            return "driver"
        if title.startswith(b"ray::"):
            return "actor" if b"MapWorker" in title else "task"
        return "other"
