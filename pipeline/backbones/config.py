"""The configuration of a named backbone: builder, input size, preprocessing, feature maps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class BackboneConfig:
    """A named, trained network: how to build it, and how its pictures were prepared.

    Attributes:
        name: Architecture and training tag, e.g. ``"resnetv2_50.a1h_in1k"``.
        network: The class of the network, called as
            ``network(config, num_classes=…, features_only=…)``.
        classifier: State-dict prefix of the layer that ``num_classes`` replaces.
        image_size: Side of the square pictures it was trained on, pixels.
        test_image_size: Side at which it was found to do best, pixels.
        crop_pct: Share of the resized short side that the centre crop keeps, at ``image_size``.
        test_crop_pct: The same at ``test_image_size``.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        mean: Per-channel mean of RGB scaled to [0, 1].
        std: Per-channel standard deviation, same scale.
    """

    name: str
    network: type[Any]
    classifier: str
    image_size: int
    test_image_size: int
    crop_pct: float
    test_crop_pct: float
    interpolation: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def hub_id(self) -> str:
        """Repository of the pretrained weights on the Hugging Face hub."""
        return f"timm/{self.name}"


class FeatureInfo(tuple[Mapping[str, Any], ...]):
    """Feature maps, from the finest to the coarsest: ``module``, ``num_chs``, ``reduction``."""

    __slots__ = ()

    def channels(self) -> list[int]:
        """Return the number of channels of each map."""
        return [item["num_chs"] for item in self]

    def reduction(self) -> list[int]:
        """Return how many input pixels one step of each map spans."""
        return [item["reduction"] for item in self]

    def module_name(self) -> list[str]:
        """Return the module whose output each map is."""
        return [item["module"] for item in self]


def describe_maps(*maps: tuple[str, int, int]) -> FeatureInfo:
    """Return ``feature_info`` for ``(module, channels, reduction)`` of each feature map.

    ``reduction`` is how many input pixels one step of the map spans.
    """
    return FeatureInfo(
        {"module": module, "num_chs": channels, "reduction": reduction}
        for module, channels, reduction in maps
    )
