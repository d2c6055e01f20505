"""JPEGs straight to RGB arrays.

Pillow's own JPEG decoder (libjpeg-turbo) with less around it: three bytes a pixel instead of four,
one call instead of one for each 64 kB, and without the interpreter lock. Pillow remains the judge:
it reads the header, and whatever is not an ordinary, undamaged picture is left to it.
"""

from PIL import Image

from pipeline.images.turns import Pixels

try:
    import simplejpeg
except ImportError:  # there is no wheel for every platform
    simplejpeg = None

_MODES = ("RGB", "L")
_MODE_OF = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "L"}
_SCAN = 0xDA
_PLAIN_SEGMENTS = frozenset(
    (0xE0, 0xEE, 0xDB, 0xC4, 0xC0, 0xC1, 0xC2, 0xDD)  # JFIF, Adobe, tables, frames
)


def read_plain_header(data: bytes) -> tuple[str, tuple[int, int]] | None:
    """Return mode and size of a JPEG without metadata, or None of what Pillow shall open.

    In a fraction of the time that Pillow takes, which holds the interpreter's lock meanwhile.
    """
    if simplejpeg is None or not _is_plain(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # no JPEG, or damaged; Pillow says what it is
        return None
    mode = _MODE_OF.get(colours)
    return None if mode is None else (mode, (width, height))


def _is_plain(data: bytes) -> bool:
    """Return whether no segment before the first scan could hold a turn or a second picture."""
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1 : position + 2]
        if marker and marker[0] == _SCAN:
            return True
        if not marker or marker[0] not in _PLAIN_SEGMENTS:
            return False
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def decode_jpeg(data: bytes | memoryview, image: Image.Image, *, scaled: bool) -> Pixels | None:
    """Decode to the bits of Pillow, or return None of what Pillow shall decode.

    Args:
        data: The encoded image.
        image: What Pillow has opened it as.
        scaled: Its size is that of a draft.

    Returns:
        uint8 (H, W, 3), RGB, as stored.
    """
    if simplejpeg is None or image.format != "JPEG" or image.mode not in _MODES:
        return None
    least = {"min_width": image.width, "min_height": image.height} if scaled else {}
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", **least)
    except Exception:  # damaged in some way; Pillow says whether it matters
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None
