"""Layers that two networks share with the same arithmetic and the same state-dict keys.

Nothing that changes a number has a default here: activation, stride and width are always given.
A class with ``conv_bn_pairs`` names its convolutions whose output goes to a batch norm and nowhere
else; inference merges those two (see ``optimize.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Activation = Callable[[], nn.Module]
ConvBnPairs = tuple[tuple[str, str], ...]

_BATCH_NORM_EPS = 1e-5


def make_conv(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int, groups: int
) -> nn.Conv2d:
    """Return a convolution without bias, padded by half a kernel on every side."""
    padding = kernel_size // 2
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
    )


def make_batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return the batch norm that all five networks use."""
    return nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPS)


def pool_to_vector(features: Tensor) -> Tensor:
    """Average over height and width: (B, C, H, W) to (B, C)."""
    return F.adaptive_avg_pool2d(features, 1).flatten(1)


def run_stages(stages: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Return the outputs of all stages, each of which takes the one before it."""
    outputs = []
    for stage in stages:
        x = stage(x)
        outputs.append(x)
    return outputs


class ConvBnAct(nn.Module):
    """Convolution, batch norm, activation; the unit of the VoVNet and the CSP network."""

    conv_bn_pairs: ClassVar[ConvBnPairs] = (("conv", "bn"),)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.conv = make_conv(in_channels, out_channels, kernel_size, stride=stride, groups=1)
        self.bn = make_batch_norm(out_channels)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class LinearHead(nn.Module):
    """Average pool and linear classifier; without classes, the pool alone."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, features: Tensor, *, pre_logits: bool) -> Tensor:
        """Map (B, C, H, W) to (B, num_classes), or to (B, C) with ``pre_logits``."""
        embedding = pool_to_vector(features)
        return embedding if pre_logits else self.fc(embedding)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all channels."""

    def __init__(
        self, channels: int, squeeze_channels: int, *, activation: Activation, gate: Activation
    ) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, squeeze_channels, 1)
        self.act = activation()
        self.conv_expand = nn.Conv2d(squeeze_channels, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, C, H, W)."""
        squeezed = self.act(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        gate: Tensor = self.gate(self.conv_expand(squeezed))
        return x * gate


@dataclass(frozen=True, slots=True)
class InvertedResidualShape:
    """Sizes of an inverted residual block.

    Attributes:
        in_channels: Channels of its input.
        mid_channels: Channels of its depthwise convolution.
        out_channels: Channels of its output.
        kernel_size: Side of the depthwise kernel.
        stride: Stride of the depthwise convolution.
        squeeze_channels: Inner width of its squeeze-and-excite; 0 for none.
    """

    in_channels: int
    mid_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    squeeze_channels: int

    @property
    def has_skip(self) -> bool:
        """Whether the input is added to the output, which needs both of one shape."""
        return self.stride == 1 and self.in_channels == self.out_channels


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excite, 1x1 projection, skip."""

    conv_bn_pairs: ClassVar[ConvBnPairs] = (
        ("conv_pw", "bn1"),
        ("conv_dw", "bn2"),
        ("conv_pwl", "bn3"),
    )

    def __init__(
        self, shape: InvertedResidualShape, *, activation: Activation, gate: Activation
    ) -> None:
        super().__init__()
        mid = shape.mid_channels
        self.has_skip = shape.has_skip
        self.act = activation()
        self.conv_pw = make_conv(shape.in_channels, mid, 1, stride=1, groups=1)
        self.bn1 = make_batch_norm(mid)
        self.conv_dw = make_conv(mid, mid, shape.kernel_size, stride=shape.stride, groups=mid)
        self.bn2 = make_batch_norm(mid)
        self.se: nn.Module = nn.Identity()
        if shape.squeeze_channels:
            self.se = SqueezeExcite(mid, shape.squeeze_channels, activation=activation, gate=gate)
        self.conv_pwl = make_conv(mid, shape.out_channels, 1, stride=1, groups=1)
        self.bn3 = make_batch_norm(shape.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, ceil(H / stride), ceil(W / stride))."""
        y = self.act(self.bn1(self.conv_pw(x)))
        y = self.se(self.act(self.bn2(self.conv_dw(y))))
        y = self.bn3(self.conv_pwl(y))
        z: Tensor = x + y if self.has_skip else y
        return z
