"""Contenders for a setting: our own workers, and timm's forward pass."""

import json
from dataclasses import asdict
from typing import Any

from pipeline.benchmark.rounds import Contender
from pipeline.benchmark.setting import JOBS, Setting
from pipeline.inference.engines import DTYPES


def start_worker(kind: str, setting: Setting, *, processes: int = 1, **changed: Any) -> Contender:
    """Start a round-serving module of ours; ``changed`` replaces parts of its specification."""
    spec = {
        "model": setting.model,
        "weights": setting.weights,
        "data_config": asdict(setting.data_config),
        "decode": setting.config.decode,
        "exif": "apply",
        "images": setting.short.images,
        "shards": setting.short.shards,
        "files": setting.short.files,
    } | changed
    command = ["-m", "pipeline.benchmark.worker", kind, json.dumps(spec)]
    return Contender(command, processes=processes)


def start_timm_forward(
    setting: Setting, *, form: str, precision: str | None = None, images: int | None = None
) -> Contender:
    """Start timm as it comes, or as fast as its users make it; all in the same precision."""
    spec = {
        "model": setting.model,
        "weights": setting.weights,
        "device": setting.device,
        "dtype": str(DTYPES[precision or setting.config.precision]).removeprefix("torch."),
        "form": form,
        "image_size": setting.data_config.image_size,
        "batch_size": setting.batch_size,
        "images": images or setting.short.images,
    }
    return Contender([str(JOBS / "baselines" / "timm_forward.py"), json.dumps(spec)])
