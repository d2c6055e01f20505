"""Measurements that need no backbone: each gives rows that print as tables."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.benchmark.commands import run_module
from pipeline.benchmark.findings import Row
from pipeline.benchmark.index_cost import IndexCost, measure_index
from pipeline.benchmark.index_recall import FilterRecall
from pipeline.benchmark.memory import MemoryFindings, measure_memory
from pipeline.config import BenchmarkConfig
from pipeline.index.build.kinds import Selection, tabulate_selection
from pipeline.log import LOG


def measure_tables(config: BenchmarkConfig, folder: Path) -> dict[str, list[Row]]:
    """Measure what is wanted; return rows by the title of their table."""
    tables: dict[str, list[Row]] = {}
    for name, measure in MEASURES.items():
        if name in config.measure:
            own = folder / name
            own.mkdir()
            tables |= measure(config, own)
    return tables


def _measure_memory(config: BenchmarkConfig, folder: Path) -> dict[str, list[Row]]:
    found = measure_memory(folder, scale=config.memory_scale)
    return {"Memory of the embed job": [_describe_memory(case) for case in found]}


def _describe_memory(found: MemoryFindings) -> Row:
    peak_mb = {kind: round(nbytes / 1e6) for kind, nbytes in found.peak_bytes.items()}
    return {
        "input": found.case,
        "images": found.images,
        "shards": found.shards,
        "input MB": round(found.input_bytes / 1e6, 1),
        "rows": _join(found.rows.items()),
        "driver MB": peak_mb.get("driver"),
        "actor MB": peak_mb.get("actor"),
        "read worker MB": peak_mb.get("task"),
    }


def _measure_index(config: BenchmarkConfig, folder: Path) -> dict[str, list[Row]]:
    costs: list[IndexCost] = []
    for rows in config.index_rows:
        LOG.info("index rows=%d dim=%d kinds=%s", rows, config.index_dim, config.index_kind)
        costs += measure_index(rows, config.index_dim, folder=folder, kinds=config.index_kind)
    return {
        "Index": [_describe_index(cost) for cost in costs],
        "Filtered searches": [
            _describe_filter(cost, item) for cost in costs for item in cost.filters
        ],
        "What --kind auto chooses": [_describe_choice(choice) for choice in tabulate_selection()],
    }


def _describe_index(cost: IndexCost) -> Row:
    recall = {f"recall@{k}": _describe_recall(found) for k, found in cost.recall_at.items()}
    return {
        "vectors": cost.rows,
        "kind": cost.kind,
        "search": _join(cost.params.items()),
        **recall,
        "search p50 ms": cost.search.p50_ms,
        "search p99 ms": cost.search.p99_ms,
        "lookup p50 ms": cost.lookup.p50_ms,
        "build CPU s": cost.build_cpu_s,
        "CPU s per million": cost.build_cpu_s_per_million,
        "peak GB": cost.peak_bytes / 1e9,
        "size MB": cost.size_bytes / 1e6,
        "night MB": cost.night_bytes / 1e6,
        "night CPU s": cost.night_cpu_s,
        "rows paged": cost.paging.rows,
        "doubled": cost.paging.doubled,
        "lost": cost.paging.lost,
    }


def _describe_filter(cost: IndexCost, found: FilterRecall) -> Row:
    return {
        "vectors": cost.rows,
        "kind": cost.kind,
        "rows kept": f"{found.share:.1%}",
        "queries": "far from them" if found.against else "among them",
        **{f"recall@{k}": f"{value:.3f}" for k, value in found.recall_at.items()},
        "lookup p50 ms": found.p50_ms,
    }


def _describe_choice(choice: Selection) -> Row:
    return {
        "vectors": choice.rows,
        "dim": choice.dim,
        "memory budget GB": choice.memory_budget_bytes / 1e9,
        "kind": choice.kind,
        "in memory GB": choice.memory_bytes / 1e9,
        "reason": choice.reason,
    }


def _describe_recall(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f}-{found['high']:.3f})"


def _simulate(config: BenchmarkConfig, _: Path) -> dict[str, list[Row]]:
    """Simulate in a process of its own, whose Ray is a cluster of many nodes."""
    simulation = {
        "shards": config.simulated_shards,
        "actors": config.simulated_actors,
        "chunk_s": config.simulated_chunk_s,
    }
    return {"Simulation": [simulation | run_module("pipeline.benchmark.simulation", simulation)]}


MEASURES: Mapping[str, Callable[[BenchmarkConfig, Path], dict[str, list[Row]]]] = {
    "memory": _measure_memory,
    "index": _measure_index,
    "simulation": _simulate,
}
"""Measurements that need no backbone, by their name in ``BenchmarkConfig.measure``."""


def _join(pairs: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs)
