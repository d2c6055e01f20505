import io
import warnings

import numpy as np
import pytest
from pictures import (
    encode,
    make_hostile_pictures,
    make_jpeg,
    make_lying_png,
    make_picture,
    mutate,
)
from PIL import Image, ImageFile, ImageOps

from pipeline.errors import RecordError
from pipeline.images.decode import DecodedImage, ImageLimits, decode_image, image_digest

LIMITS = ImageLimits()
PICTURE = make_picture(1, (61, 47))
ORIENTATIONS = range(1, 9)

KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "jpeg": ("JPEG", {"quality": 90}),
    "progressive jpeg": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "lzw tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "jpeg tiff": ("TIFF", {"compression": "jpeg"}),
    "avif": ("AVIF", {}),
    "jpeg 2000": ("JPEG2000", {}),
    "ppm": ("PPM", {}),
    "qoi": ("QOI", {}),
    "sgi": ("SGI", {}),
    "dds": ("DDS", {}),
    "pcx": ("PCX", {}),
    "tga": ("TGA", {"compression": "tga_rle"}),
}


def decode_pixels(data: bytes, **options: object) -> np.ndarray:
    image = decode_image(data, limits=LIMITS, **options).image
    assert image.mode == "RGB"
    return np.asarray(image)


def reference_pixels(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("name", KINDS)
def test_every_listed_format_decodes_to_the_bits_of_a_plain_convert(name: str) -> None:
    kind, options = KINDS[name]
    data = encode(PICTURE, kind, **options)
    decoded = decode_image(data, limits=LIMITS)
    assert np.array_equal(np.asarray(decoded.image), reference_pixels(data))
    assert (decoded.width, decoded.height, decoded.size, decoded.box) == (61, 47, (61, 47), None)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LAB", "RGBA", "LA"])
def test_any_mode_becomes_rgb_as_a_plain_convert_makes_it(mode: str) -> None:
    image = ImageOps.invert(PICTURE).convert("RGB") if mode == "LAB" else PICTURE.convert(mode)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    data = encode(image, "PNG" if mode in ("RGBA", "LA", "P", "1") else "TIFF")
    for exif in ("apply", "ignore"):
        assert np.array_equal(decode_pixels(data, exif=exif), reference_pixels(data))


def test_a_cmyk_jpeg_is_converted_like_the_reference() -> None:
    data = encode(PICTURE.convert("CMYK"), "JPEG")
    assert np.array_equal(decode_pixels(data), reference_pixels(data))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_16_bit_grey_is_scaled_instead_of_clipped_to_white(kind: str) -> None:
    values = np.linspace(0, 65535, 64 * 4).round().astype(np.uint16).reshape(4, 64)
    data = encode(Image.fromarray(values), kind)
    expected = np.rint(values / 257).astype(np.uint8)
    for exif in ("apply", "ignore"):
        pixels = decode_pixels(data, exif=exif)
        assert np.array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255]),
        (np.array([[0, 70000, 140000]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 1.6, 300]], np.float32), [0, 2, 255]),
        (np.array([[np.nan, -5, np.inf]], np.float32), [0, 0, 255]),
    ],
)
def test_deep_grey_is_brought_to_8_bits(values: np.ndarray, expected: list[int]) -> None:
    data = encode(Image.fromarray(values), "TIFF")
    assert decode_pixels(data)[0, :, 0].tolist() == expected


def make_transparent(mode: str) -> bytes:
    if mode == "palette bytes":
        image = PICTURE.quantize(8)
        return encode(image, "PNG", transparency=bytes([0, 128] + [255] * 6))
    if mode == "palette index":
        return encode(PICTURE.quantize(8), "PNG", transparency=0)
    if mode == "RGB colour":
        image = Image.new("RGB", (8, 4), (10, 20, 30))
        image.paste((200, 100, 50), (4, 0, 8, 4))
        return encode(image, "PNG", transparency=(10, 20, 30))
    image = PICTURE.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return encode(image, "WEBP" if mode == "RGB" else "PNG", lossless=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "palette bytes", "palette index"])
def test_transparency_is_composited_over_white_or_dropped_as_the_reference_does(mode: str) -> None:
    data = make_transparent(mode)
    rgba = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    expected = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"), np.int16)
    assert np.abs(decode_pixels(data, exif="apply") - expected).max() <= 1
    assert np.array_equal(decode_pixels(data, exif="ignore"), reference_pixels(data))


