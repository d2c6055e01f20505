"""How far an engine's embeddings are from the reference's, measured on probes and bounded."""

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.errors import SettingsError
from pipeline.images.resize import DataConfig
from pipeline.inference.engines import Engine, EngineOptions, Network, Pixels

_NUM_PROBES = 3
# Of the five backbones resnetv2_50 is the furthest off on a GPU: 0.14 in bf16 and 0.02 in tf32, at
# cosines of 0.996 and 0.99995. Other weights than those of the space: beyond 0.5, below 0.9.
LARGEST_DEVIATION = {"fp32": 1e-3, "tf32": 0.06, "bf16": 0.3, "fp16": 0.06}
_SMALLEST_COSINE = {"fp32": 0.99999, "tf32": 0.999, "bf16": 0.99, "fp16": 0.999}


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far an engine's embeddings are from those of the backbone in plain float32 PyTorch.

    Attributes:
        largest: Largest absolute difference, as a share of the largest absolute value.
        cosine: Smallest cosine over the pictures.
        seconds: Time that measuring it took.
    """

    largest: float
    cosine: float
    seconds: float


def measure_deviation(
    engine: Engine, backbone: nn.Module, data_config: DataConfig, *, reference: str = "fp32"
) -> Deviation:
    """Run a few synthetic pictures through an engine and through the backbone it was made from.

    Args:
        engine: The engine.
        backbone: The backbone as it was created: float32, batch norms in place, on the CPU.
        data_config: Preprocessing of both.
        reference: Precision of the backbone on the CPU; for ``"tf32"``, which no CPU has, fp16
            stands in, whose fractions are as long.
    """
    start_s = time.perf_counter()
    pixels = draw_probes(data_config.image_size)[: engine.batch_size]
    precision = "fp16" if reference == "tf32" else reference
    if precision != "fp32":
        pixels, backbone = pixels[:1], copy.deepcopy(backbone)  # the CPU is slow in it
    network = Network(backbone, data_config, precision=precision, logits=False)
    with torch.no_grad():
        expected = network(torch.from_numpy(pixels))[0].numpy().astype(np.float64)
    found = engine.submit(pixels)().vectors.astype(np.float64)
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    cosines = (expected * found).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return Deviation(
        largest=float(np.abs(expected - found).max() / np.abs(expected).max()),
        cosine=float(cosines.min()),
        seconds=time.perf_counter() - start_s,
    )


def check_deviation(deviation: Deviation, options: EngineOptions, backbone_name: str) -> None:
    """Refuse an engine that computes something else.

    Raises:
        SettingsError: It is further away than its precision explains.
    """
    most, least = LARGEST_DEVIATION[options.precision], _SMALLEST_COSINE[options.precision]
    if deviation.largest <= most and deviation.cosine >= least:  # False for NaN
        return
    raise SettingsError(
        f"engine {options.name} in {options.precision} is off by {deviation.largest:.2g} of the "
        f"largest value (cosine {deviation.cosine:.6f}) for {backbone_name}, measured against "
        f"plain fp32 PyTorch; allowed are {most:g} and {least:g}. Use --engine torch or "
        "--precision fp32"
    )


def draw_probes(image_size: int) -> Pixels:
    """Return synthetic pictures with detail at several scales, uint8 (3, S, S, 3)."""
    rng = np.random.default_rng(0)
    pictures = np.zeros((_NUM_PROBES, image_size, image_size, 3))
    for cell in (1, 8, 64):
        cells = -(-image_size // cell)
        noise = rng.normal(size=(_NUM_PROBES, cells, cells, 3))
        pictures += noise.repeat(cell, 1).repeat(cell, 2)[:, :image_size, :image_size]
    probes: Pixels = np.clip(127.5 + 40 * pictures, 0, 255).astype(np.uint8)
    return probes
