"""Pillow's resize, for the pixels of a crop alone.

Pillow computes the whole resized picture, of which a crop keeps two thirds, or of a long strip next
to nothing: 1 x 65,500 pixels, resized to a short side of 256, have 16 million rows. It can start
inside a picture only at float32 positions, which moves the sampling grid. So its arithmetic is
restated here, for the wanted rows and columns: filter weights in float64, rounded to 22 bits; sums
in integers; 8 bits between the two passes. The bits are those of a whole resize.

``kernel.c`` does the same an order of magnitude faster. It is compiled when the package is built,
where there is a compiler; NumPy does the work where it is missing.
"""

import ctypes
import functools
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.images.turns import Pixels, Turn

_BAND_PIXELS = 1 << 20
_WEIGHT_BITS = 22
_SUPPORT = {Image.Resampling.BICUBIC: 2, Image.Resampling.BILINEAR: 1}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a resize: input length, output length, and the outputs to compute.

    Attributes:
        length: Number of inputs.
        begin: Where among them the picture begins.
        extent: How many of them it covers.
        new_length: Number of outputs it is resized to.
        first: First wanted output.
        count: Number of wanted outputs.
    """

    length: int
    begin: float
    extent: float
    new_length: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Weights:
    """Filter weights of the outputs to compute along one axis.

    Attributes:
        starts: First input of each output's window, int32 (N,). Windows lie inside the inputs.
        values: Weight of each input of the window, with 22 fractional bits, int32 (N, taps).
    """

    starts: npt.NDArray[np.int32]
    values: npt.NDArray[np.int32]

    @property
    def taps(self) -> int:
        """Number of inputs in a window."""
        return int(self.values.shape[1])

    @property
    def span(self) -> tuple[int, int]:
        """First input that is used, and the one after the last."""
        return int(self.starts.min()), int(self.starts.max()) + self.taps

    def move(self, offset: int) -> "Weights":
        """Return the weights for inputs that have lost their first ``offset``."""
        return Weights(self.starts - np.int32(offset), self.values)

    def mirror(self, length: int) -> "Weights":
        """Return the weights for ``length`` inputs in reverse order."""
        starts = np.int32(length - self.taps) - self.starts
        return Weights(starts, np.ascontiguousarray(self.values[:, ::-1]))


@functools.cache
def find_kernel() -> ctypes.CDLL | None:
    """Return the compiled kernel, or None where the package was built without."""
    spec = importlib.util.find_spec("pipeline.images._kernel")
    return ctypes.CDLL(spec.origin) if spec is not None and spec.origin else None


def resize_part(
    picture: Image.Image | Pixels,
    axes: tuple[Axis, Axis],
    *,
    resample: Image.Resampling,
    turn: Turn,
) -> Pixels:
    """Return the wanted part of a picture that is turned upright, then resized.

    A picture is not turned before it is resized: its passes trade places, its weights are
    mirrored, and the part is turned.

    Args:
        picture: RGB; uint8 (H, W, 3) if it is an array.
        axes: The horizontal and the vertical axis of the upright picture.
        resample: Bicubic or bilinear.
        turn: How the picture is turned upright.

    Returns:
        uint8 (height, width, 3) without gaps.
    """
    across, down = (weigh(axis, resample) for axis in axes)
    across = across.mirror(axes[0].length) if turn.mirrored else across
    down = down.mirror(axes[1].length) if turn.flipped else down
    height_first = height_goes_first(axes)
    columns, rows = (down, across) if turn.transposed else (across, down)
    columns_first = height_first == turn.transposed
    (left, right), (top, bottom) = columns.span, rows.span
    bands = _read_bands(picture, (left, top, right, bottom), rows=columns_first)
    columns, rows = columns.move(left), rows.move(top)
    if columns_first:
        part = _join([resample_columns(band, columns) for band in bands], axis=0)
        part = resample_rows(part, rows)
    else:
        part = _join([resample_rows(band, rows) for band in bands], axis=1)
        part = resample_columns(part, columns)
    return np.ascontiguousarray(part.swapaxes(0, 1) if turn.transposed else part)


def height_goes_first(axes: tuple[Axis, Axis]) -> bool:
    """Return whether the vertical pass comes first, by Pillow's rule.

    Between the passes pixels are rounded, so their order shows in the result.
    """
    lost_width, lost_height = (axis.length - axis.new_length for axis in axes)
    return lost_height > 0 and lost_height > 2 * lost_width


def _read_bands(
    picture: Image.Image | Pixels, box: tuple[int, int, int, int], *, rows: bool
) -> Iterator[Pixels]:
    """Yield the box of a picture as arrays: a few rows at a time, or a few columns.

    Pillow's pictures have a fourth byte in each pixel, so their pixels are copied; in bands the
    copies stay small.
    """
    left, top, right, bottom = box
    if not isinstance(picture, Image.Image):
        yield picture[top:bottom, left:right]
    elif rows:
        step = max(1, _BAND_PIXELS // (right - left))
        for start in range(top, bottom, step):
            yield np.asarray(picture.crop((left, start, right, min(start + step, bottom))))
    else:
        step = max(1, _BAND_PIXELS // (bottom - top))
        for start in range(left, right, step):
            yield np.asarray(picture.crop((start, top, min(start + step, right), bottom)))


def _join(bands: list[Pixels], *, axis: int) -> Pixels:
    return bands[0] if len(bands) == 1 else np.concatenate(bands, axis=axis)


def weigh(axis: Axis, resample: Image.Resampling) -> Weights:
    """Return Pillow's weights, of the bicubic or the bilinear filter."""
    support = _SUPPORT[resample]
    reach = support * max(axis.extent / axis.new_length, 1.0)
    taps = min(math.floor(2 * reach + 1e-6) + 1, axis.length)  # no window holds more
    kernel = find_kernel()
    if kernel is None:
        return _weigh_by_numpy(axis, support, taps=taps)
    weights = Weights(np.empty(axis.count, np.int32), np.empty((axis.count, taps), np.int32))
    sizes = (axis.length, axis.new_length, axis.first, axis.count, support, taps)
    geometry = (ctypes.c_double(axis.begin), ctypes.c_double(axis.extent))
    _run(kernel.weigh, *sizes, *geometry, weights.starts, weights.values)
    return weights


