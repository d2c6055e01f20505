"""EfficientNetV2 as its "rw" variant, size M.

"EfficientNetV2: Smaller Models and Faster Training", https://arxiv.org/abs/2104.00298. Early
stages use dense ("fused") expansions, later ones depthwise convolutions with squeeze-and-excite.
The variant differs from the paper's M in depths, widths and its first stage. Left out: other
sizes, TensorFlow padding, stochastic depth.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from pipeline.backbones.config import BackboneConfig, describe_maps
from pipeline.backbones.layers import (
    ConvBnPairs,
    InvertedResidual,
    InvertedResidualShape,
    make_batch_norm,
    make_conv,
    pool_to_vector,
    run_stages,
)
from pipeline.backbones.network import FeatureNetwork

_STEM_CHANNELS = 32
_SQUEEZE_DIVISOR = 4  # of the block's input, not of its expanded width

_silu = partial(nn.SiLU, inplace=True)


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of blocks; the first one changes stride and width.

    Attributes:
        fused: Dense 3x3 expansions rather than inverted residuals.
        depth: Number of blocks.
        stride: Stride of the first block.
        expansion: Inner width in multiples of the block's input.
        channels: Width of every block's output.
    """

    fused: bool
    depth: int
    stride: int
    expansion: int
    channels: int


_STAGES = (
    Stage(fused=True, depth=3, stride=1, expansion=1, channels=32),
    Stage(fused=True, depth=5, stride=2, expansion=4, channels=56),
    Stage(fused=True, depth=5, stride=2, expansion=4, channels=80),
    Stage(fused=False, depth=8, stride=2, expansion=4, channels=152),
    Stage(fused=False, depth=15, stride=1, expansion=6, channels=192),
    Stage(fused=False, depth=24, stride=2, expansion=6, channels=328),
)
_TAPPED_STAGES = (0, 1, 2, 4, 5)


class FusedInvertedResidual(nn.Module):
    """Dense 3x3 expansion, 1x1 projection, skip; both convolutions even with expansion 1."""

    conv_bn_pairs: ClassVar[ConvBnPairs] = (("conv_exp", "bn1"), ("conv_pwl", "bn2"))

    def __init__(self, shape: InvertedResidualShape) -> None:
        super().__init__()
        mid = shape.mid_channels
        self.has_skip = shape.has_skip
        self.act = _silu()
        self.conv_exp = make_conv(
            shape.in_channels, mid, shape.kernel_size, stride=shape.stride, groups=1
        )
        self.bn1 = make_batch_norm(mid)
        self.conv_pwl = make_conv(mid, shape.out_channels, 1, stride=1, groups=1)
        self.bn2 = make_batch_norm(shape.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.act(self.bn1(self.conv_exp(x)))
        y = self.bn2(self.conv_pwl(y))
        return x + y if self.has_skip else y


def _make_blocks(stage: Stage, in_channels: int) -> Iterator[nn.Module]:
    for index in range(stage.depth):
        shape = InvertedResidualShape(
            in_channels=in_channels,
            mid_channels=in_channels * stage.expansion,
            out_channels=stage.channels,
            kernel_size=3,
            stride=stage.stride if index == 0 else 1,
            squeeze_channels=0 if stage.fused else in_channels // _SQUEEZE_DIVISOR,
        )
        if stage.fused:
            yield FusedInvertedResidual(shape)
        else:
            yield InvertedResidual(shape, activation=_silu, gate=nn.Sigmoid)
        in_channels = stage.channels


class EfficientNetV2(FeatureNetwork):
    """Stem, six stages, 1x1 head convolution, average pool and linear classifier."""

    num_features = 2152
    embedding_dim = 2152
    feature_info = describe_maps(
        ("blocks.0", 32, 2),
        ("blocks.1", 56, 4),
        ("blocks.2", 80, 8),
        ("blocks.4", 192, 16),
        ("blocks.5", 328, 32),
    )
    conv_bn_pairs: ClassVar[ConvBnPairs] = (("conv_stem", "bn1"), ("conv_head", "bn2"))

    def __init__(self, config: BackboneConfig, *, num_classes: int, features_only: bool) -> None:
        super().__init__(config, features_only=features_only)
        self.act = _silu()
        self.conv_stem = make_conv(3, _STEM_CHANNELS, 3, stride=2, groups=1)
        self.bn1 = make_batch_norm(_STEM_CHANNELS)
        widths = (_STEM_CHANNELS, *(stage.channels for stage in _STAGES))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(*_make_blocks(stage, width))
                for stage, width in zip(_STAGES, widths, strict=False)
            )
        )
        self.conv_head = make_conv(widths[-1], self.num_features, 1, stride=1, groups=1)
        self.bn2 = make_batch_norm(self.num_features)
        self.classifier = (
            nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        )

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the features after the head convolution, (B, 2152, H/32, W/32)."""
        x = self.blocks(self._forward_stem(images))
        y: Tensor = self.act(self.bn2(self.conv_head(x)))
        return y

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return (B, num_classes), or the embedding (B, 2152) with ``pre_logits``."""
        embedding = pool_to_vector(features)
        y: Tensor = embedding if pre_logits else self.classifier(embedding)
        return y

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of ``feature_info``; the head convolution is not run."""
        outputs = run_stages(self.blocks, self._forward_stem(images))
        return [outputs[index] for index in _TAPPED_STAGES]

    def _forward_stem(self, images: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn1(self.conv_stem(images)))
        return y


EFFICIENTNETV2_RW_M = BackboneConfig(
    name="efficientnetv2_rw_m.agc_in1k",
    network=EfficientNetV2,
    classifier="classifier",
    image_size=320,
    test_image_size=416,
    crop_pct=1.0,
    test_crop_pct=1.0,
    interpolation="bicubic",
)
