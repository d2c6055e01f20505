"""JPEGs decoded past Pillow against JPEGs decoded by Pillow."""

import io
import itertools
import warnings

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode, make_hostile_pictures, make_picture
from PIL import Image

from pipeline.errors import RecordError
from pipeline.images import jpeg
from pipeline.images.decode import ImageLimits, decode_image, read_header

LIMITS = ImageLimits()
PILLOWS_SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
OTHER_SUBSAMPLINGS = ("440", "411")


def draw_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(make_picture(seed, size)) + noise).clip(0, 255).astype("u1"))


def decode_by_pillow(data: bytes, draft_size: int | None = None) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    if draft_size:
        image.draft(None, (draft_size, draft_size))
    return np.asarray(image.convert("RGB"))


def describe(data: bytes, draft_size: int | None = None) -> object:
    """Return all that comes of an image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = decode_image(data, limits=LIMITS, draft_size=draft_size)
        except RecordError as error:
            return error.status, error.reason
    return np.asarray(found.image).tobytes(), found.width, found.height, found.size, found.box


def describe_without(data: bytes, draft_size: int | None = None) -> object:
    """Return what comes of it where only Pillow is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jpeg, "simplejpeg", None)
        return describe(data, draft_size)


def list_jpegs(size: tuple[int, int]) -> list[bytes]:
    picture = draw_picture(3, size)
    found = [
        encode(
            picture, quality=30, icc_profile=bytes(3000), comment=b"none", exif=b"Exif\0\0MM\0*"
        ),
        encode(picture, quality=95, keep_rgb=True),
        encode(picture) + bytes(3000) + encode(picture.rotate(180)),
    ]
    for quality, progressive in itertools.product((30, 95), (False, True)):
        options = {"quality": quality, "progressive": progressive}
        found.append(encode(picture.convert("L"), **options))
        for subsampling, interval in itertools.product(PILLOWS_SUBSAMPLINGS, (0, 3)):
            options |= {"subsampling": subsampling, "restart_marker_blocks": interval}
            found.append(encode(picture, **options))
    pixels = np.ascontiguousarray(picture)
    for subsampling in OTHER_SUBSAMPLINGS:
        found.append(simplejpeg.encode_jpeg(pixels, colorsubsampling=subsampling))
    return found


@pytest.mark.parametrize("draft_size", [None, 40])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (17, 16), (131, 97), (96, 203)])
def test_every_kind_of_jpeg_has_pillows_bits(size: tuple[int, int], draft_size: int | None) -> None:
    for data in list_jpegs(size):
        decoded = decode_image(data, limits=LIMITS, draft_size=draft_size)
        assert isinstance(decoded.picture, np.ndarray), "left to Pillow"
        assert np.array_equal(np.asarray(decoded.image), decode_by_pillow(data, draft_size))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "RGB"])
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "TIFF"])
def test_what_is_no_ordinary_jpeg_is_left_to_pillow(kind: str, mode: str) -> None:
    if (kind, mode) == ("PNG", "CMYK") or (kind, mode) == ("PNG", "YCbCr"):
        pytest.skip("there is no such PNG")
    data = encode(draw_picture(1, (60, 50)).convert(mode), kind)
    assert describe(data) == describe_without(data)


def read_headers(data: bytes) -> tuple[object, object]:
    """Return the header as it is read, and as Pillow alone reads it."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = read_header(data, limits=LIMITS)
        patch.setattr(jpeg, "simplejpeg", None)
        return ours, read_header(data, limits=LIMITS)


def test_a_header_is_read_as_by_pillow() -> None:
    found = list_jpegs((17, 16))
    for orientation in range(9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found.append(encode(draw_picture(1, (20, 10)), exif=exif.tobytes()))
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    found.append(encode(draw_picture(1, (20, 10)), xmp=xmp))
    for kind, mode in itertools.product(("JPEG", "MPO", "PNG", "TIFF"), ("CMYK", "L", "RGB")):
        if (kind, mode) != ("PNG", "CMYK"):
            found.append(encode(draw_picture(1, (20, 10)).convert(mode), kind))
    for data in (*found, *(hostile.data for hostile in make_hostile_pictures().values())):
        ours, pillows = read_headers(data)
        assert ours == pillows


@given(
    cut=st.floats(0.01, 1), places=st.lists(st.floats(0, 1), max_size=3), value=st.integers(0, 255)
)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_a_damaged_header_is_read_as_by_pillow_or_not_at_all(
    cut: float, places: list[float], value: int
) -> None:
    data = bytearray(encode(draw_picture(1, (20, 10))))
    for place in places:
        data[int(place**3 * (len(data) - 1))] = value  # mostly near the beginning
    ours, pillows = read_headers(bytes(data[: int(cut * len(data))]))
    assert ours == pillows or pillows is None or ours is None


@given(
    seed=st.integers(0, 30),
    progressive=st.booleans(),
    cut=st.one_of(st.none(), st.floats(0.01, 1)),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    draft_size=st.sampled_from([None, 20]),
)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_a_damaged_jpeg_comes_to_what_it_comes_to_by_pillow(
    seed: int,
    progressive: bool,
    cut: float | None,
    damage: list[tuple[float, int]],
    draft_size: int | None,
) -> None:
    """The same pixels, or the same status for the same reason."""
    data = bytearray(encode(draw_picture(seed, (90, 70)), progressive=progressive))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    if cut is not None:
        del data[int(cut * len(data)) :]
    assert describe(bytes(data), draft_size) == describe_without(bytes(data), draft_size)
