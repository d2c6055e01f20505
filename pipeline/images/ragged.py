"""The resize of ``resample.py`` for a batch of decoded pictures of any sizes, on any device.

Integer sums of gathered pixels, so a GPU gives the bits that the host gives. All pictures lie in
one flat buffer; where a sample of the upright picture lies in it is an offset and three strides, so
turning a picture costs nothing, and planes are as good as pixels. Only the crops are computed.

On a GPU two Triton kernels do it, one for each pass. Elsewhere, and where Triton is missing, plain
torch does; it takes more memory, and is what the kernels are tested against.
"""

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.images.resample import Axis, Weights, height_goes_first, weigh
from pipeline.images.resize import FILTERS, DataConfig, find_axes
from pipeline.images.turns import TURNS

_WEIGHT_BITS = 22
_KEPT_WEIGHTS = 1024  # photographs of one source have few sizes


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """Where a decoded picture lies in the flat buffer.

    Attributes:
        offset: Its first sample.
        width: Width as stored, pixels.
        height: Height as stored.
        turn: The EXIF orientation that turns it upright.
        planar: All red samples come first, then all green ones; else pixel by pixel.
    """

    offset: int
    width: int
    height: int
    turn: int = 1
    planar: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one picture is resized: lines of the first pass, then the second pass across them.

    Attributes:
        first: Weights of the first pass.
        second: Weights of the second.
        origin: Where the first red sample of the upright picture lies in the flat buffer.
        along: Distance of the inputs of the first pass from each other, in samples.
        across: Distance of the lines from each other, likewise.
        channel: Distance of the three samples of a pixel from each other, likewise.
        height_first: The first pass is the vertical one.
    """

    first: Weights
    second: Weights
    origin: int
    along: int
    across: int
    channel: int
    height_first: bool


@dataclass(frozen=True, slots=True)
class Geometry:
    """The plans of a batch as tensors on one device; B pictures, L lines, crops of side S.

    Attributes:
        owners: The picture of each line, int64 (L,).
        bases: Where each line's first red sample lies in the flat buffer, int64 (L,).
        alongs: ``_Plan.along`` of each picture, int64 (B,).
        channels: ``_Plan.channel`` of each picture, int64 (B,).
        offsets: Where each picture's line 0 lies, or would, among the lines, int64 (B,).
        swapped: Whether the first pass is the vertical one, int64 (B,).
        first_starts: First input of each output of the first pass, int32 (B, S).
        first_values: Its weights, int32 (B, taps, S); 0 past a picture's own taps.
        second_starts: The same of the second pass; its inputs are lines.
        second_values: Likewise.
    """

    owners: Tensor
    bases: Tensor
    alongs: Tensor
    channels: Tensor
    offsets: Tensor
    swapped: Tensor
    first_starts: Tensor
    first_values: Tensor
    second_starts: Tensor
    second_values: Tensor


def resize_and_crop_batch(
    samples: Tensor, pictures: Sequence[StoredPicture], data_config: DataConfig
) -> Tensor:
    """Turn pictures upright, resize their short sides, cut the centre squares.

    Args:
        samples: uint8 (N,): the pictures, one after the other.
        pictures: Where they are.
        data_config: Says the sizes and the filter.

    Returns:
        uint8 (B, S, S, 3), height first, RGB, on the device of ``samples``, with the bits of
        ``resize_and_crop``.
    """
    geometry = lay_out([_plan(picture, data_config) for picture in pictures], samples.device)
    if use_triton(samples.device):
        from pipeline.images import ragged_triton  # imports Triton, which takes a second

        return ragged_triton.resize(samples, geometry)
    return resize_by_torch(samples, geometry)


def has_triton() -> bool:
    """Return whether Triton is installed; it comes with PyTorch's builds for CUDA."""
    return importlib.util.find_spec("triton") is not None


def use_triton(device: torch.device) -> bool:
    """Return whether the kernels can resize on a device."""
    return device.type == "cuda" and has_triton()


