"""Contenders that take turns: each in a process of its own, one round at a time.

On a shared machine a figure taken now and one taken a minute later cannot be compared. So all
contenders are set up first and then measured in turns, back and forth, and medians are compared.
CPU time is kept beside wall-clock time: it hardly depends on what else runs on the machine.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import AbortError

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one contender.

    Attributes:
        images: Number of images.
        wall_s: Wall-clock time.
        cpu_s: CPU time of all its threads and processes.
        stages: CPU time by stage, where the contender tells them apart.
    """

    images: int
    wall_s: float
    cpu_s: float
    stages: Mapping[str, float] = field(default_factory=dict)


def serve_rounds(run_round: Callable[[], tuple[int, Mapping[str, float]]]) -> None:
    """Be a contender: say that set-up is done, then run a round for each line that comes in.

    Args:
        run_round: Does a round; returns the number of images, and seconds by stage.
    """
    print(json.dumps({"ready": time.process_time()}), flush=True)  # noqa: T201
    for _ in sys.stdin:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        images, stages = run_round()
        sample = Sample(
            images, time.perf_counter() - wall_s, time.process_time() - cpu_s, dict(stages)
        )
        print(json.dumps(asdict(sample)), flush=True)  # noqa: T201


class Contender:
    """One or more equal processes that serve rounds, all at once.

    Args:
        command: Python arguments: ``["-m", module, …]`` or ``[script, …]``.
        processes: How many run at a time.
    """

    def __init__(self, command: Sequence[str], *, processes: int = 1) -> None:
        self.startup_cpu_s = 0.0
        self._command = command
        self._processes = [
            subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | _ONE_THREAD,
            )
            for _ in range(processes)
        ]

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def wait_ready(self) -> None:
        """Wait until set-up is done."""
        self.startup_cpu_s = max(self._receive(process)["ready"] for process in self._processes)

    def run_round(self) -> Sample:
        """Let all processes do a round at the same time; their sum is one sample."""
        start_s = time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        samples = [Sample(**self._receive(process)) for process in self._processes]
        stages = {name: sum(s.stages[name] for s in samples) for name in samples[0].stages}
        return Sample(
            sum(s.images for s in samples),
            max(s.wall_s for s in samples) if len(samples) == 1 else time.perf_counter() - start_s,
            sum(s.cpu_s for s in samples),
            stages,
        )

    def _receive(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise AbortError(
                f"the contender {' '.join(self._command[:2])} ended with exit code "
                f"{process.wait()}; its message is above"
            )
        found: dict[str, Any] = json.loads(line)
        return found


def take_turns(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[Sample]]:
    """Set all contenders up, then measure them in turns; the order is reversed every round."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        for contender in contenders.values():
            stack.enter_context(contender).wait_ready()
        for contender in contenders.values():
            contender.run_round()  # warm caches and allocators
        for index in range(rounds):
            order = list(contenders)
            for name in order if index % 2 == 0 else reversed(order):
                samples[name].append(contenders[name].run_round())
    return samples


@dataclass(frozen=True, slots=True)
class Rate:
    """Rate and CPU time of one contender.

    Attributes:
        images_per_s: By the clock on the wall; the median over the rounds.
        cpu_ms_per_image: CPU time of one image, milliseconds; the median over the rounds.
        stages_ms: CPU time of one image by stage, milliseconds.
        startup_s: What a run costs before its first image, apart from the rates; None if unknown.
    """

    images_per_s: float
    cpu_ms_per_image: float
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    startup_s: float | None = None


def summarise(samples: Sequence[Sample], *, startup_s: float | None = None) -> Rate:
    """Return the medians of a contender's rounds."""
    stages = {
        name: 1e3 * statistics.median(s.stages[name] / s.images for s in samples)
        for name in samples[0].stages
    }
    return Rate(
        statistics.median(s.images / s.wall_s for s in samples),
        1e3 * statistics.median(s.cpu_s / s.images for s in samples),
        stages,
        startup_s,
    )
