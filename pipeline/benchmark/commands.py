"""Whole programs, measured from outside: wall-clock time, CPU time of all their processes, memory.

A program's rate is the difference of a long run and a short one: (images of the long run - images
of the short one) / (difference of their times). Start-up cancels out, and it does not matter when a
program writes what. It would matter to a rate between the first and the last output file: whoever
writes in bursts, or at the end, looks faster or slower at random.
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

from pipeline.benchmark.rounds import Sample
from pipeline.errors import AbortError

_TAG = "IMAGE_BENCHMARK_TAG"
_LOOK_EVERY_S = 0.2
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_TAIL_CHARS = 3000


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a program.

    Attributes:
        images: Number of images that it embedded.
        wall_s: Wall-clock time from its start to its end.
        cpu_s: CPU time of all its processes.
        output: What it printed on standard output.
        peak_bytes: Largest anonymous memory of one process by kind: ``driver`` (the program
            itself), ``actor`` and ``task`` (Ray's), ``other``.
    """

    images: int
    wall_s: float
    cpu_s: float
    output: str
    peak_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class RunPair:
    """A short and a long run of one program.

    Attributes:
        short: The run over fewer images.
        long: The run over more images.
    """

    short: Run
    long: Run

    def subtract(self) -> Sample:
        """Return what the additional images of the long run took.

        Raises:
            AbortError: The long run was not longer, by the clock or in CPU time.
        """
        wall_s = self.long.wall_s - self.short.wall_s
        cpu_s = self.long.cpu_s - self.short.cpu_s
        if wall_s <= 0 or cpu_s <= 0:
            raise AbortError(
                f"{self.long.images} images took {self.long.wall_s:.1f} s and "
                f"{self.short.images} took {self.short.wall_s:.1f} s: no rate can be told from "
                "that; measure with more --images"
            )
        return Sample(self.long.images - self.short.images, wall_s, cpu_s)

    @property
    def startup_s(self) -> float:
        """Wall-clock time of the short run that its images do not account for."""
        sample = self.subtract()
        return self.short.wall_s - self.short.images * sample.wall_s / sample.images


def run_program(
    command: Sequence[str],
    *,
    images: int,
    output: Path,
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Run a Python program that embeds ``images`` images into ``output``.

    Args:
        command: Its file and its arguments.
        images: Number of images.
        output: Passed on as ``--output``.
        environment: Variables set for it and the processes it starts.

    Raises:
        AbortError: It failed; the end of what it said is in the message.
    """
    tag = uuid.uuid4().hex
    started_s = time.perf_counter()
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
        wall_s = time.perf_counter() - started_s
    if process.returncode:
        raise AbortError(
            f"{' '.join(command[:2])} ended with exit code {process.returncode}: "
            f"{errors[-_TAIL_CHARS:].strip()}"
        )
    return Run(images, wall_s, watch.cpu_s, said, watch.peak_bytes)


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
        """CPU time of all processes so far, to the last look."""
        return sum(self._cpu_s.values())

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
