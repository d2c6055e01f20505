"""What the job could reach, what it reaches, and what the alternatives reach, in one run."""

from pipeline.benchmark.bench import benchmark
from pipeline.benchmark.findings import BenchmarkReport

__all__ = ["BenchmarkReport", "benchmark"]
