"""CSPDarknet-53: Darknet-53 with cross-stage partial connections.

"CSPNet: A New Backbone that can Enhance Learning Capability of CNN",
https://arxiv.org/abs/1911.11929, and "YOLOv4", https://arxiv.org/abs/2004.10934. In every stage
half of the channels bypass the residual blocks. The leak of the activation is 0.01, not the 0.1 of
Darknet. Left out: the other networks of the CSP family.
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.backbones.config import BackboneConfig, describe_maps
from pipeline.backbones.layers import ConvBnAct, LinearHead, run_stages
from pipeline.backbones.network import FeatureNetwork

_STEM_CHANNELS = 32
# (input, output, expanded, block's inner channels, blocks) of each stage
_STAGES = (
    (32, 64, 128, 32, 1),
    (64, 128, 128, 64, 2),
    (128, 256, 256, 128, 8),
    (256, 512, 512, 256, 8),
    (512, 1024, 1024, 512, 4),
)

_leaky_relu = partial(nn.LeakyReLU, negative_slope=0.01, inplace=True)


class DarkBlock(nn.Module):
    """1x1 and 3x3 convolution with a skip; nothing follows the sum."""

    def __init__(self, channels: int, mid_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBnAct(channels, mid_channels, 1, stride=1, activation=_leaky_relu)
        self.conv2 = ConvBnAct(mid_channels, channels, 3, stride=1, activation=_leaky_relu)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, C, H, W)."""
        y: Tensor = self.conv2(self.conv1(x))
        return y + x


class CrossStage(nn.Module):
    """Downsampling, expansion, blocks on the second half of the channels, and their union."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expanded_channels: int,
        block_channels: int,
        depth: int,
    ) -> None:
        super().__init__()
        half = expanded_channels // 2
        make = partial(ConvBnAct, activation=_leaky_relu)
        self.conv_down = make(in_channels, out_channels, 3, stride=2)
        self.conv_exp = make(out_channels, expanded_channels, 1, stride=1)
        self.blocks = nn.Sequential(*(DarkBlock(half, block_channels) for _ in range(depth)))
        self.conv_transition_b = make(half, half, 1, stride=1)
        self.conv_transition = make(expanded_channels, out_channels, 1, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, ceil(H / 2), ceil(W / 2))."""
        bypass, y = self.conv_exp(self.conv_down(x)).chunk(2, dim=1)
        y = self.conv_transition_b(self.blocks(y))
        z: Tensor = self.conv_transition(torch.cat([bypass, y], dim=1))
        return z


class CspDarknet(FeatureNetwork):
    """Stem of stride 1, five stages, average pool and linear classifier."""

    num_features = 1024
    embedding_dim = 1024
    feature_info = describe_maps(
        ("stem.conv1", 32, 1),
        ("stages.0", 64, 2),
        ("stages.1", 128, 4),
        ("stages.2", 256, 8),
        ("stages.3", 512, 16),
        ("stages.4", 1024, 32),
    )

    def __init__(self, config: BackboneConfig, *, num_classes: int, features_only: bool) -> None:
        super().__init__(config, features_only=features_only)
        stem = ConvBnAct(3, _STEM_CHANNELS, 3, stride=1, activation=_leaky_relu)
        self.stem = nn.Sequential(OrderedDict(conv1=stem))
        self.stages = nn.Sequential(*(CrossStage(*stage) for stage in _STAGES))
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
        x = self.stem(images)
        return [x, *run_stages(self.stages, x)]


CSPDARKNET53 = BackboneConfig(
    name="cspdarknet53.ra_in1k",
    network=CspDarknet,
    classifier="head.fc",
    image_size=256,
    test_image_size=256,
    crop_pct=0.887,
    test_crop_pct=0.887,
    interpolation="bilinear",
)
