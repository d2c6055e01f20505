"""Runs of the embed job for tests: settings, rows, and jobs in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import read_embeddings
from pipeline.config import EmbedConfig
from pipeline.storage import Storage

MODEL = "fbnetv3_b.ra2_in1k"
ROOT = Path(__file__).resolve().parents[1]

# Test runs in the background ignore Ctrl-C, and what they start would inherit that.
_RUN_JOB = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("jobs.embed", run_name="__main__", alter_sys=True)
"""


def make_config(
    source: Path | str, output: Path | str, weights: Path, **changes: Any
) -> EmbedConfig:
    """Return settings for a quick run; ``changes`` override them."""
    settings = {"image_size": "64", "actors": 1, "model": MODEL, "weights": str(weights)}
    return EmbedConfig(input=(str(source),), output=str(output), **settings | changes)


def read_rows(output: Path | str, storage: Storage | None = None) -> dict[str, dict[str, Any]]:
    """Return the committed rows by key; no key may occur twice."""
    table = read_embeddings(str(output), storage).to_table()
    rows = {row["key"]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows, "a key occurs more than once"
    return rows


def identify(rows: Mapping[str, Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    """Return what must be equal between two runs over the same input, whatever happened."""
    names = ("key", "shard", "row", "status", "width", "height", "offset", "nbytes", "sha256")
    return {tuple(row[name] for name in names) for row in rows.values()}


def assert_same_rows(
    rows: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Any]]
) -> None:
    """Check that two runs gave the same rows, and embeddings that differ by float noise only."""
    assert identify(rows) == identify(expected)
    for key, row in rows.items():
        if row["embedding"] is not None:
            found, wanted = np.array(row["embedding"]), np.array(expected[key]["embedding"])
            assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted), key


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file under a folder, by its path there."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@dataclass
class Job:
    """An embed job in a process of its own.

    Attributes:
        process: The process; its own process group, so that a signal hits all of it.
        log: Where its standard error goes.
        out: Where its standard output goes.
    """

    process: subprocess.Popen[bytes]
    log: Path
    out: Path

    def kill(self) -> None:
        """End the driver as a power cut would."""
        self.process.kill()
        self.process.wait()

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, timeout_s: float = 120.0) -> int:
        return self.process.wait(timeout_s)

    def report(self) -> dict[str, Any]:
        """Return the last line of its standard output."""
        return json.loads(self.out.read_text().splitlines()[-1])


@contextmanager
def start_job(config: EmbedConfig, folder: Path, **environment: str) -> Iterator[Job]:
    """Start ``jobs/embed.py`` with these settings; it does not outlive the block."""
    settings = folder / "job.toml"
    settings.write_text("\n".join(_write_toml(asdict(config))))
    command = [sys.executable, "-c", _RUN_JOB, "--config", str(settings)]
    log, out = folder / "job.err", folder / "job.out"
    with log.open("wb") as errors, out.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=errors,
            cwd=ROOT,
            env=os.environ | environment,
            start_new_session=True,
        )
    try:
        yield Job(process, log, out)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _write_toml(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines of TOML, in which JSON's strings, numbers and lists are valid."""
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    for name, value in values.items():
        if name not in tables and value is not None:
            yield f"{name} = {json.dumps(value)}"
    for name, table in tables.items():
        yield f"[{name}]"
        yield from _write_toml(table)


def wait_until(condition: Callable[[], object], *, timeout_s: float = 120.0) -> None:
    """Look again and again until ``condition`` holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)


def count_files(output: Path, folder: str) -> int:
    """Return how many finished files lie under a folder of an output."""
    return sum(not path.name.startswith(".") for path in (output / folder).rglob("*.*"))
