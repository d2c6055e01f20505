"""What a benchmark found: rates, ratios, what binds, and advice; as JSON and as tables."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.benchmark.rounds import Rate


@dataclass(frozen=True, slots=True)
class ModelFindings:
    """Everything that was measured with one backbone.

    Attributes:
        rates: By contender. ``forward…`` and ``host`` are of one core, or one GPU; ``host-all``
            is of all cores; ``job`` and the whole programs are of the machine.
        ratios: Named quotients, each of figures measured in turns; above 1 the first is faster.
        advice: Sentences on what binds.
    """

    rates: Mapping[str, Rate]
    ratios: Mapping[str, float]
    advice: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """The report of the benchmark job.

    Attributes:
        machine: Processor, cores, GPU, versions, date.
        settings: The effective settings.
        models: Findings by backbone.
    """

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    models: Mapping[str, ModelFindings]
    extras: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {"job": "benchmark"} | asdict(self)

    def to_table(self) -> str:
        """Return the report as Markdown."""
        lines = [", ".join(f"{key} {value}" for key, value in self.machine.items()), ""]
        for model, found in self.models.items():
            lines += [f"### {model}", ""]
            lines += ["| what | images/s | CPU ms/image | start-up s | stages, CPU ms/image |"]
            lines += ["|---|---:|---:|---:|---|"]
            lines += [_describe_rate(name, rate) for name, rate in found.rates.items()]
            lines += ["", "| ratio | |", "|---|---:|"]
            lines += [f"| {name} | {value:.2f} |" for name, value in found.ratios.items()]
            lines += ["", *found.advice, ""]
        return "\n".join(lines)


def _describe_rate(name: str, rate: Rate) -> str:
    stages = ", ".join(f"{stage} {ms:.2f}" for stage, ms in rate.stages_ms.items())
    startup = "" if rate.startup_s is None else f"{rate.startup_s:.1f}"
    return (
        f"| {name} | {rate.images_per_s:.1f} | {rate.cpu_ms_per_image:.2f} | {startup} | {stages} |"
    )


def compare(rates: Mapping[str, Rate]) -> dict[str, float]:
    """Return the quotients that matter among the rates that were measured.

    Those of one core are quotients of CPU times, which other load hardly changes.
    """
    cpu_ms = {name: rate.cpu_ms_per_image for name, rate in rates.items()}
    ratios: dict[str, float] = {}

    def divide(title: str, ours: str, theirs: str) -> None:
        if ours in cpu_ms and theirs in cpu_ms:
            ratios[f"{title} (CPU time)"] = cpu_ms[theirs] / cpu_ms[ours]

    for name in cpu_ms:
        if name.startswith("forward:"):
            divide(f"{name} / timm eager", name, "timm-forward")
    divide("host path / bare Pillow loop", "host", "pillow")
    divide("job / timm + DataLoader", "job", "dataloader")
    divide("job / Ray Data recipe with timm", "job", "ray-recipe")
    for name in ("dataloader", "ray-recipe"):
        if name in rates and "job" in rates:
            title = f"job / {name} (wall clock)"
            ratios[title] = rates["job"].images_per_s / rates[name].images_per_s
    return {name: value for name, value in ratios.items() if math.isfinite(value)}
