import pytest
import torch
from torch import nn

from pipeline.backbones import create_backbone, optimize_for_inference

TOLERANCE = 1e-4  # of the largest absolute value
# those after a sum or a pool: no convolution can absorb them
UNFOLDABLE = {"resnetv2_50.a1h_in1k": 17}


def draw_images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("num_classes", [0, None])
def test_the_inference_form_gives_the_same_embeddings_and_logits(name, num_classes, seeded_weights):
    backbone = create_backbone(name, weights=seeded_weights(name), num_classes=num_classes)
    optimized = optimize_for_inference(backbone)
    images = draw_images(129)
    with torch.inference_mode():
        expected, actual = backbone(images), optimized(images)
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_the_inference_form_gives_the_same_feature_maps(name, seeded_weights):
    backbone = create_backbone(name, weights=seeded_weights(name), features_only=True)
    images = draw_images(64)
    with torch.inference_mode():
        pairs = zip(optimize_for_inference(backbone)(images), backbone(images), strict=True)
    for actual, expected in pairs:
        assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_every_batch_norm_that_can_be_folded_is_gone(name):
    optimized = optimize_for_inference(create_backbone(name, weights=None, num_classes=0))
    norms = [module for module in optimized.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == UNFOLDABLE.get(name, 0)


def test_channels_stay_innermost_in_memory_all_the_way(name):
    optimized = optimize_for_inference(create_backbone(name, weights=None, num_classes=0))
    channel_strides = []
    for module in optimized.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda module, inputs, output: channel_strides.append(inputs[0].stride(1))
            )
    with torch.inference_mode():
        optimized(draw_images(64).to(memory_format=torch.channels_last))
    assert set(channel_strides) == {1}


def test_the_original_is_left_as_it_was_and_folding_twice_is_folding_once(seeded_weights):
    name = "fbnetv3_b.ra2_in1k"
    backbone = create_backbone(name, weights=seeded_weights(name), num_classes=0)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    once = optimize_for_inference(backbone)
    twice = optimize_for_inference(once)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    images = draw_images(32)
    with torch.inference_mode():
        assert torch.equal(once(images), twice(images))


def test_the_inference_form_runs_in_half_the_bytes(name, seeded_weights):
    backbone = create_backbone(name, weights=seeded_weights(name), num_classes=0)
    images = draw_images(64)
    with torch.inference_mode():
        expected = backbone(images)
        optimized = optimize_for_inference(backbone).to(torch.bfloat16)
        actual = optimized(images.to(torch.bfloat16)).float()
    assert torch.all(torch.cosine_similarity(actual, expected) > 0.98)
