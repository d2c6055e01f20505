"""The five backbones: native PyTorch, with the state dicts of their published checkpoints."""

import os
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import nn

from pipeline.backbones.config import BackboneConfig
from pipeline.backbones.cspdarknet import CspDarknet
from pipeline.backbones.efficientnetv2 import EfficientNetV2
from pipeline.backbones.fbnetv3 import FbNetV3
from pipeline.backbones.optimize import optimize_for_inference
from pipeline.backbones.registry import find_backbone, list_backbones
from pipeline.backbones.resnetv2 import ResNetV2
from pipeline.backbones.vovnet import VovNet
from pipeline.backbones.weights import (
    LoadedWeights,
    apply_weights,
    encode_weights,
    load_weights,
    save_weights,
    weights_digest,
)
from pipeline.errors import SettingsError

__all__ = [
    "Backbone",
    "BackboneConfig",
    "LoadedWeights",
    "create_backbone",
    "encode_weights",
    "find_backbone",
    "list_backbones",
    "load_weights",
    "optimize_for_inference",
    "save_weights",
    "weights_digest",
]

Backbone: TypeAlias = CspDarknet | EfficientNetV2 | FbNetV3 | ResNetV2 | VovNet

_PRETRAINED_CLASSES = 1000


def create_backbone(
    name: str,
    *,
    weights: str | os.PathLike[str] | LoadedWeights | None = "pretrained",
    pretrained: bool | None = None,
    num_classes: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
) -> Backbone:
    """Build a backbone, in evaluation mode on the CPU.

    Args:
        name: One of ``list_backbones()``.
        weights: ``"pretrained"`` (the hub's), a path or URI of a checkpoint, ``"random:<seed>"``,
            weights loaded before, or None for PyTorch's default initialisation.
        pretrained: As in timm: True is the ``weights`` ``"pretrained"``, False is None.
        num_classes: None for the 1000-way classifier of the weights; 0 for none, so that a call
            returns the pooled embedding (B, embedding_dim); n for a classifier of n, which is the
            checkpoint's if that has n classes, and a fresh one otherwise.
        features_only: A call returns the list of feature maps that ``feature_info`` describes.
        out_indices: Which of them, counted from 0, or from the end where negative; they keep their
            order.

    Raises:
        UnknownBackboneError: No backbone has this name; the message names the nearest one.
        WeightsError: The weights cannot be found, cannot be read, or do not fit.
        SettingsError: ``num_classes`` is negative, there is no such feature map, or both
            ``weights`` and ``pretrained`` are given.
    """
    config = find_backbone(name)
    if pretrained is not None:
        if weights != "pretrained":
            raise SettingsError("weights and pretrained are both given; give one of them")
        weights = "pretrained" if pretrained else None
    chosen = None
    if out_indices is not None:
        if not features_only:
            raise SettingsError("out_indices chooses feature maps; give features_only=True as well")
        chosen = _resolve_indices(out_indices, len(config.network.feature_info), config.name)
    if num_classes is not None and num_classes < 0:
        raise SettingsError(f"num_classes is {num_classes}; use 0 for embeddings, or more")
    classes = _PRETRAINED_CLASSES if num_classes is None else num_classes
    if weights is None:
        return _build(config, classes, features_only, chosen)
    loaded = weights if isinstance(weights, LoadedWeights) else load_weights(name, weights)
    with torch.device("meta"):
        backbone = _build(config, classes, features_only, chosen)
    backbone.to_empty(device="cpu")  # saves the time to initialise what the weights replace
    classifier = backbone.get_submodule(config.classifier)
    if isinstance(classifier, nn.Conv2d | nn.Linear):
        classifier.reset_parameters()
    apply_weights(backbone, loaded, config=config, keep_classifier=num_classes is None)
    return backbone


def _build(
    config: BackboneConfig,
    num_classes: int,
    features_only: bool,
    chosen: tuple[int, ...] | None,
) -> Backbone:
    backbone: Backbone = config.network(
        config, num_classes=num_classes, features_only=features_only
    )
    if chosen is not None:
        backbone.choose_maps(chosen)
    return backbone.eval()


def _resolve_indices(indices: Sequence[int], number: int, name: str) -> tuple[int, ...]:
    if any(not -number <= index < number for index in indices) or not indices:
        raise SettingsError(
            f"out_indices is {tuple(indices)}; the feature maps of {name} are 0 to {number - 1}, "
            f"or -{number} to -1 from the end"
        )
    return tuple(sorted({index % number for index in indices}))