def test_a_transparent_colour_shows_white() -> None:
    data = make_transparent("RGB colour")
    assert decode_pixels(data)[0, 0].tolist() == [255, 255, 255]
    assert decode_pixels(data, exif="ignore")[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_stands_for_an_animation(kind: str) -> None:
    frames = [make_picture(seed) for seed in range(3)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.array_equal(decode_pixels(data), reference_pixels(data))


def make_turned(orientation: int, kind: str = "JPEG", size: tuple[int, int] = (61, 47)) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(make_picture(1, size), kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_applied_or_ignored(orientation: int, kind: str) -> None:
    data = make_turned(orientation, kind)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    decoded = decode_image(data, limits=LIMITS, exif="apply")
    assert np.array_equal(np.asarray(decoded.image), upright)
    assert decoded.size == decoded.image.size
    assert (decoded.width, decoded.height) == (61, 47)
    assert np.array_equal(decode_pixels(data, exif="ignore"), reference_pixels(data))


def test_a_turned_tiff_is_turned_once() -> None:
    decoded = decode_image(make_turned(6, "TIFF"), limits=LIMITS)
    assert np.array_equal(np.asarray(decoded.image), np.asarray(PICTURE.rotate(-90, expand=True)))
    assert (decoded.width, decoded.height) == decoded.size == (47, 61)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\xff" * 99]
)
def test_broken_metadata_costs_neither_the_picture_nor_a_warning(exif: bytes) -> None:
    data = encode(PICTURE, "JPEG", exif=exif)
    assert decode_pixels(data).shape == (47, 61, 3)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("size", [(1001, 803), (803, 1003), (2049, 1537)])
def test_draft_decoding_keeps_the_geometry_of_the_full_picture(
    orientation: int, size: tuple[int, int]
) -> None:
    data = make_turned(orientation, size=size)
    full = decode_image(data, limits=LIMITS)
    draft = decode_image(data, limits=LIMITS, draft_size=200)
    assert draft.box is not None
    assert draft.size == full.size
    assert (draft.width, draft.height) == size
    assert 200 <= min(draft.image.size) < min(full.image.size)
    small = (100, 100)
    expected = np.asarray(full.image.resize(small, Image.Resampling.BICUBIC), np.int16)
    found = np.asarray(draft.image.resize(small, Image.Resampling.BICUBIC, box=draft.box))
    assert np.abs(found - expected).max() <= 6


@pytest.mark.parametrize(
    "data", [make_jpeg(0, (300, 300)), encode(make_picture(0, (900, 900)), "PNG")]
)
def test_draft_leaves_small_pictures_and_other_formats_alone(data: bytes) -> None:
    decoded = decode_image(data, limits=LIMITS, draft_size=200)
    assert decoded.box is None
    assert np.array_equal(np.asarray(decoded.image), reference_pixels(data))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", make_hostile_pictures())
def test_a_hostile_picture_gets_its_status_and_a_reason(name: str) -> None:
    hostile = make_hostile_pictures()[name]
    with pytest.raises(RecordError) as caught:
        decode_image(hostile.data, limits=LIMITS)
    assert caught.value.status == hostile.status
    assert hostile.words.lower() in caught.value.reason.lower()
    assert caught.value.reason


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"gif", "tga"}))
def test_a_picture_cut_in_half_is_truncated(name: str) -> None:
    kind, options = KINDS[name]
    data = encode(make_picture(2, (200, 150)), kind, **options)
    with pytest.raises(RecordError) as caught:
        decode_image(data[: len(data) // 2], limits=LIMITS)
    assert caught.value.status == "truncated"


def test_a_jpeg_with_a_broken_middle_is_unreadable_not_truncated() -> None:
    data = bytearray(encode(make_picture(3, (300, 300)), "JPEG", progressive=True))
    data[len(data) // 3 : len(data) // 3 + 60] = b"\xff\xc4" * 30
    with pytest.raises(RecordError) as caught:
        decode_image(bytes(data), limits=LIMITS)
    assert caught.value.status == "unreadable"


def test_limits_count_pixels_and_bytes() -> None:
    data = make_jpeg(0, (64, 48))
    assert decode_image(data, limits=ImageLimits(max_pixels=64 * 48)).size == (64, 48)
    with pytest.raises(RecordError, match="64 x 48 is 3,072 pixels; max_pixels is 3,071"):
        decode_image(data, limits=ImageLimits(max_pixels=64 * 48 - 1))
    with pytest.raises(RecordError, match="max_image_bytes is 9") as caught:
        decode_image(data, limits=ImageLimits(max_image_bytes=9))
    assert caught.value.status == "too_large"


def test_the_pixel_limit_is_ours_not_the_decoder_librarys() -> None:
    data = make_lying_png(14000, 14000)
    with pytest.raises(RecordError, match="truncated") as caught:
        decode_image(data, limits=ImageLimits(max_pixels=10**9))
    assert caught.value.status == "truncated"


def test_a_strip_of_one_pixel_by_65500_decodes() -> None:
    data = encode(make_picture(0, (1, 65500)), "JPEG")
    assert decode_image(data, limits=LIMITS).size == (1, 65500)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"jpeg 2000"}))
def test_mutated_bytes_give_a_picture_or_a_status_and_nothing_else(name: str) -> None:
    kind, options = KINDS[name]
    data = encode(make_picture(4, (40, 30)), kind, **options)
    rng = np.random.default_rng(sum(map(ord, name)))
    for _ in range(40):
        check_outcome(decode_or_fail(mutate(data, rng)))


def test_mutated_jpeg_2000_gives_a_picture_or_a_status() -> None:
    data = encode(make_picture(4, (40, 30)), "JPEG2000")
    rng = np.random.default_rng(5)
    for _ in range(6):
        check_outcome(decode_or_fail(mutate(data, rng)))


def decode_or_fail(data: bytes) -> DecodedImage | RecordError:
    try:
        return decode_image(data, limits=ImageLimits(max_pixels=4_000_000), draft_size=8)
    except RecordError as error:
        return error


def check_outcome(outcome: DecodedImage | RecordError) -> None:
    if isinstance(outcome, RecordError):
        assert outcome.status in ("unreadable", "unsupported", "truncated", "too_large")
        assert outcome.reason
    else:
        assert outcome.image.mode == "RGB"
        assert min(outcome.size) > 0


def test_decoding_changes_no_setting_of_the_library() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    for hostile in make_hostile_pictures().values():
        with pytest.raises(RecordError):
            decode_image(hostile.data, limits=LIMITS)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_the_digest_is_the_first_half_of_sha256() -> None:
    assert image_digest(b"").hex() == "e3b0c44298fc1c149afbf4c8996fb924"


def test_the_first_picture_of_an_mpo_is_what_is_embedded() -> None:
    mpo = encode(make_picture(1), "MPO", save_all=True, append_images=[make_picture(2)])
    decoded = decode_image(mpo, limits=LIMITS)
    expected = decode_image(make_jpeg(1), limits=LIMITS)
    assert np.array_equal(np.asarray(decoded.image), np.asarray(expected.image))
