"""The form of a backbone that runs in production: same embeddings, less work.

Plain PyTorch, for CPU and GPU alike. What compiles or exports a network starts from here.
"""

import copy

import torch
from torch import nn


def optimize_for_inference(backbone: nn.Module) -> nn.Module:
    """Return a copy with batch norms folded into convolutions, in channels-last layout.

    Everything a backbone offers stays; its state dict is no longer a checkpoint's. Embeddings
    differ by rounding only. Batch norms that follow a sum or a pool have no convolution to go to
    and stay.
    """
    optimized = copy.deepcopy(backbone).eval().requires_grad_(False)
    for module in list(optimized.modules()):
        for conv, norm in getattr(module, "conv_bn_pairs", ()):
            _fold(module, conv, norm)
    return optimized.to(memory_format=torch.channels_last)


def _fold(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = parent.get_submodule(conv_name), parent.get_submodule(norm_name)
    if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
        return  # folded already
    # in float64, so that the folded weights are off by one rounding only
    mean, variance, weight, bias = (
        tensor.detach().double()
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        if tensor is not None
    )
    scale = weight / torch.sqrt(variance + norm.eps)
    folded = conv.weight.double() * scale[:, None, None, None]
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(folded.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter((bias - mean * scale).to(dtype), requires_grad=False)
    setattr(parent, norm_name, nn.Identity())
