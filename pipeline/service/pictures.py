"""Indexed images as a browser can show them: thumbnails, originals, and a bounded cache."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import AbortError, ObjectMissingError, RecordError
from pipeline.images.decode import ImageLimits, image_digest
from pipeline.images.thumbnails import make_thumbnail
from pipeline.index.search.search_index import Neighbour
from pipeline.service.metrics import Metrics
from pipeline.service.problems import Problem

log = logging.getLogger(__name__)

ReadImage = Callable[[Neighbour], bytes]
"""Returns the encoded image of a row; the row says where it lies."""

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


class PictureLoader:
    """Reads indexed images from where they lie, and remembers what it made of them.

    Attributes:
        cache: The pictures it remembers.
    """

    def __init__(
        self, read_image: ReadImage, *, limits: ImageLimits, cache_bytes: int, metrics: Metrics
    ) -> None:
        self.cache = PictureCache(cache_bytes)
        self._read_image = read_image
        self._limits = limits
        self._metrics = metrics

    def load(self, hit: Neighbour, size: int | None) -> Picture | Exception:
        """Return an indexed image, its thumbnail of ``size`` pixels, or why there is none."""
        digest = bytes(hit.columns["sha256"])
        etag = digest.hex() if size is None else f"{digest.hex()}-{size}"
        cached = self.cache.get(f'"{etag}"')
        self._metrics.image_cache.labels("hit" if cached else "miss").inc()
        if cached is not None:
            return cached
        try:
            with self._metrics.stage_s.labels("image").time():
                picture = self._render(hit, size, digest)
        except (AbortError, RecordError, Problem) as error:
            return _explain_failure(error)
        self.cache.put(picture)
        return picture

    def _render(self, hit: Neighbour, size: int | None, digest: bytes) -> Picture:
        data = self._read_image(hit)
        if image_digest(data) != digest:
            raise Problem(410, "source_changed", detail="the source has changed since indexing")
        return render_picture(data, size, etag=digest.hex(), limits=self._limits)


def _explain_failure(error: Exception) -> Exception:
    """Say what went wrong with a picture without saying where it lies."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ObjectMissingError):
        return Problem(410, "source_gone", detail="the source of this image is gone")
    if isinstance(error, RecordError):
        return Problem(422, "invalid_image", detail=f"the indexed image is {error.status}")
    log.warning("cannot read an indexed image: %s", error)
    detail = "the source of this image cannot be read now"
    return Problem(503, "source_unreadable", detail=detail, retry_after_s=5)
