"""Untrained weights from a seed, with activations as sane as a trained network's.

Plain random weights let activations vanish or explode over fifty layers. Here the batch norms take
their statistics from a forward pass over synthetic pictures, and the branches beside skips start
small, so that activations keep about unit scale and different pictures get different embeddings.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.backbones.config import BackboneConfig
from pipeline.backbones.cspdarknet import DarkBlock
from pipeline.backbones.efficientnetv2 import FusedInvertedResidual
from pipeline.backbones.fbnetv3 import DepthwiseSeparable
from pipeline.backbones.layers import InvertedResidual

_NUM_CLASSES = 1000
_BRANCH_SCALE = 0.1
_BRANCH_ENDS: dict[type[nn.Module], str] = {
    DarkBlock: "conv2.bn",
    DepthwiseSeparable: "bn2",
    FusedInvertedResidual: "bn2",
    InvertedResidual: "bn3",
}
_PICTURES = 32
_PICTURE_SIZE = 96
_GRID_SIZES = (3, 6, 12, 48, 96)
_DARKEST, _BRIGHTEST = -2.1, 2.6  # of pictures normalised with ImageNet's mean and deviation


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
        for module in network.modules():
            _shrink_branch(module)
        network.train()  # with a momentum of one, a batch's statistics become the running ones
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


def _shrink_branch(module: nn.Module) -> None:
    end = _BRANCH_ENDS.get(type(module))
    if end is not None and getattr(module, "has_skip", True):
        norm = module.get_submodule(end)
        for parameter in norm.parameters():
            parameter.mul_(_BRANCH_SCALE)


def _draw_pictures(generator: torch.Generator) -> Tensor:
    """Return normalised pictures (B, 3, H, W): patches of every size, edges, flat grounds."""

    def draw_share(*shape: int) -> Tensor:
        return torch.rand(_PICTURES, *shape, generator=generator)

    pictures = torch.zeros(_PICTURES, 3, _PICTURE_SIZE, _PICTURE_SIZE)
    for size in _GRID_SIZES:
        colour = torch.randn(_PICTURES, 3, size, size, generator=generator)
        patches = torch.lerp(colour, colour[:, :1], draw_share(1, 1, 1))  # colourful to grey
        shown = draw_share(1, size, size) < draw_share(1, 1, 1)
        pictures += draw_share(1, 1, 1) * F.interpolate(patches * shown, _PICTURE_SIZE)
    tint = 0.3 * torch.randn(_PICTURES, 3, 1, 1, generator=generator)
    ground = torch.lerp(torch.tensor(_DARKEST), torch.tensor(_BRIGHTEST), draw_share(1, 1, 1))
    pictures = pictures * draw_share(1, 1, 1) + ground + tint
    return pictures.clamp(_DARKEST, _BRIGHTEST)
