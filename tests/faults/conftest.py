"""One input and the rows of an undisturbed run over it, which every fault has to end with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pictures import make_hostile_pictures, make_jpeg, write_loose, write_parquet, write_tar
from runs import make_config, read_rows
from table import FaultTable

from pipeline.config import EmbedConfig
from pipeline.embed_job.run import embed

TABLE = FaultTable()
CHUNKS = 36
"""Parts of an undisturbed run, at least; a random moment is a number of parts below this."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TABLE.trials:
        terminalreporter.section("faults")
        for line in TABLE.to_lines():
            terminalreporter.write_line(line)


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to.

    Attributes:
        config: Its settings; a test changes the output.
        rows: Its rows by key.
    """

    config: EmbedConfig
    rows: dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def fault_table() -> FaultTable:
    return TABLE


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, weights: Path, ray_cluster: str
) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_fault_input(folder / "in")
    config = make_config(folder / "in", folder / "out", weights, chunk_images=3, batch_size=4)
    report = embed(config)
    rows = read_rows(config.output)
    assert report.rows["ok"] > 90
    assert report.rows["truncated"] > 0
    return Undisturbed(config, rows)


def write_fault_input(folder: Path) -> None:
    """Write a hundred images and some broken ones, in shards of every kind."""
    folder.mkdir(parents=True)
    for n in range(5):
        members = [(f"{i}.jpg", make_jpeg(100 * n + i)) for i in range(16)]
        write_tar(folder / f"{n}.tar", members)
    hostile = make_hostile_pictures()
    members = [(name, hostile[name].data) for name in ("half.jpg", "html.jpg", "empty.jpg")]
    write_tar(folder / "hostile.tar.gz", members)
    write_parquet(folder / "p.parquet", [make_jpeg(700 + i) for i in range(8)], struct=True)
    write_loose(folder / "loose", {f"{i}.jpg": make_jpeg(800 + i) for i in range(8)})
