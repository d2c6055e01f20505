"""FBNetV3, size B.

"FBNetV3: Joint Architecture-Recipe Search using Predictor Pretraining",
https://arxiv.org/abs/2006.02049. Inverted residuals with searched kernels and widths, hard-swish
throughout. Left out: other sizes, stochastic depth.
"""

from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.backbones.config import BackboneConfig, describe_maps
from pipeline.backbones.layers import (
    ConvBnPairs,
    InvertedResidual,
    InvertedResidualShape,
    make_batch_norm,
    make_conv,
    run_stages,
)
from pipeline.backbones.network import FeatureNetwork

_STEM_CHANNELS = 16
_STEM_STAGE_DEPTH = 2
_TAPPED_STAGES = (0, 1, 2, 4, 6)

_hardswish = partial(nn.Hardswish, inplace=True)

# Stages 1 to 5, one row per run of equal blocks:
# (blocks, input, mid, output channels, kernel, stride, squeeze channels)
_STAGES = (
    ((1, 16, 64, 24, 5, 2, 0), (3, 24, 48, 24, 5, 1, 0)),
    ((1, 24, 120, 40, 5, 2, 8), (4, 40, 120, 40, 5, 1, 16)),
    ((1, 40, 200, 72, 5, 2, 0), (4, 72, 216, 72, 3, 1, 0)),
    ((1, 72, 360, 120, 3, 1, 24), (5, 120, 360, 120, 5, 1, 32)),
    (
        (1, 120, 720, 184, 3, 2, 32),
        (5, 184, 736, 184, 5, 1, 48),
        (1, 184, 1104, 224, 5, 1, 48),
    ),
)


class DepthwiseSeparable(nn.Module):
    """3x3 depthwise and 1x1 convolution with a skip; keeps width and size."""

    conv_bn_pairs: ClassVar[ConvBnPairs] = (("conv_dw", "bn1"), ("conv_pw", "bn2"))

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = _hardswish()
        self.conv_dw = make_conv(channels, channels, 3, stride=1, groups=channels)
        self.bn1 = make_batch_norm(channels)
        self.conv_pw = make_conv(channels, channels, 1, stride=1, groups=1)
        self.bn2 = make_batch_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, C, H, W)."""
        y: Tensor = self.bn2(self.conv_pw(self.act(self.bn1(self.conv_dw(x)))))
        return x + y


class PointwiseConv(nn.Module):
    """1x1 convolution, batch norm, hard-swish; the last stage."""

    conv_bn_pairs: ClassVar[ConvBnPairs] = (("conv", "bn1"),)

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = make_conv(in_channels, out_channels, 1, stride=1, groups=1)
        self.bn1 = make_batch_norm(out_channels)
        self.act = _hardswish()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H, W)."""
        y: Tensor = self.act(self.bn1(self.conv(x)))
        return y


def _make_stage(runs: tuple[tuple[int, ...], ...]) -> nn.Sequential:
    return nn.Sequential(
        *(
            InvertedResidual(
                InvertedResidualShape(*shape), activation=_hardswish, gate=nn.Hardsigmoid
            )
            for depth, *shape in runs
            for _ in range(depth)
        )
    )


class FbNetV3(FeatureNetwork):
    """Stem, seven stages, average pool, widening 1x1 convolution and linear classifier.

    The widening follows the pool, so that the embedding (1984) is wider than the features (1344).
    """

    num_features = 1344
    embedding_dim = 1984
    feature_info = describe_maps(
        ("blocks.0", 16, 2),
        ("blocks.1", 24, 4),
        ("blocks.2", 40, 8),
        ("blocks.4", 120, 16),
        ("blocks.6", 1344, 32),
    )
    conv_bn_pairs: ClassVar[ConvBnPairs] = (("conv_stem", "bn1"),)

    def __init__(self, config: BackboneConfig, *, num_classes: int, features_only: bool) -> None:
        super().__init__(config, features_only=features_only)
        self.act = _hardswish()
        self.conv_stem = make_conv(3, _STEM_CHANNELS, 3, stride=2, groups=1)
        self.bn1 = make_batch_norm(_STEM_CHANNELS)
        first = (DepthwiseSeparable(_STEM_CHANNELS) for _ in range(_STEM_STAGE_DEPTH))
        self.blocks = nn.Sequential(
            nn.Sequential(*first),
            *(_make_stage(runs) for runs in _STAGES),
            nn.Sequential(PointwiseConv(224, self.num_features)),
        )
        self.conv_head = make_conv(self.num_features, self.embedding_dim, 1, stride=1, groups=1)
        self.classifier = (
            nn.Linear(self.embedding_dim, num_classes) if num_classes else nn.Identity()
        )

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last feature map, (B, 1344, H/32, W/32)."""
        y: Tensor = self.blocks(self._forward_stem(images))
        return y

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return (B, num_classes), or the embedding (B, 1984) with ``pre_logits``."""
        pooled = F.adaptive_avg_pool2d(features, 1)
        embedding = self.act(self.conv_head(pooled)).flatten(1)
        y: Tensor = embedding if pre_logits else self.classifier(embedding)
        return y

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of ``feature_info``."""
        outputs = run_stages(self.blocks, self._forward_stem(images))
        return [outputs[index] for index in _TAPPED_STAGES]

    def _forward_stem(self, images: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn1(self.conv_stem(images)))
        return y


FBNETV3_B = BackboneConfig(
    name="fbnetv3_b.ra2_in1k",
    network=FbNetV3,
    classifier="classifier",
    image_size=224,
    test_image_size=256,
    crop_pct=0.95,
    test_crop_pct=0.95,
    interpolation="bilinear",
)
