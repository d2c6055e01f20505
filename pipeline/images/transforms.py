"""A space's preprocessing: resize, centre crop, scale, normalise.

Two halves, so that the host hands 8-bit crops to the device: ``resize_and_crop`` and
``normalise``. Together they give the same bits as the evaluation transform that the backbones
were published with.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.backbones.registry import find_backbone
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


def resolve_data_config(
    backbone_or_name: nn.Module | str, *, use_test_size: bool = False
) -> DataConfig:
    """Return the preprocessing that a backbone was published with.

    Args:
        backbone_or_name: A backbone of ``create_backbone``, or a name.
        use_test_size: The size at which it was evaluated rather than trained.

    Raises:
        UnknownBackboneError: No backbone has this name.
    """
    if isinstance(backbone_or_name, str):
        config = find_backbone(backbone_or_name)
    else:
        config = find_backbone(backbone_or_name.config.name)  # type: ignore[union-attr, arg-type]
    return DataConfig(
        image_size=config.test_image_size if use_test_size else config.image_size,
        crop_pct=config.test_crop_pct if use_test_size else config.crop_pct,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
    )


@dataclass(frozen=True, slots=True)
class Transform:
    """One picture to one normalised tensor; made by ``create_transform``."""

    data_config: DataConfig

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 (3, S, S). Pictures of other modes than RGB are converted first."""
        crop = resize_and_crop(image.convert("RGB"), self.data_config)
        return normalise(torch.from_numpy(crop[None]), self.data_config)[0].contiguous()


def create_transform(data_config: DataConfig) -> Transform:
    """Return a callable from a PIL picture to a float32 tensor (3, S, S)."""
    return Transform(data_config)


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


def normalise(batch: Tensor, data_config: DataConfig) -> Tensor:
    """Scale to [0, 1], subtract the mean, divide by the standard deviation; on any device.

    Args:
        batch: uint8 in [0, 255], RGB, (B, S, S, 3).
        data_config: Says mean and standard deviation.

    Returns:
        float32 (B, 3, S, S) in channels-last memory. The order of the three operations, and
        dividing by tensors, keep the bits the same everywhere.
    """
    x = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
    for operation, values in (
        (x.div_, (255.0, 255.0, 255.0)),
        (x.sub_, data_config.mean),
        (x.div_, data_config.std),
    ):
        operation(torch.tensor(values, device=x.device).view(1, 3, 1, 1))
    return x


def _fit_short_side(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def _centre(length: int, crop: int) -> int:
    return round((length - crop) / 2)  # halves to even
