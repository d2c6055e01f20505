"""ResNet-50 V2: bottlenecks with batch norm and ReLU before the convolutions.

"Identity Mappings in Deep Residual Networks", https://arxiv.org/abs/1603.05027. Left out: the
weight-standardised convolutions and group norms of BiT, other depths and stems.
"""

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.backbones.config import BackboneConfig, describe_maps
from pipeline.backbones.layers import ConvBnPairs, make_batch_norm, make_conv, run_stages
from pipeline.backbones.network import FeatureNetwork

_STEM_CHANNELS = 64
# (blocks, input channels, output channels, stride of the first block) of each stage
_STAGES = ((3, 64, 256, 1), (4, 256, 512, 2), (6, 512, 1024, 2), (3, 1024, 2048, 2))
_BOTTLENECK_DIVISOR = 4


class PreActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, each after batch norm and ReLU, plus a shortcut.

    The first block of a stage takes its shortcut, a strided 1x1 convolution, from the normalised
    input; the others add the raw one. ``norm1`` follows a sum, so no convolution can absorb it.
    """

    conv_bn_pairs: ClassVar[ConvBnPairs] = (("conv1", "norm2"), ("conv2", "norm3"))

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, first: bool) -> None:
        super().__init__()
        mid = out_channels // _BOTTLENECK_DIVISOR
        self.act = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if first:
            shortcut = make_conv(in_channels, out_channels, 1, stride=stride, groups=1)
            self.downsample = nn.Sequential(OrderedDict(conv=shortcut))
        self.norm1 = make_batch_norm(in_channels)
        self.conv1 = make_conv(in_channels, mid, 1, stride=1, groups=1)
        self.norm2 = make_batch_norm(mid)
        self.conv2 = make_conv(mid, mid, 3, stride=stride, groups=1)
        self.norm3 = make_batch_norm(mid)
        self.conv3 = make_conv(mid, out_channels, 1, stride=1, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, ceil(H / stride), ceil(W / stride))."""
        activated = self.act(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        y = self.act(self.norm2(self.conv1(activated)))
        y = self.act(self.norm3(self.conv2(y)))
        z: Tensor = self.conv3(y) + shortcut
        return z


def _make_stage(depth: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = PreActBottleneck(in_channels, out_channels, stride=stride, first=True)
    rest = (
        PreActBottleneck(out_channels, out_channels, stride=1, first=False)
        for _ in range(depth - 1)
    )
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(first, *rest)))


class ConvHead(nn.Module):
    """Average pool and a classifier that is a 1x1 convolution; without classes, the pool."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(num_features, num_classes, 1) if num_classes else nn.Identity()

    def forward(self, features: Tensor, *, pre_logits: bool) -> Tensor:
        """Map (B, C, H, W) to (B, num_classes), or to (B, C) with ``pre_logits``."""
        pooled = F.adaptive_avg_pool2d(features, 1)
        y: Tensor = pooled if pre_logits else self.fc(pooled)
        return y.flatten(1)


class ResNetV2(FeatureNetwork):
    """7x7 stem, four stages of bottlenecks, final norm, average pool and classifier."""

    num_features = 2048
    embedding_dim = 2048
    feature_info = describe_maps(
        ("stem.conv", 64, 2),
        ("stages.0", 256, 4),
        ("stages.1", 512, 8),
        ("stages.2", 1024, 16),
        ("stages.3", 2048, 32),
    )

    def __init__(self, config: BackboneConfig, *, num_classes: int, features_only: bool) -> None:
        super().__init__(config, features_only=features_only)
        self.stem = nn.Sequential(
            OrderedDict(
                conv=make_conv(3, _STEM_CHANNELS, 7, stride=2, groups=1),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        self.stages = nn.Sequential(*(_make_stage(*stage) for stage in _STAGES))
        self.norm = make_batch_norm(self.num_features)
        self.act = nn.ReLU(inplace=True)
        self.head = ConvHead(self.num_features, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last residual sum, normalised and rectified, (B, 2048, H/32, W/32)."""
        y: Tensor = self.act(self.norm(self.stages(self.stem(images))))
        return y

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return (B, num_classes), or the embedding (B, 2048) with ``pre_logits``."""
        y: Tensor = self.head(features, pre_logits=pre_logits)
        return y

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of ``feature_info``: raw sums, without the final norm."""
        conv, pool = self.stem
        x = conv(images)
        return [x, *run_stages(self.stages, pool(x))]


RESNETV2_50 = BackboneConfig(
    name="resnetv2_50.a1h_in1k",
    network=ResNetV2,
    classifier="head.fc",
    image_size=224,
    test_image_size=288,
    crop_pct=0.95,
    test_crop_pct=1.0,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
