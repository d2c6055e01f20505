"""Preprocessing, bit for bit against the reference's evaluation transform."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pipeline.backbones import create_backbone, list_backbones
from pipeline.errors import SettingsError, UnknownBackboneError
from pipeline.images.resize import DataConfig, resize_and_crop
from pipeline.images.transforms import create_transform, normalise, resolve_data_config

ORDINARY_SIZES = [(1, 1), (2, 1), (31, 33), (256, 256), (500, 375), (375, 500), (1600, 1200)]
LONG_SIZES = [(1, 16), (1, 17), (10, 300), (300, 10), (235, 3999), (3999, 235)]
LONGER_SIZES = [(10, 2000), (3000, 5), (400, 6500), (6500, 400), (1000, 17_000), (17_000, 1000)]


def draw_image(size, seed=0):
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def reference_transform(name, *, use_test_size=False, image_size=None):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    settings = timm.data.resolve_model_data_config(model, use_test_size=use_test_size)
    if image_size is not None:
        settings["input_size"] = (3, image_size, image_size)
    return timm.data.create_transform(**settings, is_training=False)


def draw_sizes(seed, *, count, longest):
    return [tuple(size) for size in np.random.default_rng(seed).integers(1, longest, (count, 2))]


@pytest.mark.parametrize("use_test_size", [False, True])
@pytest.mark.parametrize("name", list_backbones())
def test_a_picture_of_any_size_becomes_the_references_bits(name, use_test_size):
    reference = reference_transform(name, use_test_size=use_test_size)
    transform = create_transform(resolve_data_config(name, use_test_size=use_test_size))
    for size in ORDINARY_SIZES + LONG_SIZES + draw_sizes(1, count=10, longest=600):
        image = draw_image(size)
        assert torch.equal(transform(image), reference(image)), size


@pytest.mark.parametrize("name", ["resnetv2_50.a1h_in1k", "fbnetv3_b.ra2_in1k"])
@pytest.mark.parametrize("size", LONGER_SIZES)
def test_a_long_strip_scaled_up_or_down_becomes_the_references_bits(name, size):
    image = draw_image(size)
    transform = create_transform(resolve_data_config(name))
    assert torch.equal(transform(image), reference_transform(name)(image))


@pytest.mark.parametrize("image_size", [32, 192, 333])
def test_another_size_keeps_the_references_crop_and_bits(image_size):
    name = "cspdarknet53.ra_in1k"
    transform = create_transform(resolve_data_config(name).with_size(image_size))
    reference = reference_transform(name, image_size=image_size)
    for size in [(500, 375), (333, 376), (40, 900)]:
        image = draw_image(size)
        assert torch.equal(transform(image), reference(image)), size


@pytest.mark.parametrize("size", [(1, 65_500), (65_500, 1), (3, 3_000_000)])
def test_a_strip_with_an_impossible_resize_is_cropped_all_the_same(size):
    crop = resize_and_crop(draw_image(size), resolve_data_config("resnetv2_50.a1h_in1k"))
    assert crop.shape == (224, 224, 3)
    assert crop.std() > 10


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr"])
def test_a_picture_of_another_mode_is_converted_first(mode):
    image = draw_image((60, 50)).convert(mode)
    name = "ese_vovnet19b_dw.ra_in1k"
    actual = create_transform(resolve_data_config(name))(image)
    assert torch.equal(actual, reference_transform(name)(image.convert("RGB")))


def test_a_crop_of_another_mode_is_refused():
    with pytest.raises(ValueError, match="has mode CMYK; convert it to RGB first"):
        resize_and_crop(Image.new("CMYK", (9, 9)), resolve_data_config("fbnetv3_b.ra2_in1k"))


@pytest.mark.parametrize("name", list_backbones())
def test_the_two_halves_give_a_batch_the_bits_of_single_pictures(name):
    data_config = resolve_data_config(name)
    images = [draw_image((300, 200), seed) for seed in range(3)]
    crops = np.stack([resize_and_crop(image, data_config) for image in images])
    batch = normalise(torch.from_numpy(crops), data_config)
    assert crops.dtype == np.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    transform = create_transform(data_config)
    assert torch.equal(batch, torch.stack([transform(image) for image in images]))


def test_normalising_leaves_the_crops_as_they_were():
    crops = torch.full((1, 32, 32, 3), 200, dtype=torch.uint8)
    normalise(crops, resolve_data_config("fbnetv3_b.ra2_in1k"))
    assert torch.all(crops == 200)


def test_a_single_tensor_is_contiguous_float32_with_channels_first():
    tensor = create_transform(resolve_data_config("fbnetv3_b.ra2_in1k"))(draw_image((300, 240)))
    assert tensor.shape == (3, 224, 224)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()


def test_a_backbone_resolves_to_what_its_name_resolves_to():
    backbone = create_backbone("fbnetv3_b.ra2_in1k", weights=None, num_classes=0)
    assert resolve_data_config(backbone) == resolve_data_config("fbnetv3_b.ra2_in1k")
    assert resolve_data_config(backbone, use_test_size=True).image_size == 256


def test_an_unknown_name_has_no_data_config():
    with pytest.raises(UnknownBackboneError, match=r"did you mean 'fbnetv3_b\.ra2_in1k'"):
        resolve_data_config("fbnetv3_c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 31}, "image_size is 31; it must be at least 32 pixels"),
        ({"crop_pct": 0.0}, "crop_pct is 0.0; it must be above 0 and up to 1"),
        ({"crop_pct": 1.1}, "crop_pct is 1.1; it must be above 0 and up to 1"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest'; use one of bicubic, bilinear"),
    ],
)
def test_a_data_config_guards_its_values(changes, message):
    values = {
        "image_size": 224,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    with pytest.raises(SettingsError, match=message):
        DataConfig(**values | changes)
