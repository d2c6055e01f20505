"""Crops against Pillow: its whole resize, then its crop, in every form of the kernel."""

import ctypes

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.images import resample
from pipeline.images.resample import Axis, resize_part, weigh
from pipeline.images.resize import DataConfig, locate_crop, resize_and_crop
from pipeline.images.turns import TURNS

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SIDES = st.one_of(st.integers(1, 40), st.integers(1, 400))
CONFIGS = st.builds(
    DataConfig,
    image_size=st.integers(32, 160),
    crop_pct=st.floats(0.5, 1.0),
    interpolation=st.sampled_from(sorted(FILTERS)),
    mean=st.just((0.0, 0.0, 0.0)),
    std=st.just((1.0, 1.0, 1.0)),
)
TURN = st.sampled_from(sorted(TURNS))

every_picture = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def draw_pixels(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Noise, and everywhere as light or as dark as can be: what overshoots is cut off."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    return np.where(rng.random(noise.shape) < 0.5, noise, noise // 128 * 255).astype(np.uint8)


def crop_by_pillow(image: Image.Image, data_config: DataConfig, turn: int = 1) -> np.ndarray:
    image = image if turn == 1 else image.transpose(TURNS[turn].method)
    new_size, box = locate_crop(image.size, data_config)
    return np.asarray(image.resize(new_size, FILTERS[data_config.interpolation]).crop(box))


@given(size=st.tuples(SIDES, SIDES), data_config=CONFIGS, turn=TURN)
@every_picture
def test_a_crop_has_the_bits_of_a_whole_resize(
    kernel: str, size: tuple[int, int], data_config: DataConfig, turn: int
) -> None:
    assume(data_config.resize_size * max(size) < 8000 * min(size))  # or Pillow fills the memory
    pixels = draw_pixels(size)
    image = Image.fromarray(pixels)
    expected = crop_by_pillow(image, data_config, turn)
    for picture in (pixels, image):
        found = resize_and_crop(picture, data_config, turn=turn)
        assert found.flags.c_contiguous
        assert np.array_equal(found, expected)


@pytest.mark.slow
def test_a_hundred_thousand_crops_have_the_bits_of_a_whole_resize() -> None:
    rng = np.random.default_rng(17)
    for number in range(100_000):
        size = tuple(int(side) for side in np.exp(rng.uniform(0, np.log(500), 2)))
        if max(size) > 30 * min(size):
            size = (size[0], size[0])
        crop_pct = float(rng.uniform(0.5, 1.0))
        name = sorted(FILTERS)[number % 2]
        data_config = DataConfig(int(rng.integers(32, 160)), crop_pct, name, (0,) * 3, (1,) * 3)
        pixels = draw_pixels(size, number)
        expected = crop_by_pillow(Image.fromarray(pixels), data_config)
        assert np.array_equal(resize_and_crop(pixels, data_config), expected), (size, data_config)


@given(
    lengths=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    place=st.tuples(st.floats(0, 0.3), st.floats(0.7, 1.0)),
    interpolation=st.sampled_from(sorted(FILTERS)),
)
@every_picture
def test_the_kernels_weights_are_those_of_numpy(
    kernels: dict[str, ctypes.CDLL | None],
    lengths: tuple[int, int],
    place: tuple[float, float],
    interpolation: str,
) -> None:
    length, new_length = lengths
    begin, end = (float(np.float32(share * length)) for share in place)
    axis = Axis(length, begin, end - begin, new_length, first=0, count=new_length)
    found = []
    for kernel in kernels.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resample, "find_kernel", lambda kernel=kernel: kernel)
            found.append(weigh(axis, FILTERS[interpolation]))
    for weights in found:
        assert np.array_equal(weights.starts, found[0].starts)
        assert np.array_equal(weights.values, found[0].values)
        assert weights.starts.min() >= 0
        assert weights.span[1] <= length


@given(
    size=st.tuples(st.integers(8, 200), st.integers(8, 200)),
    new_size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    margins=st.tuples(*[st.floats(0, 3.9)] * 4),
    interpolation=st.sampled_from(sorted(FILTERS)),
)
@every_picture
def test_a_part_between_pixels_has_pillows_bits(
    kernel: str,
    size: tuple[int, int],
    new_size: tuple[int, int],
    margins: tuple[float, float, float, float],
    interpolation: str,
) -> None:
    """As ``Image.draft`` asks for, and with the aspect ratio changed."""
    left, top = np.float32(margins[:2])
    right, bottom = np.float32(size) - np.float32(margins[2:])
    box = (float(left), float(top), float(right), float(bottom))
    axes = (
        Axis(size[0], box[0], float(right - left), new_size[0], first=0, count=new_size[0]),
        Axis(size[1], box[1], float(bottom - top), new_size[1], first=0, count=new_size[1]),
    )
    pixels, resampling = draw_pixels(size), FILTERS[interpolation]
    expected = np.asarray(Image.fromarray(pixels).resize(new_size, resampling, box))
    found = resize_part(pixels, axes, resample=resampling, turn=TURNS[1])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("size", [(220, 140), (70, 210)])
def test_a_large_picture_of_pillow_is_read_in_bands(
    kernel: str, size: tuple[int, int], turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resample, "_BAND_PIXELS", 1000)
    image = Image.fromarray(draw_pixels(size))
    data_config = DataConfig(64, 0.9, "bicubic", (0,) * 3, (1,) * 3)
    expected = crop_by_pillow(image, data_config, turn)
    assert np.array_equal(resize_and_crop(image, data_config, turn=turn), expected)


def test_pixels_with_gaps_or_upside_down_are_resized_as_they_look(kernel: str) -> None:
    pixels = draw_pixels((90, 80))
    data_config = DataConfig(32, 0.9, "bicubic", (0,) * 3, (1,) * 3)
    for view in (pixels[5:, 7:-9], pixels[::-1], pixels[:, ::2], pixels.swapaxes(0, 1)):
        expected = crop_by_pillow(Image.fromarray(np.ascontiguousarray(view)), data_config)
        assert np.array_equal(resize_and_crop(view, data_config), expected)
