"""The lines of the model cards, with timm's names and with ours."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import pipeline
from pipeline.backbones import list_backbones, load_weights
from pipeline.errors import SettingsError

INDICES = [(0, 2), (-1,), (1, 3, -1), [4], range(2, 5)]


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (120, 150, 3), np.uint8)
    return Image.fromarray(pixels)


def test_the_lines_of_the_card_give_what_they_give_there(
    name: str, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_weights(name, "random:0")
    monkeypatch.setattr(pipeline.backbones, "load_weights", lambda *_: weights)
    theirs = timm.create_model(name, pretrained=False).eval()
    theirs.load_state_dict(weights.state_dict)
    their_config = timm.data.resolve_model_data_config(theirs)
    their_transform = timm.data.create_transform(**their_config, is_training=False)

    model = pipeline.create_backbone(name, pretrained=True)
    data_config = pipeline.resolve_data_config(model)
    transforms = pipeline.create_transform(**data_config, is_training=False)

    ours, expected = transforms(picture), their_transform(picture)
    assert torch.equal(ours, expected)
    with torch.no_grad():
        output, reference = model(ours.unsqueeze(0)), theirs(expected.unsqueeze(0))
    _, ours_top = torch.topk(output.softmax(dim=1) * 100, k=5)
    _, theirs_top = torch.topk(reference.softmax(dim=1) * 100, k=5)
    assert torch.equal(ours_top, theirs_top)


@pytest.mark.parametrize("indices", INDICES, ids=str)
def test_chosen_feature_maps_are_those_that_timm_chooses(name: str, indices) -> None:
    weights = load_weights(name, "random:0")
    ours = pipeline.create_backbone(name, weights=weights, features_only=True, out_indices=indices)
    with torch.device("meta"):
        theirs = timm.create_model(
            name, pretrained=False, features_only=True, out_indices=tuple(indices)
        )
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    assert ours.feature_info.module_name() == [
        item["module"] for item in theirs.feature_info.get_dicts()
    ]
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = ours(images)
        every = pipeline.create_backbone(name, weights=weights, features_only=True)(images)
    chosen = sorted(index % len(every) for index in indices)
    assert [m.shape[1] for m in maps] == ours.feature_info.channels()
    for found, index in zip(maps, chosen, strict=True):
        torch.testing.assert_close(found, every[index])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_indices": (1,)}, "out_indices chooses feature maps; give features_only=True"),
        (
            {"out_indices": (5,), "features_only": True},
            r"out_indices is \(5,\); the feature maps of fbnetv3_b.* are 0 to 4, or -5 to -1",
        ),
        ({"out_indices": (), "features_only": True}, r"out_indices is \(\); the feature maps"),
        ({"pretrained": True, "weights": None}, "weights and pretrained are both given"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        pipeline.create_backbone("fbnetv3_b", **arguments)


def test_an_untrained_backbone_is_asked_for_as_in_timm() -> None:
    backbone = pipeline.create_backbone("fbnetv3_b.ra2_in1k", pretrained=False, num_classes=0)
    assert backbone.blocks[0][0].bn1.running_mean.abs().max() == 0


def test_backbones_are_listed_by_a_pattern() -> None:
    assert list_backbones("res*") == ["resnetv2_50.a1h_in1k"]
    assert list_backbones("*50*") == ["resnetv2_50.a1h_in1k"]
    assert list_backbones("nothing") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_training": True}, "this transform is for evaluation only"),
        ({"input_size": (3, 224, 224)}, "the fields of a data config are image_size, crop_pct"),
        ({}, "the fields of a data config are image_size, crop_pct"),
    ],
)
def test_a_transform_that_cannot_be_made_is_refused(arguments, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        pipeline.create_transform(**arguments)
