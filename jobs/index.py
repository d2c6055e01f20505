"""Embeddings to an index: ``python jobs/index.py --embeddings URI --index URI``."""

import sys
from collections.abc import Sequence

from pipeline.cli import run_job
from pipeline.config import IndexConfig
from pipeline.index.job import build_index


def main(argv: Sequence[str] | None = None) -> int:
    """Run the index job; return its exit code."""
    return run_job("index", IndexConfig, build_index, argv)


if __name__ == "__main__":
    sys.exit(main())
