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
