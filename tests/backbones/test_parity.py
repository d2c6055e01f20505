"""Every number a backbone gives, against the library that the checkpoints come from."""

import pytest
import timm
import torch

from pipeline.backbones import create_backbone, find_backbone
from pipeline.images.transforms import resolve_data_config

TOLERANCE = 1e-5  # of the largest absolute value, float32
ODD_SIZE = 161


def relative_error(ours, reference):
    assert ours.shape == reference.shape
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def draw_images(size, *, batch=1):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def run_reference(model, images):
    """Return logits, embedding, features and the tapped maps, from one forward pass."""
    maps = []
    hooks = [
        model.get_submodule(tap["module"]).register_forward_hook(
            lambda module, inputs, output: maps.append(output.clone())
        )
        for tap in model.feature_info
    ]
    features = model.forward_features(images)
    for hook in hooks:
        hook.remove()
    embedding = model.forward_head(features, pre_logits=True)
    return model.forward_head(features), embedding, features, maps


def sizes(name):
    config = find_backbone(name)
    return sorted({config.image_size, config.test_image_size, ODD_SIZE})


def test_all_numbers_equal_the_reference_at_train_test_and_odd_sizes(name, seeded_weights):
    backbone = create_backbone(name, weights=seeded_weights(name))
    reference = timm.create_model(name, pretrained=False).eval()
    reference.load_state_dict(backbone.state_dict(), strict=True)
    for size in sizes(name):
        images = draw_images(size)
        with torch.inference_mode():
            logits, embedding, features, maps = run_reference(reference, images)
            ours = backbone.forward_features(images)
            our_maps = backbone.forward_maps(images)
            assert relative_error(backbone.forward_head(ours), logits) <= TOLERANCE
            our_embedding = backbone.forward_head(ours, pre_logits=True)
        assert relative_error(our_embedding, embedding) <= TOLERANCE
        assert relative_error(ours, features) <= TOLERANCE
        assert len(our_maps) == len(maps)
        for our_map, their_map in zip(our_maps, maps, strict=True):
            assert relative_error(our_map, their_map) <= TOLERANCE


def test_calls_equal_the_reference_in_each_of_the_three_forms(name, seeded_weights):
    weights = seeded_weights(name)
    images = draw_images(65, batch=2)
    full = create_backbone(name, weights=weights)
    reference = timm.create_model(name, pretrained=False).eval()
    reference.load_state_dict(full.state_dict())
    headless = timm.create_model(name, pretrained=False, num_classes=0).eval()
    headless.load_state_dict(create_backbone(name, weights=weights, num_classes=0).state_dict())
    with torch.inference_mode():
        assert relative_error(full(images), reference(images)) <= TOLERANCE
        embedding = create_backbone(name, weights=weights, num_classes=0)(images)
        assert relative_error(embedding, headless(images)) <= TOLERANCE


def test_feature_maps_equal_those_of_the_references_own_feature_extractor(name, seeded_weights):
    backbone = create_backbone(name, weights=seeded_weights(name), features_only=True)
    extractor = timm.create_model(name, pretrained=False, features_only=True).eval()
    flattened = {key.replace("stem.", "stem_").replace("stages.", "stages_"): value
                 for key, value in backbone.state_dict().items()}  # fmt: skip
    expected = extractor.state_dict().keys()
    source = flattened if flattened.keys() >= expected else backbone.state_dict()
    extractor.load_state_dict({key: source[key] for key in expected})
    images = draw_images(95)
    with torch.inference_mode():
        maps, expected_maps = backbone(images), extractor(images)
    assert len(maps) == len(expected_maps)
    for our_map, their_map in zip(maps, expected_maps, strict=True):
        assert relative_error(our_map, their_map) <= TOLERANCE


def test_described_maps_and_widths_are_the_references(name):
    with torch.device("meta"):
        backbone = create_backbone(name, weights=None)
        reference = timm.create_model(name, pretrained=False)
    described = [(tap["module"], tap["num_chs"], tap["reduction"]) for tap in backbone.feature_info]
    assert described == [
        (tap["module"], tap["num_chs"], tap["reduction"]) for tap in reference.feature_info
    ]
    assert backbone.num_features == reference.num_features
    assert backbone.embedding_dim == reference.head_hidden_size


@pytest.mark.parametrize("num_classes", [0, 10, 1000])
def test_state_dicts_have_the_references_keys_shapes_and_types(name, num_classes):
    with torch.device("meta"):
        ours = create_backbone(name, weights=None, num_classes=num_classes).state_dict()
        reference = timm.create_model(name, pretrained=False, num_classes=num_classes)
    theirs = reference.state_dict()
    assert [(key, value.shape, value.dtype) for key, value in ours.items()] == [
        (key, value.shape, value.dtype) for key, value in theirs.items()
    ]


@pytest.mark.parametrize("use_test_size", [False, True])
def test_data_configs_are_the_references(name, use_test_size):
    with torch.device("meta"):
        reference = timm.create_model(name, pretrained=False, num_classes=0)
    theirs = timm.data.resolve_model_data_config(reference, use_test_size=use_test_size)
    ours = resolve_data_config(name, use_test_size=use_test_size)
    assert (3, ours.image_size, ours.image_size) == theirs["input_size"]
    assert ours.crop_pct == theirs["crop_pct"]
    assert ours.interpolation == theirs["interpolation"]
    assert ours.mean == theirs["mean"]
    assert ours.std == theirs["std"]


def test_the_seeded_weights_leave_no_batch_norm_or_bias_at_its_default(name, seeded_weights):
    for key, tensor in seeded_weights(name).state_dict.items():
        if tensor.is_floating_point():
            assert not torch.all(tensor == 0), key
            assert not torch.any(tensor == 1), key
