"""A batch of pictures of any sizes, in torch and in Triton, against one picture after the other."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.images.ragged import StoredPicture, has_triton, resize_and_crop_batch
from pipeline.images.resize import DataConfig, resize_and_crop

SIDES = st.one_of(st.integers(1, 12), st.integers(1, 160))
PICTURES = st.lists(
    st.tuples(SIDES, SIDES, st.integers(1, 8), st.booleans()).filter(
        lambda p: max(p[:2]) <= 40 * min(p[:2])
    ),
    min_size=1,
    max_size=5,
)
NO_SCALE = ((0,) * 3, (1,) * 3)
Picture = tuple[int, int, int, bool]


def check_batch(pictures: list[Picture], data_config: DataConfig, *, device: str = "cpu") -> None:
    """Compare the crops of random pictures with those made one by one."""
    rng = np.random.default_rng(len(pictures))
    arrays = [rng.integers(0, 256, (p[1], p[0], 3), np.uint8) for p in pictures]
    stored, flat, offset = [], [], 0
    for array, (width, height, turn, planar) in zip(arrays, pictures, strict=True):
        stored.append(StoredPicture(offset, width, height, turn, planar))
        flat.append((array.transpose(2, 0, 1) if planar else array).ravel())
        offset += array.size
    samples = torch.from_numpy(np.concatenate(flat)).to(device)
    found = resize_and_crop_batch(samples, stored, data_config)
    assert found.dtype == torch.uint8
    for array, picture, crop in zip(arrays, stored, found.cpu(), strict=True):
        expected = resize_and_crop(array, data_config, turn=picture.turn)
        assert np.array_equal(crop.numpy(), expected)


@given(
    pictures=PICTURES,
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    image_size=st.sampled_from([32, 45]),
    crop_pct=st.sampled_from([0.875, 0.95, 1.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_ragged_batch_has_the_bits_of_single_pictures(
    pictures: list[Picture], interpolation: str, image_size: int, crop_pct: float
) -> None:
    check_batch(pictures, DataConfig(image_size, crop_pct, interpolation, *NO_SCALE))


@pytest.mark.parametrize("size", [(300, 90), (90, 300), (1, 33), (600, 1300)])
@pytest.mark.parametrize("planar", [False, True])
def test_a_picture_taller_than_wide_is_resized_in_pillows_order(
    size: tuple[int, int], planar: bool
) -> None:
    check_batch([(*size, 1, planar)], DataConfig(64, 0.9, "bicubic", *NO_SCALE))


@pytest.mark.skipif(not has_triton(), reason="Triton comes with PyTorch's builds for CUDA alone")
def test_the_kernels_have_the_bits_of_single_pictures() -> None:
    """In Triton's interpreter, which has to be chosen before Triton is imported."""
    program = f"import {__name__} as this; this.check_kernels()"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def check_kernels() -> None:
    from pipeline.images import ragged

    asked = []
    ragged.resize_by_torch = lambda *_: asked.append(1)  # type: ignore[assignment,return-value]
    ragged.use_triton = lambda _: True  # type: ignore[assignment]
    sizes = [(1, 33), (90, 40), (40, 90), (37, 41), (100, 12)]
    pictures = [(*size, turn, turn % 2 == 0) for turn, size in enumerate(sizes * 2, 1) if turn < 9]
    for interpolation in ("bicubic", "bilinear"):
        check_batch(pictures, DataConfig(32, 0.9, interpolation, *NO_SCALE))
    assert not asked


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_the_bits_of_single_pictures() -> None:
    sizes = [(500, 375), (375, 500), (33, 1), (1200, 900), (2000, 100), (90, 30), (256, 256)]
    pictures = [(*size, turn, turn % 2 == 0) for turn, size in enumerate(sizes, 1)]
    check_batch(pictures, DataConfig(224, 0.95, "bicubic", *NO_SCALE), device="cuda")
