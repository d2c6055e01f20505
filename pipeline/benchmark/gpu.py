"""One GPU: bits and deviations first, then rates of forward passes and of whole embedders.

Needs neither Ray nor FAISS; ``--measure job`` beside it measures the job itself.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from pipeline.backbones import create_backbone
from pipeline.benchmark.contenders import start_timm_forward, start_worker
from pipeline.benchmark.findings import Row
from pipeline.benchmark.rounds import Contender, summarise, take_turns
from pipeline.benchmark.setting import Setting, has_timm
from pipeline.errors import SettingsError
from pipeline.images.ragged import StoredPicture, resize_and_crop_batch
from pipeline.images.resize import DataConfig, resize_and_crop
from pipeline.inference.deviation import measure_deviation
from pipeline.inference.engines import EngineOptions, build_engine

_PRECISIONS = ("fp32", "tf32", "bf16")
_ROUND_IMAGES = 4096
_ODD_SIZES = ((500, 375), (375, 500), (33, 1), (1200, 900), (2000, 100), (90, 30), (4000, 3000))
_MOVED_BYTES = 1 << 30
_MOVES = 10


def check_gpu() -> None:
    """Refuse to measure a GPU where there is none.

    Raises:
        SettingsError: PyTorch finds none.
    """
    if not torch.cuda.is_available():
        raise SettingsError("measure gpu needs a GPU, and PyTorch finds none; leave it out")


def measure_gpu(setting: Setting) -> dict[str, list[Row]]:
    """Measure one backbone on one GPU, rates in turns."""
    wrong = count_wrong_bytes(setting.data_config, setting.device)
    checks: list[Row] = [
        {"check": "resize on the GPU, bytes that differ", "found": wrong},
        *_measure_deviations(setting),
        *_measure_memory(),
    ]
    contenders = _list_forward_contenders(setting) | _list_whole_contenders(setting)
    found = take_turns(contenders, setting.config.rounds)
    rates = {name: summarise(samples) for name, samples in found.items()}
    base = rates.get("timm compiled, bf16")
    rows: list[Row] = [
        {
            "what": name,
            "images/s": round(rate.images_per_s),
            "CPU ms an image": f"{rate.cpu_ms_per_image:.3f}",
            "of timm compiled": f"{rate.images_per_s / base.images_per_s:.2f}" if base else None,
            "start s": round(contenders[name].startup_cpu_s),
        }
        for name, rate in rates.items()
    ]
    return {"GPU: checks": checks, "GPU: rates": rows}


def _list_forward_contenders(setting: Setting) -> dict[str, Contender]:
    found = {}
    options = EngineOptions(device=setting.device, batch_size=setting.batch_size, threads=1)
    for precision in _PRECISIONS:
        spec = asdict(replace(options, precision=precision))
        found[f"the card's products, {precision}"] = _start("arithmetic", setting, engine=spec)
        found[f"torch, {precision}"] = _start("forward", setting, engine=spec)
    compiled = replace(options, name="torch-compile", precision="bf16")
    found["torch-compile, bf16"] = _start("forward", setting, engine=asdict(compiled))
    if has_timm():
        for form, precision in (("eager", "fp32"), ("eager", "bf16"), ("compiled", "bf16")):
            found[f"timm {form}, {precision}"] = start_timm_forward(
                setting, form=form, precision=precision, images=_ROUND_IMAGES
            )
    return found


def _list_whole_contenders(setting: Setting) -> dict[str, Contender]:
    """From encoded images in memory to embeddings: what one actor does."""
    engine = EngineOptions(
        "torch", device=setting.device, batch_size=setting.batch_size, precision="bf16"
    )
    return {
        "host path, one core": start_worker("host", setting),
        "Pillow, one core": start_worker("pillow", setting),
        "decode gpu, crops alone": _start("gpu-crops", setting, engine=asdict(engine)),
        "embed, decode gpu, bf16": _start("embed", setting, engine=asdict(engine), decode="gpu"),
        f"embed, {setting.cores} decode processes, bf16": _start(
            "embed", setting, engine=asdict(engine), cores=setting.cores
        ),
    }


def _start(kind: str, setting: Setting, **changed: Any) -> Contender:
    return start_worker(kind, setting, **{"images": _ROUND_IMAGES, **changed})


def count_wrong_bytes(data_config: DataConfig, device: str) -> int:
    """Resize pictures of odd sizes and orientations on a device; compare with the host."""
    rng = np.random.default_rng(0)
    arrays, stored, offset = [], [], 0
    for turn, (width, height) in enumerate(_ODD_SIZES, 1):
        arrays.append(rng.integers(0, 256, (height, width, 3), np.uint8))
        stored.append(StoredPicture(offset, width, height, turn))
        offset += arrays[-1].size
    samples = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    crops = resize_and_crop_batch(samples.to(device), stored, data_config)
    pairs = zip(arrays, stored, crops.cpu().numpy(), strict=True)
    return sum(
        int((resize_and_crop(array, data_config, turn=picture.turn) != crop).sum())
        for array, picture, crop in pairs
    )


def _measure_deviations(setting: Setting) -> list[Row]:
    rows: list[Row] = []
    for precision in (*_PRECISIONS, "fp16"):
        backbone = create_backbone(setting.model, weights=setting.weights, num_classes=0)
        options = EngineOptions(device=setting.device, precision=precision, batch_size=4)
        engine = build_engine(backbone, setting.data_config, options)
        found = measure_deviation(engine, backbone, setting.data_config)
        words = f"{found.largest:.2g} of the largest value, cosine {found.cosine:.6f}"
        rows.append({"check": f"{precision} against fp32 on the CPU", "found": words})
    return rows


def _measure_memory() -> list[Row]:
    """Measure copies inside the GPU, read and written bytes counted, and to it."""
    there, other = (torch.empty(_MOVED_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    here = torch.empty(_MOVED_BYTES, dtype=torch.uint8, pin_memory=True)
    inside = 2 * _MOVED_BYTES / _time_call(lambda: other.copy_(there))
    up = _MOVED_BYTES / _time_call(lambda: there.copy_(here, non_blocking=True))
    return [
        {"check": "memory of the GPU", "found": f"{inside / 1e12:.2f} TB/s"},
        {"check": "pinned memory to the GPU", "found": f"{up / 1e9:.0f} GB/s"},
    ]


def _time_call(call: Callable[[], object]) -> float:
    call()
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(_MOVES):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start_s) / _MOVES
