"""A space's geometry: resize the short side, cut the centre square; 8 bits in and out.

Imports no torch: what runs in read tasks and decode processes comes by here. The bits are those of
the evaluation transform that the backbones were published with, up to its normalisation, which
``transforms.normalise`` adds on the device.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import SettingsError
from pipeline.images.strips import resize_strip

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_MIN_IMAGE_SIZE = 32  # the coarsest feature map has one step per 32 pixels
_MAX_ASPECT_RATIO = 16

Pixels = npt.NDArray[np.uint8]


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
        if self.interpolation not in _FILTERS:
            raise SettingsError(
                f"interpolation is {self.interpolation!r}; use one of {', '.join(_FILTERS)}"
            )

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
    image: Image.Image,
    data_config: DataConfig,
    *,
    size: tuple[int, int] | None = None,
    box: tuple[float, float, float, float] | None = None,
) -> Pixels:
    """Resize the short side, then cut the centre square.

    Memory and time are bounded by the picture and the crop: of long, thin pictures only the crop
    is resized, to the same bits.

    Args:
        image: RGB of any size.
        data_config: Says the sizes and the filter.
        size: Width and height of the whole picture, which the geometry follows; the image's own
            unless its decoder has scaled it down.
        box: Where the whole picture lies in such an image, in fractional pixels: left, top,
            right, bottom.

    Returns:
        uint8 in [0, 255], RGB, (S, S, 3), height first.

    Raises:
        ValueError: The picture is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"the picture has mode {image.mode}; convert it to RGB first")
    new_size, crop = locate_crop(size or image.size, data_config)
    resample = _FILTERS[data_config.interpolation]
    if box is None and max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
        return resize_strip(image, new_size, box=crop, resample=resample)
    if box is not None or image.size != new_size:
        image = image.resize(new_size, resample, box)
    return np.array(image.crop(crop))


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