def resample_columns(source: Pixels, weights: Weights) -> Pixels:
    """Weigh the columns of pixels (H, W, 3) into (H, N, 3)."""
    height, width, _ = source.shape
    kernel = find_kernel()
    if kernel is None:
        return _resample_by_numpy(source.swapaxes(0, 1), weights).swapaxes(0, 1)
    out = np.empty((height, len(weights.starts), 3), np.uint8)
    sizes = (height, width, len(weights.starts), weights.taps)
    _run(kernel.resample_columns, *sizes, *_locate(source), weights.starts, weights.values, out)
    return out


def resample_rows(source: Pixels, weights: Weights) -> Pixels:
    """Weigh the rows of pixels (H, W, 3) into (N, W, 3)."""
    kernel = find_kernel()
    if kernel is None:
        return _resample_by_numpy(source, weights)
    width = source.shape[1]
    out = np.empty((len(weights.starts), width, 3), np.uint8)
    sizes = (3 * width, len(weights.starts), weights.taps)
    _run(kernel.resample_rows, *sizes, *_locate(source), weights.starts, weights.values, out)
    return out


def _locate(source: Pixels) -> tuple[ctypes.c_int64, Pixels]:
    """Return the bytes from one row to the next, and pixels without gaps inside a row."""
    if source.strides[1:] != (3, 1) or source.strides[0] < 3 * source.shape[1]:
        source = np.ascontiguousarray(source)
    return ctypes.c_int64(source.strides[0]), source


def _run(function: Any, *arguments: Any) -> None:
    """Call the kernel, which gives up the interpreter lock meanwhile."""
    pointers = (
        ctypes.c_void_p(item.ctypes.data) if isinstance(item, np.ndarray) else item
        for item in arguments
    )
    if function(*pointers) != 0:
        raise MemoryError("no memory left to resize a picture")


def _weigh_by_numpy(axis: Axis, support: int, *, taps: int) -> Weights:
    scale = axis.extent / axis.new_length
    widening = max(scale, 1.0)
    centres = axis.begin + (axis.first + np.arange(axis.count) + 0.5) * scale
    starts = np.maximum((centres - support * widening + 0.5).astype(np.int64), 0)
    stops = np.minimum((centres + support * widening + 0.5).astype(np.int64), axis.length)
    windows = np.minimum(starts, axis.length - taps)
    inputs = windows[:, None] + np.arange(taps)  # (N, taps)
    distances = (inputs - centres[:, None] + 0.5) * (1.0 / widening)
    used = (inputs >= starts[:, None]) & (inputs < stops[:, None])
    weights = np.where(used, _filter(np.abs(distances), support), 0.0)
    weights /= weights.cumsum(axis=1)[:, -1:]  # summed one by one, as Pillow does
    rounding = np.where(weights < 0, -0.5, 0.5)
    values = (rounding + weights * (1 << _WEIGHT_BITS)).astype(np.int32)
    return Weights(windows.astype(np.int32), values)


def _filter(x: npt.NDArray[np.float64], support: int) -> npt.NDArray[np.float64]:
    if support == 1:
        return np.where(x < 1.0, 1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _resample_by_numpy(source: Pixels, weights: Weights) -> Pixels:
    """Weigh rows (H, W, 3) into rows (N, W, 3)."""
    sums = np.full((len(weights.starts), *source.shape[1:]), 1 << (_WEIGHT_BITS - 1), np.int64)
    for tap in range(weights.taps):
        sums += source[weights.starts + tap] * weights.values[:, tap, None, None].astype(np.int64)
    result: Pixels = np.clip(sums >> _WEIGHT_BITS, 0, 255).astype(np.uint8)
    return result
