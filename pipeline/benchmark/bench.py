"""The benchmark job: prepare samples, let contenders take turns, compare."""

import importlib.metadata
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.backbones import find_backbone, list_backbones
from pipeline.benchmark.contenders import start_timm_forward, start_worker
from pipeline.benchmark.drift import measure_drift
from pipeline.benchmark.findings import (
    BenchmarkReport,
    ModelFindings,
    Row,
    compare,
    find_impossible,
)
from pipeline.benchmark.gpu import check_gpu, measure_gpu
from pipeline.benchmark.programs import measure_programs
from pipeline.benchmark.rounds import Contender, Rate, summarise, take_turns
from pipeline.benchmark.samples import collect_images, draw_photograph, write_samples
from pipeline.benchmark.scaling import measure_scaling
from pipeline.benchmark.setting import Setting, count_cores, has_timm, prepare_setting
from pipeline.benchmark.tables import MEASURES, measure_tables
from pipeline.config import BenchmarkConfig, StorageOptions
from pipeline.inference.engines import EngineOptions
from pipeline.log import LOG
from pipeline.storage import Storage

_ROUND_IMAGES = 128  # most images in a round of what is measured in a process of its own
_LARGE_SIZE = (4000, 3000)
_SHARDS_PER_CORE = 4  # so that all cores are busy to the end, and batches are full
_LONG_RUN = 5  # times the images of a program's short run


def benchmark(config: BenchmarkConfig) -> BenchmarkReport:
    """Measure what the settings name.

    Raises:
        SettingsError: The settings are wrong.
        AbortError: Something that was measured failed.
    """
    if "gpu" in config.measure:
        check_gpu()
    with _make_folder(config.work_dir) as folder:
        models = _measure_models(config, folder) if set(config.measure) - set(MEASURES) else {}
        tables = measure_tables(config, folder)
    report = BenchmarkReport(_describe_machine(), asdict(config), models, tables)
    if config.output:
        Storage().put(config.output, json.dumps(report.to_dict(), indent=2).encode())
    return report


def _measure_models(config: BenchmarkConfig, folder: Path) -> dict[str, ModelFindings]:
    images = collect_images(config.input, config.images, StorageOptions())
    number = min(config.images, _ROUND_IMAGES)
    per_shard = max(1, min(256, config.images // (_SHARDS_PER_CORE * count_cores())))
    few = max(1, config.images // _LONG_RUN)
    samples = (
        write_samples(images, number, folder / "round", per_shard=per_shard),
        write_samples(images, few, folder / "short", per_shard=per_shard),
        write_samples(images, config.images, folder / "long", per_shard=per_shard),
    )
    found = {}
    names = list_backbones() if "all" in config.model else config.model
    for model in dict.fromkeys(find_backbone(name).name for name in names):
        setting = prepare_setting(config, model, folder, samples=samples)
        found[model] = _measure(setting)
    return found


@contextmanager
def _make_folder(parent: str | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(setting: Setting) -> ModelFindings:
    rates: dict[str, Rate] = {}
    wanted = setting.config.measure
    if "forward" in wanted:
        rates |= _measure_rounds(_list_forward_contenders(setting), setting)
    if "host" in wanted:
        rates |= _measure_rounds(_list_host_contenders(setting), setting)
    programs, advice = measure_programs(setting)
    rates |= programs
    refused = find_impossible(rates, engine=setting.config.engine[0], cores=setting.devices)
    rates = {name: rate for name, rate in rates.items() if name not in refused}
    advice += tuple(refused.values())
    ratios = compare(
        rates,
        engine=setting.config.engine[0],
        on_gpu=setting.device != "cpu",
    )
    tables: dict[str, list[Row]] = {}
    if "overlap" in wanted:
        from pipeline.benchmark.overlap import profile_overlap  # needs Ray

        tables["One actor beside a device of its speed"] = [profile_overlap(setting)]
    if {"host", "decode"} <= set(wanted):
        tables["Embeddings of decode fast beside those of exact"] = [measure_drift(setting)]
    if "gpu" in wanted:
        tables |= measure_gpu(setting)
    if "scaling" in wanted:
        tables["Scaling"] = [asdict(row) for row in measure_scaling(setting)]
    return ModelFindings(rates, ratios, advice, tables)


def _measure_rounds(contenders: Mapping[str, Contender], setting: Setting) -> dict[str, Rate]:
    samples = take_turns(contenders, setting.config.rounds)
    rates = {name: summarise(found) for name, found in samples.items()}
    for name, rate in rates.items():
        LOG.info("%s %s images_per_s=%.1f", setting.model, name, rate.images_per_s)
    return rates


def _list_forward_contenders(setting: Setting) -> dict[str, Contender]:
    contenders, config = {}, setting.config
    for engine in config.engine:
        options = EngineOptions(
            name=engine,
            device=setting.device,
            precision=config.precision,
            batch_size=setting.batch_size,
            threads=1,
        )
        name = f"forward:{engine}"
        contenders[name] = start_worker("forward", setting, engine=asdict(options))
        if setting.device == "cpu" and engine == config.engine[0]:
            contenders[f"{name}-all"] = start_worker(
                "forward", setting, processes=setting.cores, engine=asdict(options)
            )
    contenders["arithmetic"] = start_worker("arithmetic", setting, engine=asdict(options))
    if has_timm():
        contenders["timm-forward"] = start_timm_forward(setting, form="eager")
        if setting.device != "cpu" or "torch-compile" in config.engine:
            contenders["timm-compiled"] = start_timm_forward(setting, form="compiled")
        if "openvino" in config.engine:
            contenders["timm-openvino"] = start_timm_forward(setting, form="openvino")
    return contenders


def _list_host_contenders(setting: Setting) -> dict[str, Contender]:
    large = write_samples([draw_photograph(0, _LARGE_SIZE)], 2, setting.large, per_shard=2)
    sizes = {"": setting.short, "-large": large}
    contenders = {"host-all": start_worker("host", setting, processes=setting.cores)}
    for suffix, samples in sizes.items():
        spec = asdict(samples)
        contenders[f"host{suffix}"] = start_worker("host", setting, **spec)
        contenders[f"pillow{suffix}"] = start_worker("pillow", setting, **spec)
        if "decode" in setting.config.measure:
            contenders[f"host{suffix}-fast"] = start_worker(
                "host", setting, **spec | {"decode": "fast"}
            )
    return contenders


def _describe_machine() -> dict[str, Any]:
    described = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _name_cpu(),
        "cores": count_cores(),
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
