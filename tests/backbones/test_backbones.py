"""What every backbone promises, whatever its family."""

import pickle

import pytest
import timm
import torch

from pipeline.backbones import create_backbone, find_backbone, list_backbones
from pipeline.errors import SettingsError, UnknownBackboneError

WIDTHS = {
    "cspdarknet53.ra_in1k": 1024,
    "efficientnetv2_rw_m.agc_in1k": 2152,
    "ese_vovnet19b_dw.ra_in1k": 1024,
    "fbnetv3_b.ra2_in1k": 1984,
    "resnetv2_50.a1h_in1k": 2048,
}
# (size, channels and sides of the maps) as the model cards list them
CARD_MAPS = {
    "cspdarknet53.ra_in1k": (
        256,
        [(32, 256), (64, 128), (128, 64), (256, 32), (512, 16), (1024, 8)],
    ),
    "efficientnetv2_rw_m.agc_in1k": (
        320,
        [(32, 160), (56, 80), (80, 40), (192, 20), (328, 10)],
    ),
    "ese_vovnet19b_dw.ra_in1k": (224, [(64, 112), (256, 56), (512, 28), (768, 14), (1024, 7)]),
    "fbnetv3_b.ra2_in1k": (224, [(16, 112), (24, 56), (40, 28), (120, 14), (1344, 7)]),
    "resnetv2_50.a1h_in1k": (224, [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]),
}


def sketch(name, **settings):
    """Return a backbone of shapes without numbers, on which a call costs nothing."""
    with torch.device("meta"):
        return create_backbone(name, weights=None, **settings)


def draw_shapes(size):
    return torch.empty(2, 3, size, size, device="meta")


def test_there_are_five_backbones():
    assert list_backbones() == sorted(WIDTHS)


def test_a_call_gives_1000_logits_n_logits_or_the_embedding(name):
    for num_classes, width in ((None, 1000), (7, 7), (0, WIDTHS[name])):
        backbone = sketch(name, num_classes=num_classes)
        assert not backbone.training
        assert backbone(draw_shapes(64)).shape == (2, width)
        assert backbone.embedding_dim == WIDTHS[name]
        assert backbone.config.name == name


def test_feature_maps_have_the_shapes_of_the_card(name):
    size, expected = CARD_MAPS[name]
    maps = sketch(name, features_only=True)(draw_shapes(size))
    assert [tuple(m.shape) for m in maps] == [(2, width, side, side) for width, side in expected]


def test_feature_maps_come_at_any_size_with_their_described_widths(name):
    backbone = sketch(name, features_only=True)
    for size in (32, 161):
        maps = backbone(draw_shapes(size))
        assert [m.shape[1] for m in maps] == [tap["num_chs"] for tap in backbone.feature_info]


def test_without_classes_a_call_is_the_head_before_the_logits(name, seeded_weights):
    weights = seeded_weights(name)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    full = create_backbone(name, weights=weights)
    headless = create_backbone(name, weights=weights, num_classes=0)
    with torch.inference_mode():
        features = full.forward_features(images)
        embedding = full.forward_head(features, pre_logits=True)
        assert torch.equal(headless(images), embedding)
        assert torch.equal(full(images), full.forward_head(features))
    assert torch.equal(headless.forward_head(features), embedding)


def test_top_five_classes_come_with_their_probabilities(name, seeded_weights):
    backbone = create_backbone(name, weights=seeded_weights(name))
    with torch.inference_mode():
        logits = backbone(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    probabilities, indices = torch.topk(logits.softmax(dim=1), k=5)
    assert torch.all(probabilities.diff() <= 0)
    assert torch.all((indices >= 0) & (indices < 1000))


def test_a_batch_of_eight_equals_eight_batches_of_one(name, seeded_weights):
    backbone = create_backbone(name, weights=seeded_weights(name), num_classes=0)
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = backbone(images)
        alone = torch.cat([backbone(image[None]) for image in images])
    assert (together - alone).abs().max() <= 1e-5 * together.abs().max()


def test_a_backbone_survives_pickling(name, seeded_weights):
    backbone = create_backbone(name, weights=seeded_weights(name), num_classes=0)
    copy = pickle.loads(pickle.dumps(backbone))
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(copy(images), backbone(images))
    assert copy.config == backbone.config


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("resnetv2_50.a1_in1k", "resnetv2_50.a1h_in1k"),
        ("timm/resnetv2_50.", "resnetv2_50.a1h_in1k"),
        ("timm/resnetv2_50x1_bit", "resnetv2_50.a1h_in1k"),
        ("hf-hub:someone/resnetv2_50.a1h_in1k", "resnetv2_50.a1h_in1k"),
        ("cspdarknet53.wrong_tag", "cspdarknet53.ra_in1k"),
        ("efficientnetv2_m", "efficientnetv2_rw_m.agc_in1k"),
        ("vovnet19b", "ese_vovnet19b_dw.ra_in1k"),
        ("", ""),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(wrong, nearest):
    with pytest.raises(UnknownBackboneError) as caught:
        create_backbone(wrong, weights=None)
    assert f"unknown backbone {wrong!r}; did you mean '{nearest}" in str(caught.value)
    assert "Known are cspdarknet53.ra_in1k, " in str(caught.value)


@pytest.mark.parametrize("name", list_backbones())
@pytest.mark.parametrize("prefix", ["", "timm/", "timm:", "hf-hub:timm/", "hf_hub:timm/"])
def test_timms_forms_of_a_name_are_the_same_backbone(name: str, prefix: str):
    for form in (name, name.split(".")[0]):
        assert find_backbone(prefix + form).name == name
        known = timm.models.get_pretrained_cfg(form)
        assert f"{known.architecture}.{known.tag}" == name


def test_a_negative_number_of_classes_is_refused():
    with pytest.raises(SettingsError, match="num_classes is -1; use 0 for embeddings, or more"):
        create_backbone("fbnetv3_b.ra2_in1k", weights=None, num_classes=-1)


def test_without_weights_a_backbone_has_finite_default_ones():
    backbone = create_backbone("fbnetv3_b.ra2_in1k", weights=None)
    assert all(parameter.isfinite().all() for parameter in backbone.parameters())
    assert backbone.classifier.weight.std() > 0
