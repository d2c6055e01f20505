"""Resizing long, thin pictures without making the long, thin result.

A strip of 1 x 65,500 pixels, resized to a short side of 256, would have 16 million rows, of which
a crop keeps 224. Pillow can start a resize inside a picture only at float32 positions, which moves
the sampling grid. So the long side is resampled here, for the wanted rows or columns alone, with
Pillow's own arithmetic: filter weights in float64, rounded to 22 bits; sums in integers; 8 bits
between the passes. The short side is left to Pillow. The bits are those of a whole resize.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

_WEIGHT_BITS = 22
_SUPPORT = {Image.Resampling.BICUBIC: 2.0, Image.Resampling.BILINEAR: 1.0}


def resize_strip(
    image: Image.Image,
    new_size: tuple[int, int],
    *,
    box: tuple[int, int, int, int],
    resample: Image.Resampling,
) -> Pixels:
    """Return the pixels of ``image.resize(new_size, resample).crop(box)``.

    Args:
        image: RGB.
        new_size: Width and height before the crop.
        box: Left, top, right and bottom of the crop.
        resample: Bicubic or bilinear.

    Returns:
        uint8 (height, width, 3) of the box.
    """
    left, top, right, bottom = box
    if image.width > image.height:
        starts, weights = _weigh(image.width, new_size[0], (left, right), resample)
        first, last = _used_span(starts, weights, image.width)
        source = np.asarray(image.crop((first, 0, last, image.height)))
        columns = _resample(source.swapaxes(0, 1), starts - first, weights).swapaxes(0, 1)
        return _resize(columns, (right - left, new_size[1]), resample)[top:bottom]
    starts, weights = _weigh(image.height, new_size[1], (top, bottom), resample)
    first, last = _used_span(starts, weights, image.height)
    source = np.asarray(image.crop((0, first, image.width, last)))
    if _height_goes_first(image.size, new_size):
        rows = _resample(source, starts - first, weights)
        return _resize(rows, (new_size[0], bottom - top), resample)[:, left:right]
    columns = _resize(source, (new_size[0], last - first), resample)[:, left:right]
    return _resample(columns, starts - first, weights)


def _height_goes_first(size: tuple[int, int], new_size: tuple[int, int]) -> bool:
    # Pillow's rule; between the passes pixels are rounded, so their order shows in the result
    lost_width, lost_height = size[0] - new_size[0], size[1] - new_size[1]
    return lost_height > 0 and lost_height > 2 * lost_width


def _resize(pixels: Pixels, new_size: tuple[int, int], resample: Image.Resampling) -> Pixels:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.array(image.resize(new_size, resample))


def _weigh(
    length: int, new_length: int, wanted: tuple[int, int], resample: Image.Resampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the first source index (N,) and the weights (N, taps) of each wanted output."""
    scale = length / new_length
    widening = max(scale, 1.0)
    support = _SUPPORT[resample] * widening
    centres = (np.arange(*wanted) + 0.5) * scale
    starts = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    stops = np.minimum((centres + support + 0.5).astype(np.int64), length)
    sources = starts[:, None] + np.arange((stops - starts).max())  # (N, taps)
    distances = (sources - centres[:, None] + 0.5) * (1.0 / widening)
    weights = np.where(sources < stops[:, None], _filter(np.abs(distances), resample), 0.0)
    weights /= weights.cumsum(axis=1)[:, -1:]  # summed one by one, as Pillow does
    rounding = np.where(weights < 0, -0.5, 0.5)
    return starts, (rounding + weights * (1 << _WEIGHT_BITS)).astype(np.int64)


def _filter(x: npt.NDArray[np.float64], resample: Image.Resampling) -> npt.NDArray[np.float64]:
    if resample == Image.Resampling.BILINEAR:
        return np.where(x < 1.0, 1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _used_span(
    starts: npt.NDArray[np.int64], weights: npt.NDArray[np.int64], length: int
) -> tuple[int, int]:
    return int(starts[0]), min(int(starts[-1]) + weights.shape[1], length)


def _resample(
    source: Pixels, starts: npt.NDArray[np.int64], weights: npt.NDArray[np.int64]
) -> Pixels:
    """Weigh rows (L, W, 3) into rows (N, W, 3)."""
    sums = np.full((len(starts), *source.shape[1:]), 1 << (_WEIGHT_BITS - 1), dtype=np.int64)
    for tap in range(weights.shape[1]):
        rows = source[np.minimum(starts + tap, len(source) - 1)]  # weights beyond the end are 0
        sums += rows * weights[:, tap, None, None]
    result: Pixels = np.clip(sums >> _WEIGHT_BITS, 0, 255).astype(np.uint8)
    return result
