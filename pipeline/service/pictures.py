"""Indexed images as a browser can show them: thumbnails, originals, and a bounded cache."""

import io
import threading
from collections import OrderedDict
from dataclasses import dataclass

from PIL import Image

from pipeline.images import ImageLimits, decode_image

THUMBNAIL_SIZES = (64, 256, 512)
"""Longest side in pixels of the thumbnails that are made; anything else would fill the cache."""

_SIGNATURES = (
    (b"\xff\xd8\xff", 0, "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", 0, "image/png"),
    (b"GIF8", 0, "image/gif"),
    (b"WEBP", 8, "image/webp"),
    (b"ftypavif", 4, "image/avif"),
    (b"BM", 0, "image/bmp"),
)


@dataclass(frozen=True, slots=True)
class Picture:
    """Bytes for a browser.

    Attributes:
        data: The encoded picture.
        media_type: What it is; ``application/octet-stream`` for what no browser shows.
        etag: Changes when the picture does.
    """

    data: bytes
    media_type: str
    etag: str


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


def guess_media_type(data: bytes) -> str:
    """Return the media type by signature, for pictures that every browser shows."""
    for signature, offset, media_type in _SIGNATURES:
        if data[offset : offset + len(signature)] == signature:
            return media_type
    return "application/octet-stream"


def render_picture(data: bytes, size: int | None, *, etag: str, limits: ImageLimits) -> Picture:
    """Return the original, or its thumbnail.

    Args:
        data: The encoded image.
        size: Longest side of the thumbnail, pixels; None for the original.
        etag: Identifies the encoded image.
        limits: What is decoded at all.

    Raises:
        RecordError: A thumbnail was asked for and the image cannot be decoded.
    """
    if size is None:
        return Picture(data, guess_media_type(data), f'"{etag}"')
    return Picture(make_thumbnail(data, size, limits=limits), "image/jpeg", f'"{etag}-{size}"')


class PictureCache:
    """The most recently used pictures, bounded by their bytes; for any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Bytes of all cached pictures."""
        return self._bytes

    def get(self, etag: str) -> Picture | None:
        """Return the cached picture, or None."""
        with self._lock:
            picture = self._pictures.get(etag)
            if picture is not None:
                self._pictures.move_to_end(etag)
            return picture

    def put(self, picture: Picture) -> None:
        """Keep a picture, and let the longest unused ones go; one too large is not kept."""
        size_bytes = len(picture.data)
        if size_bytes > self._max_bytes // 4:
            return
        with self._lock:
            replaced = self._pictures.pop(picture.etag, None)
            self._pictures[picture.etag] = picture
            self._bytes += size_bytes - (len(replaced.data) if replaced else 0)
            while self._bytes > self._max_bytes:
                _, oldest = self._pictures.popitem(last=False)
                self._bytes -= len(oldest.data)
