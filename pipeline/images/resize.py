"""A space's geometry: resize the short side, cut the centre square; 8 bits in and out.

Imports no torch: what runs in read tasks and decode processes comes by here. The bits are those of
the evaluation transform that the backbones were published with, up to its normalisation, which
``transforms.normalise`` adds on the device.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import SettingsError
from pipeline.images.resample import Axis, find_kernel, resize_part
from pipeline.images.turns import TURNS, Pixels, make_upright, measure

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_MIN_IMAGE_SIZE = 32  # the coarsest feature map has one step per 32 pixels
_MAX_ASPECT_RATIO = 16

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class DataConfig:
    """How a picture becomes the input of a backbone.

    Attributes:
        image_size: Side of the square crop, pixels.
        crop_pct: Share of the resized short side that the crop keeps, above 0 and up to 1.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        mean: Per-channel mean of RGB scaled to [0, 1].
        std: Per-channel standard deviation, same scale.
    """

    image_size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.image_size < _MIN_IMAGE_SIZE:
            raise SettingsError(
                f"image_size is {self.image_size}; it must be at least {_MIN_IMAGE_SIZE} pixels"
            )
        if not 0 < self.crop_pct <= 1:
            raise SettingsError(f"crop_pct is {self.crop_pct}; it must be above 0 and up to 1")
        if self.interpolation not in FILTERS:
            raise SettingsError(
                f"interpolation is {self.interpolation!r}; use one of {', '.join(FILTERS)}"
            )

    def keys(self) -> list[str]:
        """Return the names of the fields, so that ``**data_config`` gives them as arguments."""
        return [field.name for field in fields(self)]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    @property
    def resize_size(self) -> int:
        """Length of the short side before the crop, pixels; at least ``image_size``."""
        return math.floor(self.image_size / self.crop_pct)

    def with_size(self, image_size: int) -> "DataConfig":
        """Return the same preprocessing for crops of another size.

        Raises:
            SettingsError: The size is below 32 pixels.
        """
        return replace(self, image_size=image_size)


def resize_and_crop(
    picture: Image.Image | Pixels,
    data_config: DataConfig,
    *,
    size: tuple[int, int] | None = None,
    box: Box | None = None,
    turn: int = 1,
) -> Pixels:
    """Turn a picture upright, resize its short side, then cut the centre square.

    To Pillow's bits, in memory and time that are bounded by the picture and the crop: where the
    compiled kernel is missing Pillow does it, but for long, thin pictures, whose whole resize
    could fill the memory.

    Args:
        picture: RGB of any size, uint8 (H, W, 3) if it is an array.
        data_config: Says the sizes and the filter.
        size: Width and height of the whole picture once upright, which the geometry follows; the
            picture's own unless its decoder has scaled it down.
        box: Where the whole picture lies in such a picture once upright, in fractional pixels:
            left, top, right, bottom.
        turn: The EXIF orientation that turns it upright, 1 to 8.

    Returns:
        uint8 in [0, 255], RGB, (S, S, 3), height first.

    Raises:
        ValueError: The picture is not RGB.
    """
    if isinstance(picture, Image.Image) and picture.mode != "RGB":
        raise ValueError(f"the picture has mode {picture.mode}; convert it to RGB first")
    upright = TURNS[turn].turn_size(measure(picture))
    resample = FILTERS[data_config.interpolation]
    if find_kernel() is None and max(upright) <= _MAX_ASPECT_RATIO * min(upright):
        new_size, crop = locate_crop(size or upright, data_config)
        image = make_upright(picture, turn).resize(new_size, resample, box)
        return np.array(image.crop(crop))
    axes = find_axes(upright, data_config, size=size, box=box)
    return resize_part(picture, axes, resample=resample, turn=TURNS[turn])


def find_axes(
    upright: tuple[int, int],
    data_config: DataConfig,
    *,
    size: tuple[int, int] | None = None,
    box: Box | None = None,
) -> tuple[Axis, Axis]:
    """Return how the width and the height of an upright picture become those of its crop.

    ``size`` and ``box`` are those of ``resize_and_crop``.
    """
    new_size, crop = locate_crop(size or upright, data_config)
    begins, ends = np.asarray(box or (0, 0, *upright), np.float32).reshape(2, 2)  # as Pillow
    extents = ends - begins
    across, down = (
        Axis(
            upright[i],
            begin=float(begins[i]),
            extent=float(extents[i]),
            new_length=new_size[i],
            first=crop[i],
            count=data_config.image_size,
        )
        for i in range(2)
    )
    return across, down


def locate_crop(
    size: tuple[int, int], data_config: DataConfig
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Return width and height after the resize, and the crop's left, top, right and bottom."""
    new_size = _fit_short_side(size, data_config.resize_size)
    left, top = (_centre(length, data_config.image_size) for length in new_size)
    return new_size, (left, top, left + data_config.image_size, top + data_config.image_size)


def _fit_short_side(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def _centre(length: int, crop: int) -> int:
    return round((length - crop) / 2)  # halves to even
