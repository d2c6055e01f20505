"""Untrained weights from a seed, with activations as sane as a trained network's.

Plain random weights let activations vanish or explode over fifty layers. Here the batch norms take
their statistics from a forward pass over synthetic pictures, so that every layer's output has
about unit scale and different pictures get different embeddings.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.backbones.config import BackboneConfig

_NUM_CLASSES = 1000
_PICTURES = 8
_PICTURE_SIZE = 128
_DETAIL_SIZES = (2, 8, 32, 128)


def draw_state_dict(config: BackboneConfig, seed: int) -> dict[str, Tensor]:
    """Return weights for the backbone with its full classifier.

    The same seed gives the same bits on the same machine, whatever the number of threads and the
    state of the global generator.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        network: nn.Module = config.network(config, num_classes=_NUM_CLASSES, features_only=False)
    network.to_empty(device="cpu")
    with _one_thread(), torch.no_grad():
        for module in network.modules():
            _draw(module, generator)
        network.train()  # a momentum of one makes a batch's statistics the running ones
        network(_draw_pictures(generator))
    return network.state_dict()


@contextmanager
def _one_thread() -> Iterator[None]:
    # sums split over threads round differently
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _draw(module: nn.Module, generator: torch.Generator) -> None:
    if isinstance(module, nn.BatchNorm2d):
        module.reset_parameters()
        module.momentum = 1.0
        module.weight.uniform_(0.5, 1.5, generator=generator)
        module.bias.normal_(0.0, 0.2, generator=generator)
    elif isinstance(module, nn.Conv2d | nn.Linear):
        fan_in = module.weight[0].numel()
        module.weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)
        if module.bias is not None:
            module.bias.normal_(0.0, 0.2, generator=generator)


def _draw_pictures(generator: torch.Generator) -> Tensor:
    """Return normalised pictures (B, 3, H, W) with detail at every scale, as photographs have."""
    pictures = torch.zeros(_PICTURES, 3, _PICTURE_SIZE, _PICTURE_SIZE)
    for size in _DETAIL_SIZES:
        noise = torch.randn(_PICTURES, 3, size, size, generator=generator)
        pictures += F.interpolate(noise, _PICTURE_SIZE, mode="bilinear")
    return pictures / math.sqrt(len(_DETAIL_SIZES))
