"""PNGs with texts and profiles beyond Pillow's limits against Pillow with higher ones."""

import io
import tracemalloc
import zlib

import numpy as np
import pytest
from pictures import encode, make_picture, make_png_chunk
from PIL import Image, PngImagePlugin

from pipeline.images.decode import ImageLimits, decode_image

LONG = 3 << 20
PNG = encode(make_picture(3), "PNG")
EXIF = Image.Exif()
EXIF[0x0112] = 6
HEX = EXIF.tobytes().hex()
RAW_EXIF = f"\nexif\n{len(HEX) // 2:8d}\n{HEX}\n"  # as ImageMagick writes it
XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def write_texts(*texts: tuple[str, str, bool], zipped: bool = False, icc: bytes = b"") -> bytes:
    """Let Pillow write a picture with texts: name, text, whether it is international."""
    info = PngImagePlugin.PngInfo()
    for name, text, international in texts:
        add = info.add_itxt if international else info.add_text
        add(name, text, zip=zipped)
    options = {"icc_profile": icc} if icc else {}
    return encode(make_picture(3), "PNG", pnginfo=info, **options)


def put_last(png: bytes, chunk: bytes) -> bytes:
    return png[:-12] + chunk + png[-12:]


LONG_TEXT = make_png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * LONG))
FILES = {
    "text": write_texts(("a", "x" * LONG, False)),
    "zipped": write_texts(("a", "x" * LONG, False), zipped=True),
    "international": write_texts(("a", "é" * LONG, True)),
    "international, zipped": write_texts(("a", "é" * LONG, True), zipped=True),
    "profile": write_texts(icc=bytes(range(256)) * (LONG // 256)),
    "many": write_texts(*((f"k{i}", "y" * (1 << 20), False) for i in range(70)), zipped=True),
    "after the pixels": put_last(PNG, LONG_TEXT),
    "beside raw EXIF": write_texts(
        ("a", "x" * LONG, False), ("Raw profile type exif", RAW_EXIF, False), zipped=True
    ),
    "beside XMP": write_texts(
        ("a", "x" * LONG, True), ("XML:com.adobe.xmp", XMP, True), zipped=True
    ),
    "broken text": put_last(put_last(PNG, make_png_chunk(b"zTXt", b"k\0\0no zlib")), LONG_TEXT),
}


@pytest.mark.parametrize("exif", ["apply", "ignore"])
@pytest.mark.parametrize("name", FILES)
def test_long_texts_and_profiles_change_no_pixel(
    name: str, exif: str, monkeypatch: pytest.MonkeyPatch
):
    found = decode_image(FILES[name], limits=ImageLimits(), exif=exif)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 30)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 1 << 30)
    expected = decode_image(FILES[name], limits=ImageLimits(), exif=exif)
    assert np.array_equal(np.asarray(found.image), np.asarray(expected.image))
    with Image.open(io.BytesIO(FILES[name])) as image:
        turned = image.getexif().get(0x0112) == 6 and exif == "apply"
    assert (found.image.size == (48, 64)) == turned
    assert turned == ("beside" in name and exif == "apply")


def test_a_bomb_of_text_is_not_unpacked():
    bomb = make_png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20)))
    tracemalloc.start()
    found = decode_image(PNG[:33] + bomb * 3 + PNG[33:], limits=ImageLimits())
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.image.size == (64, 48)
    assert peak_bytes < 16 << 20
