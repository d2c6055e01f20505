"""Nearest neighbours: ``python jobs/search.py --index URI --key KEY | --image F | --vector F``."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from pipeline.cli import Report, run_job
from pipeline.config import SearchConfig
from pipeline.index.lookup import SearchReport, find_neighbours, render_report
from pipeline.index.search import Neighbour, SearchIndex
from pipeline.index.where import compile_where
from pipeline.storage import Storage

HIDDEN_COLUMNS = {"key", "shard", "row", "offset", "nbytes", "sha256", "norm", "width", "height"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the search job; return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_job("search", SearchConfig, search, ["--k" if a == "-k" else a for a in arguments])


def search(config: SearchConfig) -> Report | None:
    """Search and show what was found; return what is to be printed as JSON."""
    report = find_neighbours(config, read_filter(config))
    if config.html:
        page = render_report(report, Storage(config.storage))
        Path(config.html).write_text(page, encoding="utf-8")
    if config.json:
        return report
    show(report)
    return None


def read_filter(config: SearchConfig) -> pc.Expression | None:
    """Return ``--where`` as an Arrow expression, or None."""
    if config.where is None:
        return None
    index = SearchIndex.open(config.index, Storage(config.storage), cache_dir=config.cache_dir)
    return compile_where(config.where, index.info.columns)


def show(report: SearchReport) -> None:
    """Print one table for each query."""
    console = Console()
    for query, found in zip(report.queries, report.found, strict=True):
        table = Table(title=f"neighbours of {query.name}", title_justify="left")
        table.add_column("#", justify="right")
        table.add_column("cosine", justify="right")
        table.add_column("key", overflow="fold")
        names = [name for name in report.info.columns.names if name not in HIDDEN_COLUMNS]
        for name in names:
            table.add_column(name, overflow="ellipsis", max_width=40)
        for rank, neighbour in enumerate(found, 1):
            table.add_row(str(rank), *_to_cells(neighbour, names))
        console.print(table)


def _to_cells(neighbour: Neighbour, names: Sequence[str]) -> list[str]:
    carried = ["" if neighbour.columns[n] is None else str(neighbour.columns[n]) for n in names]
    return [f"{neighbour.score:.4f}", neighbour.key, *carried]


if __name__ == "__main__":
    sys.exit(main())
