"""The resize of ``resample.py`` for a batch of decoded pictures of any sizes, on any device.

Plain torch: integer sums of gathered pixels, so a GPU gives the bits that the host gives. All
pictures lie in one flat buffer; where a pixel of the upright picture lies in it is an offset and
two strides, so turning a picture costs nothing. Only the pixels of the crops are computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.images.resample import Weights, height_goes_first, weigh
from pipeline.images.resize import FILTERS, DataConfig, find_axes
from pipeline.images.turns import TURNS

_WEIGHT_BITS = 22


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """Where a decoded picture lies in the flat buffer.

    Attributes:
        offset: Its first pixel.
        width: Width as stored, pixels.
        height: Height as stored.
        turn: The EXIF orientation that turns it upright.
    """

    offset: int
    width: int
    height: int
    turn: int = 1


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one picture is resized: lines of the first pass, then the second pass across them.

    Attributes:
        first: Weights of the first pass.
        second: Weights of the second.
        origin: Where the first pixel of the upright picture lies in the flat buffer.
        along: Distance of the inputs of the first pass from each other, in pixels of the buffer.
        across: Distance of the lines from each other, likewise.
        height_first: The first pass is the vertical one.
    """

    first: Weights
    second: Weights
    origin: int
    along: int
    across: int
    height_first: bool


def resize_and_crop_batch(
    pixels: Tensor, pictures: Sequence[StoredPicture], data_config: DataConfig
) -> Tensor:
    """Turn pictures upright, resize their short sides, cut the centre squares.

    Args:
        pixels: uint8 (N, 3), RGB: the pixels of all pictures, row by row.
        pictures: Where they are.
        data_config: Says the sizes and the filter.

    Returns:
        uint8 (B, S, S, 3), height first, with the bits of ``resize_and_crop``.
    """
    plans = [_plan(picture, data_config) for picture in pictures]
    device = pixels.device
    first_starts, first_values = _stack([plan.first for plan in plans], device)
    second_starts, second_values = _stack([plan.second for plan in plans], device)
    begins, ends, origins, alongs, acrosses, swapped = torch.tensor(
        [
            (*plan.second.span, plan.origin, plan.along, plan.across, plan.height_first)
            for plan in plans
        ],
        device=device,
    ).T
    counts = ends - begins  # the lines that the second pass needs
    offsets = counts.cumsum(0) - counts  # of each picture's first line among those of all
    owner = torch.repeat_interleave(counts)  # (L,): the picture of each line
    line = torch.arange(len(owner), device=device) + (begins - offsets)[owner]
    bases = origins[owner] + line * acrosses[owner]
    inputs = bases[:, None] + first_starts[owner] * alongs[owner, None]  # (L, S)
    lines = _weigh_inputs(pixels, inputs, alongs[owner, None], first_values[owner])
    inputs = second_starts + (offsets - begins)[:, None]  # (B, S)
    crops = _weigh_inputs(lines, inputs, torch.ones_like(inputs), second_values)
    return torch.where(swapped.bool()[:, None, None, None], crops.transpose(1, 2), crops)


def _plan(picture: StoredPicture, data_config: DataConfig) -> _Plan:
    turn = TURNS[picture.turn]
    axes = find_axes(turn.turn_size((picture.width, picture.height)), data_config)
    across, down = (weigh(axis, FILTERS[data_config.interpolation]) for axis in axes)
    step_x, step_y = (picture.width, 1) if turn.transposed else (1, picture.width)
    origin = picture.offset
    if turn.mirrored:
        origin, step_x = origin + step_x * (axes[0].length - 1), -step_x
    if turn.flipped:
        origin, step_y = origin + step_y * (axes[1].length - 1), -step_y
    if height_goes_first(axes):
        return _Plan(down, across, origin, step_y, step_x, height_first=True)
    return _Plan(across, down, origin, step_x, step_y, height_first=False)


def _stack(weights: Sequence[Weights], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return starts (B, S) and values (B, S, taps), with zeros up to the most taps of any."""
    starts = torch.from_numpy(np.stack([w.starts for w in weights]))
    taps = max(w.taps for w in weights)
    values = torch.zeros(*starts.shape, taps, dtype=torch.int32)
    for i, w in enumerate(weights):
        values[i, :, : w.taps] = torch.from_numpy(w.values)
    return starts.long().to(device), values.to(device)


def _weigh_inputs(source: Tensor, inputs: Tensor, step: Tensor, values: Tensor) -> Tensor:
    """Weigh items of ``source`` (N, …): those at ``inputs`` and ``step`` apart from there on."""
    rest = (1,) * (source.dim() - 1)
    sums = torch.full((*inputs.shape, *source.shape[1:]), 1 << (_WEIGHT_BITS - 1)).int()
    sums = sums.to(source.device)
    for tap in range(values.shape[-1]):
        places = (inputs + tap * step).clamp(0, len(source) - 1)  # past the ends weights are 0
        sums += source[places] * values[..., tap].reshape(*inputs.shape, *rest)
    return (sums >> _WEIGHT_BITS).clamp(0, 255).to(torch.uint8)
