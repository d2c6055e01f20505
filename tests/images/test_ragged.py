"""A batch of pictures of any sizes in torch against one picture after the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.images.ragged import StoredPicture, resize_and_crop_batch
from pipeline.images.resize import DataConfig, resize_and_crop

SIDES = st.one_of(st.integers(1, 12), st.integers(1, 160))
PICTURES = st.lists(
    st.tuples(SIDES, SIDES, st.integers(1, 8)).filter(lambda p: max(p[:2]) <= 40 * min(p[:2])),
    min_size=1,
    max_size=5,
)


@given(
    pictures=PICTURES,
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    image_size=st.sampled_from([32, 45]),
    crop_pct=st.sampled_from([0.875, 0.95, 1.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_ragged_batch_has_the_bits_of_single_pictures(
    pictures: list[tuple[int, int, int]], interpolation: str, image_size: int, crop_pct: float
) -> None:
    rng = np.random.default_rng(len(pictures))
    data_config = DataConfig(image_size, crop_pct, interpolation, (0,) * 3, (1,) * 3)
    arrays = [rng.integers(0, 256, (height, width, 3), np.uint8) for width, height, _ in pictures]
    flat = np.concatenate([array.reshape(-1, 3) for array in arrays])
    offsets = np.cumsum([0, *(width * height for width, height, _ in pictures)])
    stored = [StoredPicture(int(o), *p) for o, p in zip(offsets, pictures, strict=False)]
    found = resize_and_crop_batch(torch.from_numpy(flat), stored, data_config)
    assert found.dtype == torch.uint8
    for array, picture, crop in zip(arrays, stored, found, strict=True):
        expected = resize_and_crop(array, data_config, turn=picture.turn)
        assert np.array_equal(crop.numpy(), expected)


@pytest.mark.parametrize("size", [(300, 90), (90, 300), (1, 33), (600, 1300)])
def test_a_picture_taller_than_wide_is_resized_in_pillows_order(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data_config = DataConfig(64, 0.9, "bicubic", (0,) * 3, (1,) * 3)
    flat = torch.from_numpy(pixels.reshape(-1, 3))
    found = resize_and_crop_batch(flat, [StoredPicture(0, *size)], data_config)
    assert np.array_equal(found[0].numpy(), resize_and_crop(pixels, data_config))
