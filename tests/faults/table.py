"""What every fault did to the rows, over all trials of a session."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs import assert_same_rows, read_rows

from pipeline import read_embeddings
from pipeline.output.verify import verify_output
from pipeline.storage import Storage

TRIALS = int(os.environ.get("FAULT_TRIALS", "2"))
"""How often the faults with a random moment are tried."""


@dataclass(frozen=True)
class Trial:
    """One fault done to one run, and the rows in the end."""

    fault: str
    rows: int
    lost: int
    doubled: int


@dataclass
class FaultTable:
    """Collects trials; printed at the end of the session."""

    trials: list[Trial] = field(default_factory=list)

    def check(
        self,
        fault: str,
        output: Path | str,
        expected: Mapping[str, Mapping[str, Any]],
        storage: Storage | None = None,
    ) -> None:
        """Book a trial, then check that its output has exactly the rows of an undisturbed run."""
        keys = read_embeddings(str(output), storage).to_table(columns=["key"])["key"].to_pylist()
        lost, doubled = len(set(expected) - set(keys)), len(keys) - len(set(keys))
        self.trials.append(Trial(fault, len(keys), lost, doubled))
        assert_same_rows(read_rows(output, storage), expected)
        assert verify_output(str(output), storage or Storage()).problems == ()

    def to_lines(self) -> list[str]:
        """Return the table, one line a fault."""
        lines = [f"{'fault':<58} {'trials':>6} {'rows':>6} {'lost':>5} {'doubled':>8}"]
        for fault in dict.fromkeys(trial.fault for trial in self.trials):
            own = [trial for trial in self.trials if trial.fault == fault]
            rows, lost = sum(t.rows for t in own), sum(t.lost for t in own)
            doubled = sum(t.doubled for t in own)
            lines.append(f"{fault:<58} {len(own):>6} {rows:>6} {lost:>5} {doubled:>8}")
        return lines
