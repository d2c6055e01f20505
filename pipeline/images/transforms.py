"""A space's preprocessing: resize, centre crop, scale, normalise.

Two halves, so that the host hands 8-bit crops to the device: ``resize_and_crop`` and
``normalise``. Together they give the same bits as the evaluation transform that the backbones
were published with.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.backbones.registry import find_backbone
from pipeline.errors import SettingsError
from pipeline.images.resize import DataConfig, resize_and_crop


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


def create_transform(
    data_config: DataConfig | None = None, *, is_training: bool = False, **fields: Any
) -> Transform:
    """Return a callable from a PIL picture to a float32 tensor (3, S, S).

    Args:
        data_config: The preprocessing; or give its fields, as in ``create_transform(**config)``.
        is_training: Must be False: there are no augmentations here.
        **fields: The fields of ``DataConfig``.

    Raises:
        SettingsError: Training is asked for, or a field is missing, unknown or wrong.
    """
    if is_training:
        raise SettingsError("is_training is True; this transform is for evaluation only")
    if data_config is None:
        try:
            data_config = DataConfig(**fields)
        except TypeError as error:
            names = ", ".join(field.name for field in dataclasses.fields(DataConfig))
            raise SettingsError(f"{error}; the fields of a data config are {names}") from error
    return Transform(data_config)


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
