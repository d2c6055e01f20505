"""VoVNet with depthwise convolutions and effective squeeze-and-excite (ESE-VoVNet-19b-dw).

"CenterMask: Real-Time Anchor-Free Instance Segmentation", https://arxiv.org/abs/1911.06667.
Every stage runs a chain of small convolutions and concatenates all their outputs once ("one-shot
aggregation"). Left out: stages of several blocks with their residual sums, and the variants with
dense 3x3 convolutions.
"""

from collections import OrderedDict
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.backbones.config import BackboneConfig, describe_maps
from pipeline.backbones.layers import (
    ConvBnAct,
    ConvBnPairs,
    LinearHead,
    make_batch_norm,
    make_conv,
    run_stages,
)
from pipeline.backbones.network import FeatureNetwork

_STEM_CHANNELS = 64
# (input, chain, output) channels of each stage
_STAGES = ((64, 128, 256), (256, 160, 512), (512, 192, 768), (768, 224, 1024))
_CHAIN_LENGTH = 3


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)


class SeparableConvBnAct(nn.Module):
    """3x3 depthwise, then 1x1 convolution, batch norm, ReLU; nothing between the two."""

    conv_bn_pairs: ClassVar[ConvBnPairs] = (("conv_pw", "bn"),)

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv_dw = make_conv(in_channels, in_channels, 3, stride=stride, groups=in_channels)
        self.conv_pw = make_conv(in_channels, out_channels, 1, stride=1, groups=1)
        self.bn = make_batch_norm(out_channels)
        self.act = _relu()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.act(self.bn(self.conv_pw(self.conv_dw(x))))
        return y


class EffectiveSqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the channel means in one full-width layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, C, H, W)."""
        gate: Tensor = self.gate(self.fc(x.mean((2, 3), keepdim=True)))
        return x * gate


class OneShotAggregation(nn.Module):
    """Reduction, a chain of separable convolutions, and one concatenation of input and chain."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_reduction = ConvBnAct(in_channels, mid_channels, 1, stride=1, activation=_relu)
        self.conv_mid = nn.Sequential(
            *(
                SeparableConvBnAct(mid_channels, mid_channels, stride=1)
                for _ in range(_CHAIN_LENGTH)
            )
        )
        concatenated = in_channels + _CHAIN_LENGTH * mid_channels
        self.conv_concat = ConvBnAct(concatenated, out_channels, 1, stride=1, activation=_relu)
        self.attn = EffectiveSqueezeExcite(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H, W)."""
        outputs = [x]  # the unreduced input, not the reduction, is concatenated
        y = self.conv_reduction(x)
        for layer in self.conv_mid:
            y = layer(y)
            outputs.append(y)
        z: Tensor = self.attn(self.conv_concat(torch.cat(outputs, dim=1)))
        return z


def _make_stage(widths: tuple[int, int, int], *, pool: bool) -> nn.Sequential:
    # ceil_mode with no padding: odd sizes round down here, and up in the strided convolutions
    first = nn.MaxPool2d(3, stride=2, ceil_mode=True) if pool else nn.Identity()
    blocks = nn.Sequential(OneShotAggregation(*widths))
    return nn.Sequential(OrderedDict(pool=first, blocks=blocks))


class VovNet(FeatureNetwork):
    """Stem of stride 4, four stages, average pool and linear classifier."""

    num_features = 1024
    embedding_dim = 1024
    feature_info = describe_maps(
        ("stem.1", 64, 2),
        ("stages.0", 256, 4),
        ("stages.1", 512, 8),
        ("stages.2", 768, 16),
        ("stages.3", 1024, 32),
    )

    def __init__(self, config: BackboneConfig, *, num_classes: int, features_only: bool) -> None:
        super().__init__(config, features_only=features_only)
        self.stem = nn.Sequential(
            ConvBnAct(3, _STEM_CHANNELS, 3, stride=2, activation=_relu),
            SeparableConvBnAct(_STEM_CHANNELS, _STEM_CHANNELS, stride=1),
            SeparableConvBnAct(_STEM_CHANNELS, _STEM_CHANNELS, stride=2),
        )
        self.stages = nn.Sequential(
            *(_make_stage(widths, pool=index > 0) for index, widths in enumerate(_STAGES))
        )
        self.head = LinearHead(self.num_features, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last feature map, (B, 1024, H/32, W/32)."""
        y: Tensor = self.stages(self.stem(images))
        return y

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return (B, num_classes), or the embedding (B, 1024) with ``pre_logits``."""
        y: Tensor = self.head(features, pre_logits=pre_logits)
        return y

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of ``feature_info``."""
        x = self.stem[1](self.stem[0](images))
        return [x, *run_stages(self.stages, self.stem[2](x))]


ESE_VOVNET19B_DW = BackboneConfig(
    name="ese_vovnet19b_dw.ra_in1k",
    network=VovNet,
    classifier="head.fc",
    image_size=224,
    test_image_size=288,
    crop_pct=0.875,
    test_crop_pct=0.95,
    interpolation="bicubic",
)
