"""Whole programs over the same images, in turns: the job, its variants, its alternatives."""

import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.benchmark.commands import Run, RunPair, run_program
from pipeline.benchmark.rounds import Rate, summarise
from pipeline.benchmark.samples import SampleSet
from pipeline.benchmark.setting import JOBS, Setting, has_timm
from pipeline.log import LOG

VARIANTS = {
    "job-fast": ["--decode", "fast"],
    "job-decode-stage": ["--decode-stage"],
}
"""Variants of the job that ``measure decode`` compares with it, and their arguments."""


def measure_programs(setting: Setting) -> tuple[dict[str, Rate], tuple[str, ...]]:
    """Run the programs that are wanted; return their rates, and the job's own advice."""
    programs = list_programs(setting)
    runs: dict[str, list[RunPair]] = {name: [] for name in programs}
    for index in range(setting.config.rounds):
        order = list(programs)
        for name in order if index % 2 == 0 else reversed(order):
            runs[name].append(_run(name, programs[name], setting))
    rates = {name: _summarise(name, found) for name, found in runs.items()}
    return rates, tuple(_find_advice(runs.get("job", ())))


def list_programs(setting: Setting) -> Mapping[str, Sequence[str]]:
    """Return the programs that are wanted by name, without input and output."""
    wanted = setting.config.measure
    programs: dict[str, list[str]] = {}
    if "job" in wanted or "decode" in wanted:
        programs["job"] = make_job_command(setting)
    if "decode" in wanted:
        programs |= {name: [*programs["job"], *more] for name, more in VARIANTS.items()}
    if has_timm():
        alternatives = _list_alternatives(setting)
        programs |= {name: alternatives[name] for name in alternatives if name in wanted}
    return programs


def make_job_command(setting: Setting) -> list[str]:
    """Return the embed job with the settings of the benchmark, without input and output."""
    config = setting.config
    command = [str(JOBS / "embed.py"), *_name_model(setting), "--engine", config.engine[0]]
    command += ["--image-size", config.image_size, "--precision", config.precision]
    command += ["--decode", config.decode]
    if config.actors:
        command += ["--actors", str(config.actors)]
    return command


def _list_alternatives(setting: Setting) -> dict[str, list[str]]:
    folder, named = JOBS / "baselines", _name_model(setting)
    workers, actors = str(setting.cores), str(max(1, setting.cores // 2))
    return {
        "dataloader": [str(folder / "timm_dataloader.py"), *named, "--workers", workers],
        "ray-recipe": [str(folder / "ray_recipe.py"), *named, "--actors", actors],
    }


def _name_model(setting: Setting) -> list[str]:
    named = ["--model", setting.model, "--weights", setting.weights]
    return [*named, "--batch-size", str(setting.batch_size)]


def run_job(command: Sequence[str], short: SampleSet, long: SampleSet, folder: Path) -> RunPair:
    """Run the job over few and over many samples, into outputs that are removed afterwards."""
    few, many = ([*command, "--input", samples.shards] for samples in (short, long))
    return RunPair(_run_once(few, short, folder), _run_once(many, long, folder))


def _run_once(command: Sequence[str], samples: SampleSet, folder: Path) -> Run:
    output = folder / f"output-{time.monotonic_ns()}"
    run = run_program(command, images=samples.images, output=output)
    shutil.rmtree(output, ignore_errors=True)
    return run


def _run(name: str, command: Sequence[str], setting: Setting) -> RunPair:
    short, long, folder = setting.fewer, setting.samples, setting.folder
    if name.startswith("job"):
        pair = run_job(command, short, long, folder)
    else:
        few, many = ([*command, "--images", samples.files] for samples in (short, long))
        pair = RunPair(_run_once(few, short, folder), _run_once(many, long, folder))
    sample = pair.subtract()
    LOG.info(
        "%s %s images_per_s=%.1f startup_s=%.1f",
        setting.model,
        name,
        sample.images / sample.wall_s,
        pair.startup_s,
    )
    return pair


def _summarise(name: str, runs: Sequence[RunPair]) -> Rate:
    startup_s = statistics.median(pair.startup_s for pair in runs)
    rate = summarise([pair.subtract() for pair in runs], startup_s=startup_s)
    return replace(rate, stages_ms=_read_stages(runs[-1].long)) if name.startswith("job") else rate


def _read_report(run: Run) -> Mapping[str, Any]:
    report: Mapping[str, Any] = json.loads(run.output.splitlines()[-1])
    return report


def _read_stages(run: Run) -> dict[str, float]:
    """Return where the time of an image went by the job's own report, milliseconds."""
    report = _read_report(run)
    images = sum(report["rows"].values())
    return {stage: 1e3 * s / images for stage, s in report["stage_seconds"].items()}


def _find_advice(runs: Sequence[RunPair]) -> Iterator[str]:
    """Yield what the job's own report says of its last run."""
    for pair in runs[-1:]:
        judged = _read_report(pair.long)["efficiency"]
        yield f"{judged['reached']:.0%} of the ceiling by the job's own report; {judged['advice']}."
