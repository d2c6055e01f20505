"""The two passes of ``ragged.py`` as Triton kernels; only imported where there is Triton."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.images.ragged import Geometry

_BLOCK = 256


def resize(samples: Tensor, geometry: "Geometry") -> Tensor:
    """Resize and crop the pictures of a flat buffer, uint8 (N,), into uint8 (B, S, S, 3)."""
    g = geometry
    pictures, side = g.first_starts.shape
    lines = torch.empty((len(g.owners), side, 3), dtype=torch.uint8, device=samples.device)
    crops = torch.empty((pictures, side, side, 3), dtype=torch.uint8, device=samples.device)
    blocks = triton.cdiv(3 * side, _BLOCK)
    _weigh_samples[(len(g.owners), blocks)](
        samples,
        lines,
        *(g.owners, g.bases, g.alongs, g.channels, g.first_starts, g.first_values),
        *(side, g.first_values.shape[1]),
        block=_BLOCK,
    )
    _weigh_lines[(pictures * side, blocks)](
        lines,
        crops,
        *(g.offsets, g.swapped, g.second_starts, g.second_values),
        *(side, g.second_values.shape[1], len(lines) - 1),
        block=_BLOCK,
    )
    return crops


@triton.jit  # type: ignore[untyped-decorator]
def _weigh_samples(  # type: ignore[no-untyped-def]
    samples,
    lines,
    owners,
    bases,
    alongs,
    channels,
    starts,
    values,
    side,
    taps,
    block: tl.constexpr,
):
    """First pass: one line a program, ``block`` of its 3 S results."""
    line = tl.program_id(0).to(tl.int64)
    result = tl.program_id(1) * block + tl.arange(0, block)
    wanted = result < 3 * side
    output, colour = result // 3, result % 3
    picture = tl.load(owners + line)
    along = tl.load(alongs + picture)
    start = tl.load(starts + picture * side + output, wanted, 0)
    place = tl.load(bases + line) + colour * tl.load(channels + picture) + start * along
    weight = values + picture * taps * side + output
    total = tl.full((block,), 1 << 21, tl.int32)
    for tap in range(taps):
        factor = tl.load(weight + tap * side, wanted, 0)
        # a weight of 0 may stand past the picture's end, where nothing must be read
        sample = tl.load(samples + place + tap * along, wanted & (factor != 0), 0)
        total += factor * sample.to(tl.int32)
    total = tl.minimum(tl.maximum(total >> 22, 0), 255)
    tl.store(lines + line * 3 * side + result, total.to(tl.uint8), wanted)


@triton.jit  # type: ignore[untyped-decorator]
def _weigh_lines(  # type: ignore[no-untyped-def]
    lines,
    crops,
    offsets,
    swapped,
    starts,
    values,
    side,
    taps,
    last,
    block: tl.constexpr,
):
    """Second pass: one row of a crop a program, or one column where the passes are swapped."""
    row = tl.program_id(0).to(tl.int64)
    result = tl.program_id(1) * block + tl.arange(0, block)
    wanted = result < 3 * side
    picture, output = row // side, row % side
    first = tl.load(offsets + picture) + tl.load(starts + row)
    total = tl.full((block,), 1 << 21, tl.int32)
    for tap in range(taps):
        factor = tl.load(values + (picture * taps + tap) * side + output)
        own = tl.minimum(first + tap, last)  # past a picture's own taps the weight is 0
        sample = tl.load(lines + own * 3 * side + result, wanted, 0)
        total += factor * sample.to(tl.int32)
    total = tl.minimum(tl.maximum(total >> 22, 0), 255)
    across, colour = result // 3, result % 3
    turned = tl.load(swapped + picture)
    y, x = across * turned + output * (1 - turned), output * turned + across * (1 - turned)
    tl.store(crops + ((picture * side + y) * side + x) * 3 + colour, total.to(tl.uint8), wanted)
