"""The findings of a benchmark: rates, ratios, bottlenecks and advice, as JSON and as tables."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.benchmark.rounds import Rate
from pipeline.records import describe_job

PROGRAMS = ("job", "job-fast", "job-decode-stage", "dataloader", "ray-recipe")
"""Contenders that are whole programs."""

_NOISE = 1.1  # as much as two figures of one thing differ on a machine that others share

Row = Mapping[str, Any]
"""One line of a table, by the titles of its columns."""


@dataclass(frozen=True, slots=True)
class ModelFindings:
    """Everything that was measured with one backbone.

    Attributes:
        rates: By contender. ``forward…`` and ``host`` are of one core, or one GPU; ``host-all``
            is of all cores; ``job`` and the whole programs are of the machine.
        ratios: Named quotients, each of figures measured in turns; above 1 the first is faster.
        advice: Sentences on what binds.
        tables: What else was measured, by title.
    """

    rates: Mapping[str, Rate]
    ratios: Mapping[str, float]
    advice: tuple[str, ...] = ()
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """The report of the benchmark job.

    Attributes:
        machine: Processor, cores, GPU, versions, date.
        settings: The effective settings.
        models: Findings by backbone.
        tables: What was measured once for the machine, by title.
    """

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    models: Mapping[str, ModelFindings]
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return describe_job("benchmark") | asdict(self)

    def to_table(self) -> str:
        """Return the report as Markdown."""
        lines = [", ".join(f"{key} {value}" for key, value in self.machine.items()), ""]
        for model, found in self.models.items():
            lines += [f"### {model}", "", *_render_findings(found)]
        lines += _render_tables(self.tables)
        return "\n".join(lines)


def _render_findings(found: ModelFindings) -> list[str]:
    lines = []
    if found.rates:
        lines += ["| what | images/s | CPU ms/image | start-up s | stages, ms/image |"]
        lines += ["|---|---:|---:|---:|---|"]
        lines += [*(_describe_rate(name, rate) for name, rate in found.rates.items()), ""]
    if found.ratios:
        lines += ["| ratio | |", "|---|---:|"]
        lines += [*(f"| {name} | {value:.2f} |" for name, value in found.ratios.items()), ""]
    return [*lines, *found.advice, "", *_render_tables(found.tables)]


def _render_tables(tables: Mapping[str, Sequence[Row]]) -> list[str]:
    return [
        line
        for title, rows in tables.items()
        for line in (f"### {title}", "", *_render_rows(rows), "")
    ]


def _render_rows(rows: Sequence[Row]) -> list[str]:
    """Return rows as the lines of a Markdown table; columns are those of the first row."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return lines + [
        f"| {' | '.join(_format_value(row.get(name)) for name in names)} |" for row in rows
    ]


def _format_value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _describe_rate(name: str, rate: Rate) -> str:
    stages = ", ".join(f"{stage} {ms:.2f}" for stage, ms in rate.stages_ms.items())
    startup = "" if rate.startup_s is None else f"{rate.startup_s:.1f}"
    return (
        f"| {name} | {rate.images_per_s:.1f} | {rate.cpu_ms_per_image:.2f} | {startup} | {stages} |"
    )


def compare(rates: Mapping[str, Rate], *, engine: str, on_gpu: bool) -> dict[str, float]:
    """Return the quotients that matter among the rates that were measured.

    Those named ``CPU time`` compare the CPU time of an image, which other load on the machine
    hardly changes.

    Args:
        rates: By contender.
        engine: The engine that the job ran with.
        on_gpu: Whether the forward pass ran on a GPU.
    """
    forwards = [n for n in rates if n.startswith("forward:") and not n.endswith("-all")]
    pairs = [
        *itertools.product(forwards, ("timm-forward", "timm-compiled", "arithmetic")),
        ("forward:openvino", "timm-openvino"),
        *(("host", "pillow"), ("host-fast", "pillow")),
        *(("host-large", "pillow-large"), ("host-large-fast", "pillow-large")),
        *(("job", "dataloader"), ("job", "ray-recipe")),
        *(("job-fast", "job"), ("job-decode-stage", "job")),
    ]
    ratios: dict[str, float] = {}
    for ours, theirs in pairs:
        if ours in rates and theirs in rates:
            ratios |= _divide(ours, theirs, rates[ours], rates[theirs])
    everywhere = f"forward:{engine}" if on_gpu else f"forward:{engine}-all"
    if {"job", "host-all", everywhere} <= set(rates):
        job, forward, host = rates["job"], rates[everywhere], rates["host-all"]
        ratios |= _compare_to_ceilings(job, forward, host, shared=not on_gpu)
    return ratios


def find_impossible(rates: Mapping[str, Rate], *, engine: str, cores: int) -> dict[str, str]:
    """Return the programs that beat their own forward pass alone, with a sentence about each.

    Such a figure is a broken measurement, since a program does all that and more.

    Args:
        rates: By contender; ``timm-forward`` is of one core or GPU.
        engine: The engine that the job ran with.
        cores: How many cores, or GPUs, the programs had.
    """
    ours = rates.get(f"forward:{engine}-all") or _multiply(rates.get(f"forward:{engine}"), cores)
    theirs = _multiply(rates.get("timm-forward"), cores)
    programs = [name for name in rates if name in PROGRAMS]
    limits = {name: ours if name.startswith("job") else theirs for name in programs}
    return {
        name: (
            f"{name} came out at {rates[name].images_per_s:.1f} images/s, more than the "
            f"{limit.images_per_s:.1f} of its forward pass alone: a broken measurement, left out; "
            "measure with more --images"
        )
        for name, limit in limits.items()
        if limit is not None and rates[name].images_per_s > _NOISE * limit.images_per_s
    }


def _multiply(rate: Rate | None, factor: int) -> Rate | None:
    return None if rate is None else Rate(rate.images_per_s * factor, rate.cpu_ms_per_image)


def _divide(ours: str, theirs: str, our_rate: Rate, their_rate: Rate) -> dict[str, float]:
    title = f"{ours} / {theirs}"
    return {
        f"{title}, CPU time": their_rate.cpu_ms_per_image / our_rate.cpu_ms_per_image,
        f"{title}, images/s": our_rate.images_per_s / their_rate.images_per_s,
    }


def _compare_to_ceilings(job: Rate, forward: Rate, host: Rate, *, shared: bool) -> dict[str, float]:
    """Compare the job with what forward pass and host path reach alone, on all cores or a GPU.

    Args:
        job: The job.
        forward: The forward pass alone.
        host: Everything else alone.
        shared: Whether both need the same cores, so that neither ceiling can be reached.
    """
    tighter = min(forward.images_per_s, host.images_per_s)
    ratios = {"job / its tighter ceiling, images/s": job.images_per_s / tighter}
    if shared:
        together = 1 / (1 / forward.images_per_s + 1 / host.images_per_s)
        together_ms = forward.cpu_ms_per_image + host.cpu_ms_per_image
        ratios["job / both ceilings on shared cores, images/s"] = job.images_per_s / together
        ratios["job / both ceilings on shared cores, CPU time"] = together_ms / job.cpu_ms_per_image
    return ratios
