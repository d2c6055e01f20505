"""Nearest neighbours: ``python jobs/search.py --index URI --key KEY | --image F | --vector F``."""

import sys
import tempfile
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.cli import Report, run_job
from pipeline.config import SearchConfig
from pipeline.index.search.command import find_neighbours, render_report
from pipeline.storage import Storage

HIDDEN_COLUMNS = {"key", "score", "shard", "row", "offset", "nbytes", "sha256", "norm"}
HIDDEN_COLUMNS |= {"width", "height"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the search job; return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_job("search", SearchConfig, search, ["--k" if a == "-k" else a for a in arguments])


def search(config: SearchConfig) -> Report | None:
    """Search and show what was found; return what is to be printed as JSON."""
    report = ask(config)
    if config.json:
        return report
    values = report.to_dict()
    for result in values.get("results", [values]):
        print_table(result["query"], result["neighbours"])
    return None


def ask(config: SearchConfig) -> Report:
    """Search the index, or have a running service search it."""
    if config.url:
        from pipeline.service.remote import ask_service  # needs the serve extra

        return ask_service(config)
    report = find_neighbours(config)
    if config.html or config.open:
        page = Path(config.html or Path(tempfile.mkdtemp("-neighbours"), "neighbours.html"))
        page.write_text(render_report(report, Storage(config.storage)), encoding="utf-8")
        if config.open:
            webbrowser.open(page.resolve().as_uri())
    return report


def print_table(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the neighbours of one query."""
    table = Table(title=f"neighbours of {name}", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("cosine", justify="right")
    table.add_column("key", overflow="fold")
    columns = [column for column in (rows[0] if rows else ()) if column not in HIDDEN_COLUMNS]
    for column in columns:
        table.add_column(column, overflow="ellipsis", max_width=40)
    for rank, row in enumerate(rows, 1):
        cells = ["" if row[column] is None else str(row[column]) for column in columns]
        table.add_row(str(rank), f"{row['score']:.4f}", row["key"], *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
