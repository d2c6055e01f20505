"""Ceilings, the real job and its alternatives, side by side: ``python jobs/benchmark.py``."""

import sys
from collections.abc import Sequence

from pipeline.benchmark.bench import benchmark
from pipeline.benchmark.findings import BenchmarkReport
from pipeline.cli import run_job
from pipeline.config import BenchmarkConfig
from pipeline.log import configure_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark job; return its exit code."""
    configure_logging()
    return run_job("benchmark", BenchmarkConfig, _measure_and_show, argv)


def _measure_and_show(config: BenchmarkConfig) -> BenchmarkReport:
    report = benchmark(config)
    print(report.to_table())
    return report


if __name__ == "__main__":
    sys.exit(main())