def lay_out(plans: Sequence[_Plan], device: torch.device) -> Geometry:
    """Send the plans of a batch to a device."""
    own = np.array(
        [(*p.second.span, p.origin, p.along, p.across, p.channel, p.height_first) for p in plans]
    )
    begins, ends, origins, alongs, acrosses, channels, swapped = own.T
    counts = ends - begins  # the lines that the second pass needs
    offsets = counts.cumsum() - counts - begins
    owners = np.arange(len(plans)).repeat(counts)
    lines = np.arange(len(owners)) - offsets[owners]
    bases = origins[owners] + lines * acrosses[owners]
    tables = (owners, bases, alongs, channels, offsets, swapped)
    first, second = ([getattr(plan, name) for plan in plans] for name in ("first", "second"))
    arrays = (*map(np.ascontiguousarray, tables), *_stack(first), *_stack(second))
    return Geometry(*(torch.from_numpy(a).to(device, non_blocking=True) for a in arrays))


def resize_by_torch(samples: Tensor, geometry: Geometry) -> Tensor:
    """Resize in plain torch, on any device; some 100 bytes a sample are held meanwhile."""
    g = geometry
    owners, colours = g.owners, torch.arange(3, device=samples.device)
    inputs = g.bases[:, None] + g.first_starts[owners] * g.alongs[owners, None]  # (L, S)
    inputs = inputs[..., None] + colours * g.channels[owners, None, None]  # (L, S, 3)
    steps = g.alongs[owners, None, None]
    lines = _weigh_inputs(samples, inputs, steps, g.first_values[owners])
    inputs = g.second_starts + g.offsets[:, None]  # (B, S)
    crops = _weigh_inputs(lines, inputs, torch.ones_like(inputs), g.second_values)
    return torch.where(g.swapped.bool()[:, None, None, None], crops.transpose(1, 2), crops)


def _plan(picture: StoredPicture, data_config: DataConfig) -> _Plan:
    turn = TURNS[picture.turn]
    axes = find_axes(turn.turn_size((picture.width, picture.height)), data_config)
    across, down = (_weigh(axis, data_config.interpolation) for axis in axes)
    pixel, channel = (1, picture.width * picture.height) if picture.planar else (3, 1)
    row = pixel * picture.width
    step_x, step_y = (row, pixel) if turn.transposed else (pixel, row)
    origin = picture.offset
    if turn.mirrored:
        origin, step_x = origin + step_x * (axes[0].length - 1), -step_x
    if turn.flipped:
        origin, step_y = origin + step_y * (axes[1].length - 1), -step_y
    if height_goes_first(axes):
        return _Plan(down, across, origin, step_y, step_x, channel, height_first=True)
    return _Plan(across, down, origin, step_x, step_y, channel, height_first=False)


@functools.lru_cache(_KEPT_WEIGHTS)
def _weigh(axis: Axis, interpolation: str) -> Weights:
    return weigh(axis, FILTERS[interpolation])


def _stack(weights: Sequence[Weights]) -> tuple[np.ndarray, np.ndarray]:
    """Return starts (B, S) and values (B, taps, S), with zeros up to the most taps of any."""
    starts = np.stack([w.starts for w in weights])
    values = np.zeros((len(weights), max(w.taps for w in weights), starts.shape[1]), np.int32)
    for own, w in zip(values, weights, strict=True):
        own[: w.taps] = w.values.T
    return starts, values


def _weigh_inputs(source: Tensor, inputs: Tensor, step: Tensor, values: Tensor) -> Tensor:
    """Weigh items of ``source`` (N, …): those at ``inputs`` and ``step`` apart from there on."""
    result = (*inputs.shape, *source.shape[1:])
    sums = torch.full(result, 1 << (_WEIGHT_BITS - 1), dtype=torch.int32, device=source.device)
    for tap in range(values.shape[1]):
        places = (inputs + tap * step).clamp(0, len(source) - 1)  # past the ends weights are 0
        sums += source[places] * values[:, tap].reshape(
            *values[:, tap].shape, *(1,) * (sums.dim() - 2)
        )
    return (sums >> _WEIGHT_BITS).clamp(0, 255).to(torch.uint8)
