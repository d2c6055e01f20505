"""Lookups over HTTP, and a page: ``python jobs/serve.py --index URI [--local]``."""

import sys
from collections.abc import Sequence

from pipeline.cli import run_job
from pipeline.config import ServeConfig
from pipeline.service.serve import serve


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped; return the exit code."""
    return run_job("serve", ServeConfig, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
