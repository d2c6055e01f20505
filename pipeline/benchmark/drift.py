"""How far embeddings of ``decode fast`` are from those of ``decode exact``."""

import itertools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backbones import create_backbone
from pipeline.benchmark.findings import Row
from pipeline.benchmark.setting import Setting
from pipeline.images.decode import ImageLimits
from pipeline.images.host import CropRecipe, make_crop
from pipeline.images.transforms import normalise

_IMAGES = 16


def measure_drift(setting: Setting) -> Row:
    """Compare both for photographs of 12 megapixels and some of the benchmark's own.

    Returns:
        Number of images, how many of their crops differ at all, the largest difference of a byte,
        and the lowest and the mean cosine of the crops that differ.
    """
    folders = (setting.large, Path(setting.short.files))
    files = itertools.chain(*(sorted(folder.rglob("*.jpg")) for folder in folders))
    images = [path.read_bytes() for path in itertools.islice(files, _IMAGES)]
    exact, fast = (_make_crops(setting, images, fast=fast) for fast in (False, True))
    differences = np.abs(exact.astype(np.int16) - fast).reshape(len(images), -1).max(axis=1)
    changed = differences > 0
    row = {"images": len(images), "crops that differ": int(changed.sum())}
    if not changed.any():
        return row
    one, other = (_embed(setting, crops[changed]) for crops in (exact, fast))
    cosines = torch.nn.functional.cosine_similarity(one, other)
    return row | {
        "largest difference of a byte": int(differences.max()),
        "lowest cosine": f"{float(cosines.min()):.6f}",
        "mean cosine": f"{float(cosines.mean()):.6f}",
    }


def _make_crops(setting: Setting, images: list[bytes], *, fast: bool) -> NDArray[np.uint8]:
    recipe = CropRecipe(setting.data_config, exif="apply", fast=fast, limits=ImageLimits())
    return np.stack([make_crop(data, recipe).pixels for data in images])


def _embed(setting: Setting, crops: NDArray[np.uint8]) -> torch.Tensor:
    backbone = create_backbone(setting.model, weights=setting.weights, num_classes=0)
    with torch.inference_mode():
        vectors: torch.Tensor = backbone(normalise(torch.from_numpy(crops), setting.data_config))
    return vectors
