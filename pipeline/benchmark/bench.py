"""The benchmark job: prepare samples, let contenders take turns, compare."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.backbones import list_backbones, load_weights, save_weights
from pipeline.benchmark.commands import Run, run_program
from pipeline.benchmark.findings import BenchmarkReport, ModelFindings, compare
from pipeline.benchmark.rounds import Contender, Rate, summarise, take_turns
from pipeline.benchmark.samples import SampleSet, collect_images, write_samples
from pipeline.config import BenchmarkConfig, StorageOptions
from pipeline.engines import EngineOptions
from pipeline.report import LOG
from pipeline.storage import Storage
from pipeline.transforms import DataConfig, resolve_data_config

_JOBS = Path(__file__).parents[2] / "jobs"
_ROUND_IMAGES = 128  # most images in a round of what is measured in a process of its own
_LOADS_PER_CORE = 8  # so that a program's marks of progress are many


@dataclass(frozen=True, slots=True)
class _Setting:
    """One backbone on one machine, ready to be measured."""

    config: BenchmarkConfig
    model: str
    weights: str
    data_config: DataConfig
    device: str
    cores: int
    short: SampleSet
    samples: SampleSet
    folder: Path

    @property
    def batch_size(self) -> int:
        return self.config.batch_size or (16 if self.device == "cpu" else 128)


def benchmark(config: BenchmarkConfig) -> BenchmarkReport:
    """Measure what the settings name.

    Raises:
        SettingsError: The settings are wrong.
        AbortError: Something that was measured failed.
    """
    models = list_backbones() if "all" in config.model else config.model
    with _make_folder(config.work_dir) as folder:
        images = collect_images(config.input, config.images, StorageOptions())
        number = min(config.images, _ROUND_IMAGES)
        per_shard = max(1, min(256, config.images // (_LOADS_PER_CORE * _count_cores())))
        short = write_samples(images, number, folder / "round", per_shard=per_shard)
        samples = write_samples(images, config.images, folder / "whole", per_shard=per_shard)
        found = {}
        for model in models:
            setting = _prepare(config, model, folder, short=short, samples=samples)
            found[model] = _measure(setting)
    report = BenchmarkReport(_describe_machine(), asdict(config), found)
    if config.output:
        Storage().put(config.output, json.dumps(report.to_dict(), indent=2).encode())
    return report


@contextmanager
def _make_folder(parent: str | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _count_cores() -> int:
    return len(os.sched_getaffinity(0))


def _prepare(
    config: BenchmarkConfig, model: str, folder: Path, *, short: SampleSet, samples: SampleSet
) -> _Setting:
    weights = folder / f"{model}.safetensors"
    save_weights(load_weights(model, config.weights).state_dict, str(weights))
    data_config = resolve_data_config(model, use_test_size=config.image_size == "test")
    if config.image_size.isdecimal():
        data_config = data_config.with_size(int(config.image_size))
    return _Setting(
        config=config,
        model=model,
        weights=str(weights),
        data_config=data_config,
        device="cuda" if torch.cuda.is_available() else "cpu",
        cores=_count_cores(),
        short=short,
        samples=samples,
        folder=folder,
    )


def _measure(setting: _Setting) -> ModelFindings:
    rates: dict[str, Rate] = {}
    wanted = setting.config.measure
    if "forward" in wanted:
        rates |= _measure_rounds(_list_forward_contenders(setting), setting)
    if "host" in wanted:
        rates |= _measure_rounds(_list_host_contenders(setting), setting)
    runs = _run_programs(_list_programs(setting), setting)
    rates |= {name: _summarise_runs(found) for name, found in runs.items()}
    ratios = compare(
        rates,
        engine=setting.config.engine[0],
        cores=setting.cores,
        on_gpu=setting.device != "cpu",
    )
    return ModelFindings(rates, ratios, tuple(_find_advice(runs.get("job", ()))))


def _measure_rounds(contenders: Mapping[str, Contender], setting: _Setting) -> dict[str, Rate]:
    samples = take_turns(contenders, setting.config.rounds)
    rates = {name: summarise(found) for name, found in samples.items()}
    for name, rate in rates.items():
        LOG.info("%s %s images_per_s=%.1f", setting.model, name, rate.images_per_s)
    return rates


def _list_forward_contenders(setting: _Setting) -> dict[str, Contender]:
    contenders = {}
    for engine in setting.config.engine:
        options = EngineOptions(
            name=engine,
            device=setting.device,
            precision=setting.config.precision,
            batch_size=setting.batch_size,
            threads=1,
        )
        contenders[f"forward:{engine}"] = _start_worker("forward", setting, engine=asdict(options))
    if _has_timm():
        contenders["timm-forward"] = _start_timm_forward(setting)
    return contenders


def _list_host_contenders(setting: _Setting) -> dict[str, Contender]:
    return {
        "host": _start_worker("host", setting),
        "pillow": _start_worker("pillow", setting),
        "host-all": _start_worker("host", setting, processes=setting.cores),
    }


def _start_worker(
    kind: str, setting: _Setting, *, processes: int = 1, engine: Mapping[str, Any] | None = None
) -> Contender:
    spec = {
        "model": setting.model,
        "weights": setting.weights,
        "data_config": asdict(setting.data_config),
        "decode": setting.config.decode,
        "exif": "apply",
        "engine": engine,
        "images": setting.short.images,
        "shards": setting.short.shards,
        "files": setting.short.files,
    }
    command = ["-m", "pipeline.benchmark.worker", kind, json.dumps(spec)]
    return Contender(command, processes=processes)


def _start_timm_forward(setting: _Setting) -> Contender:
    spec = {
        "model": setting.model,
        "weights": setting.weights,
        "device": setting.device,
        "dtype": "float32",
        "channels_last": False,
        "compiled": False,
        "image_size": setting.data_config.image_size,
        "batch_size": setting.batch_size,
        "images": setting.short.images,
    }
    return Contender([str(_JOBS / "baselines" / "timm_forward.py"), json.dumps(spec)])


def _has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


def _list_programs(setting: _Setting) -> dict[str, list[str]]:
    """Return the whole programs by name, without input and output."""
    config = setting.config
    own = ["--model", setting.model, "--weights", setting.weights]
    theirs = [*own, "--batch-size", str(setting.batch_size)]
    job = [str(_JOBS / "embed.py"), *theirs, "--engine", config.engine[0]]
    job += ["--image-size", config.image_size, "--precision", config.precision]
    job += ["--decode", config.decode]
    if config.actors:
        job += ["--actors", str(config.actors)]
    programs = {"job": job}
    if _has_timm():
        folder = _JOBS / "baselines"
        workers, actors = str(setting.cores), str(max(1, setting.cores // 2))
        loader = [str(folder / "timm_dataloader.py"), *theirs, "--workers", workers]
        programs["dataloader"] = loader
        programs["ray-recipe"] = [str(folder / "ray_recipe.py"), *theirs, "--actors", actors]
    return {name: command for name, command in programs.items() if name in config.measure}


def _run_programs(programs: Mapping[str, Sequence[str]], setting: _Setting) -> dict[str, list[Run]]:
    """Run whole programs in turns."""
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    for index in range(setting.config.rounds):
        order = list(programs)
        for name in order if index % 2 == 0 else reversed(order):
            runs[name].append(_run_program(name, programs[name], setting))
    return runs


def _summarise_runs(runs: Sequence[Run]) -> Rate:
    startup_s = statistics.median(run.startup_s for run in runs)
    return summarise([run.sample for run in runs], startup_s=startup_s)


def _find_advice(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what the job's own report says of its last run."""
    for run in runs[-1:]:
        judged = json.loads(run.output.splitlines()[-1])["efficiency"]
        yield f"{judged['reached']:.0%} of the ceiling by the job's own report; {judged['advice']}."


def _run_program(name: str, command: Sequence[str], setting: _Setting) -> Run:
    output = setting.folder / f"output-{time.monotonic_ns()}"
    samples = setting.samples
    given = ["--input", samples.shards] if name == "job" else ["--images", samples.files]
    run = run_program([*command, *given], images=samples.images, output=output)
    shutil.rmtree(output, ignore_errors=True)
    LOG.info(
        "%s %s images_per_s=%.1f startup_s=%.1f",
        setting.model,
        name,
        run.sample.images / run.sample.wall_s,
        run.startup_s,
    )
    return run


def _describe_machine() -> dict[str, Any]:
    described = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _name_cpu(),
        "cores": _count_cores(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "pillow", "ray", "timm", "openvino"):
        try:
            described[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return described


def _name_cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
