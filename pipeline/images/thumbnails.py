"""Encoded images as small JPEGs, for pages and reports."""

import io

from PIL import Image

from pipeline.images.decode import ImageLimits, decode_image


def make_thumbnail(data: bytes, size: int, *, limits: ImageLimits) -> bytes:
    """Return a JPEG of an encoded image whose longest side is at most ``size`` pixels.

    Raises:
        RecordError: The image cannot or must not be decoded.
    """
    image = decode_image(data, limits=limits, draft_size=2 * size).image
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
