"""Encoded bytes to RGB pixels, or a status with a reason; the guards against hostile images.

Decided here, once, and part of an output's space through ``exif``, ``decode`` and the Pillow
version:

=====================  ===========================  ==============================
stored as              ``exif="apply"``: as shown   ``exif="ignore"``: as stored
=====================  ===========================  ==============================
EXIF orientation       turned upright               not turned
transparency           composited over white        dropped, hidden colours stay
RGB, grey, palette     converted                    the same
CMYK, YCbCr, HSV, LAB  Pillow's conversion, no ICC  the same
16-bit grey            value / 257                  the same
32-bit integer grey    as 16-bit where it fits,     the same
                       else its range is stretched
floating point grey    [0, 1] times 255 where it    the same
                       fits, else clipped to 0..255
animation, pages       first frame                  the same
=====================  ===========================  ==============================

``ignore`` equals ``Image.open(...).convert("RGB")``, which is what timm sees, except for deep grey
images, which that clips to white. Opaque RGB and 8-bit grey pictures are equal in both columns but
for the orientation. TIFF is turned by Pillow itself in either.
"""

import functools
import hashlib
import io
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageChops

from pipeline.errors import RecordError, ShortageError, describe_excess_bytes
from pipeline.images.jpeg import decode_jpeg, read_plain_header
from pipeline.images.png import drop_long_texts
from pipeline.images.turns import TURNS, Pixels, make_upright
from pipeline.shortages import is_shortage

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI"),
    *("PSD", "SGI", "SUN", "DDS", "PCX", "TGA"),
)
"""Pillow formats that are decoded, in the order they are tried; TGA is last, it has no signature.

Left out on purpose: EPS and WMF (run or need other programs), ICO, ICNS and CUR (their decoders
load pictures inside whose size no header shows), and formats that hold no photographs.
"""

_LOOKS = (
    (rb"\s*(<!doctype html|<html|<head|<body)", "HTML, such as an error page"),
    (rb"\s*(<\?xml|<svg|<error)", "XML or SVG"),
    (rb"\s*[{\[]\s*[\"{\[]", "JSON"),
    (rb"%PDF-", "a PDF"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "gzip data"),
    (rb"....ftyp(heic|heix|mif1|msf1|hevc)", "HEIC"),
    (rb"....ftyp", "a video"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JPEG XL, which no decoder here reads; convert it"),
    (rb"\x00\x00[\x01\x02]\x00", "an icon (ICO, CUR)"),
    (rb"icns", "an icon (ICNS)"),
    (rb"\x00{16}", "zeros"),
)

_TRUNCATED = re.compile(
    r"truncated|not enough image data|incomplete header|expected to read|unexpected end"
    r"|premature end|reached end",
    re.IGNORECASE,
)

_BYTES_PER_PIXEL = 16  # decoded as RGBA, and converted a few times

_PILLOW_MODULES = re.compile(r"PIL\.")

_ORIENTATION_TAG = 0x0112
Exif = Literal["apply", "ignore"]
Box = tuple[float, float, float, float]
_Accepts = Callable[[bytes], bool | str]


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits on the images that are decoded.

    Attributes:
        max_pixels: Most pixels, width times height as the header says, before any is allocated.
        max_image_bytes: Most encoded bytes.
    """

    max_pixels: int = 200_000_000
    max_image_bytes: int = 256 * 2**20


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A decoded picture.

    Attributes:
        picture: RGB, 8 bits a channel, as stored; uint8 (H, W, 3) if it is an array.
        turn: The EXIF orientation that turns it upright; 1 where EXIF is not applied.
        width: Width of the original as stored, before turning and scaling, pixels.
        height: Height of the original, likewise.
        size: Width and height of the whole picture at full scale, upright; what geometry (resize,
            crop) is computed from. Equals ``image.size`` unless ``box`` is set.
        box: Where the whole picture lies in ``image``, (left, top, right, bottom) in fractional
            pixels, when the decoder has scaled it down; None when it is all of ``image``.
    """

    picture: Image.Image | Pixels
    turn: int
    width: int
    height: int
    size: tuple[int, int]
    box: Box | None = None

    @property
    def image(self) -> Image.Image:
        """The picture upright."""
        return make_upright(self.picture, self.turn)


def image_digest(data: bytes | memoryview) -> bytes:
    """Return the first 16 bytes of the SHA-256 of the encoded image."""
    return hashlib.sha256(data).digest()[:16]


def decode_image(
    data: bytes | memoryview,
    *,
    limits: ImageLimits,
    exif: Exif = "apply",
    draft_size: int | None = None,
) -> DecodedImage:
    """Decode one image to RGB as the module docstring lays down.

    Args:
        data: The encoded image.
        limits: What is refused unseen.
        exif: Show the picture upright and over white, or exactly as it is stored.
        draft_size: Let the JPEG decoder scale down by 2, 4 or 8 as long as both sides stay at
            least this long, pixels; None decodes at full scale.

    Raises:
        RecordError: The image cannot or must not be decoded. Its status is ``unsupported`` (no
            known format), ``too_large``, ``truncated`` or ``unreadable``. Nothing else is raised,
            whatever the bytes.
        ShortageError: It might decode, but this machine is short of memory or descriptors.
    """
    data = bytes(data)
    _refuse_by_length(data, limits)
    _ignore_pillow_warnings()
    try:
        return _decode(data, limits, exif=exif, draft_size=draft_size)
    except RecordError:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        if (shorter := drop_long_texts(data, error)) is not None:
            return decode_image(shorter, limits=limits, exif=exif, draft_size=draft_size)
        header = read_header(data, limits=limits)
        pixels = header.size[0] * header.size[1] if header is not None else 0
        if is_shortage(error, needed_bytes=_BYTES_PER_PIXEL * pixels):
            words = f"this machine is short of memory or descriptors: {error or 'no memory'}"
            raise ShortageError(f"{words}; give it more memory, or lower --max-pixels") from error
        raise _describe_failure(data, error) from error


def _refuse_by_length(data: bytes, limits: ImageLimits) -> None:
    if not data:
        raise RecordError("unreadable", "the encoded image has zero bytes")
    if len(data) > limits.max_image_bytes:
        raise RecordError("too_large", describe_excess_bytes(len(data), limits.max_image_bytes))


def _ignore_pillow_warnings() -> None:
    """Keep Pillow's remarks on odd metadata off the terminal; they change no pixel.

    One process-wide filter for Pillow's own modules: ``catch_warnings`` is not thread-safe.
    """
    if not any(module == _PILLOW_MODULES for _, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES.pattern)


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Format, size and mode of an image, read from its header.

    Attributes:
        format: Pillow's name, e.g. ``"JPEG"``.
        mode: Pillow's mode, e.g. ``"RGB"``.
        size: Width and height as stored, pixels.
        orientation: EXIF orientation, 1 to 8.
    """

    format: str
    mode: str
    size: tuple[int, int]
    orientation: int


def read_header(data: bytes | memoryview, *, limits: ImageLimits) -> ImageHeader | None:
    """Return the header, or None of an image that ``decode_image`` may refuse."""
    data = bytes(data)
    try:
        _refuse_by_length(data, limits)
        if (plain := read_plain_header(data)) is not None:
            header = ImageHeader("JPEG", *plain, orientation=1)
        else:
            image = _open_image(data)
            orientation = _read_orientation(image)
            header = ImageHeader(image.format or "", image.mode, image.size, orientation)
        return header if 0 < header.size[0] * header.size[1] <= limits.max_pixels else None
    except Exception:  # decoders raise anything on hostile bytes; decode_image says what is wrong
        return None


def _decode(
    data: bytes, limits: ImageLimits, *, exif: Exif, draft_size: int | None
) -> DecodedImage:
    image = _open_image(data)
    width, height = image.size
    if width < 1 or height < 1:
        raise RecordError("unreadable", f"it has {width} x {height} pixels")
    if width * height > limits.max_pixels:
        pixels = f"{width} x {height} is {width * height:,} pixels"
        raise RecordError("too_large", f"{pixels}; max_pixels is {limits.max_pixels:,}")
    draft = image.draft(None, (draft_size, draft_size)) if draft_size else None
    scaled = image.size != (width, height)
    picture: Image.Image | Pixels | None = decode_jpeg(data, image, scaled=scaled)
    if picture is None:
        image.load()
        picture = _convert_to_rgb(image, composite=exif == "apply")
    turn = _read_orientation(image) if exif == "apply" else 1
    box = None
    if draft is not None and scaled:
        box = _turn_box(draft[1], image.size, turn)
    elif image.size != (width, height):
        width, height = image.size  # TIFF, turned by its own decoder
    size = TURNS[turn].turn_size((width, height))
    return DecodedImage(picture, turn, width, height, size, box)


def _open_image(data: bytes) -> Image.Image:
    """Open by signature, without decoding.

    Not ``Image.open``: that refuses at a process-wide number of pixels of its own, and swallows
    why a file of a known signature does not open.

    Raises:
        RecordError: No format's signature fits.
    """
    failure = ""
    for name, factory, accepts in _find_openers():
        try:
            accepted = accepts is None or accepts(data[:16])
            if accepted and not isinstance(accepted, str):  # a text says which codec is missing
                return factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, KeyError, struct.error) as error:
            if accepts is not None:
                failure = f"damaged {name} header: {error}"
    if failure:
        raise OSError(failure)
    raise RecordError("unsupported", f"no known image format{_guess_content(data)}")


@functools.cache
def _find_openers() -> tuple[tuple[str, Callable[..., Image.Image], _Accepts | None], ...]:
    Image.init()
    return tuple((name, *Image.OPEN[name]) for name in FORMATS if name in Image.OPEN)


def _guess_content(data: bytes) -> str:
    for pattern, name in _LOOKS:
        if re.match(pattern, data[:256], re.IGNORECASE | re.DOTALL):
            return f"; it looks like {name}"
    return ""


def _describe_failure(data: bytes, error: Exception) -> RecordError:
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return RecordError("too_large", str(error) or "it asks for more memory than its size needs")
    words = str(error) or type(error).__name__
    truncated = isinstance(error, EOFError) or _TRUNCATED.search(words) or _is_cut_short(data)
    return RecordError("truncated" if truncated else "unreadable", words)


def _is_cut_short(data: bytes) -> bool:
    """Tell from the container alone whether its end is missing."""
    if data[:2] in (b"\xff\xd8", b"\xff\x4f"):  # JPEG, JPEG 2000
        return b"\xff\xd9" not in data[-4096:]
    if data[:4] == b"GIF8":
        return not data.rstrip(b"\0").endswith(b";")
    if data[:4] == b"RIFF":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data[:2] == b"BM":
        return int.from_bytes(data[2:6], "little") > len(data)
    if data[:4] in (b"II*\0", b"MM\0*"):  # the directory may lie at the end
        order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
        return int.from_bytes(data[4:8], order) >= len(data)
    if data[4:8] in (b"ftyp", b"jP  "):
        return _ends_inside_a_box(data)
    return False


def _ends_inside_a_box(data: bytes) -> bool:
    """Walk the boxes of AVIF and JPEG 2000 files."""
    position = 0
    while position < len(data):
        size_bytes = int.from_bytes(data[position : position + 4], "big")
        if size_bytes < 8:  # to the end of the file, 64 bits long, or damaged
            return False
        position += size_bytes
    return position > len(data)


def _read_orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata must not cost a good picture
        return 1
    return value if value in TURNS else 1


def _turn_box(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Return ``box`` of an image of ``size`` after the turn that ``orientation`` asks for."""
    turn = TURNS[orientation]
    left, top, right, bottom = (box[1], box[0], box[3], box[2]) if turn.transposed else box
    width, height = turn.turn_size(size)
    if turn.mirrored:
        left, right = width - right, width - left
    if turn.flipped:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _convert_to_rgb(image: Image.Image, *, composite: bool) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_grey(image).convert("RGB")
    if composite and image.has_transparency_data:
        return _composite_over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _composite_over_white(image: Image.Image) -> Image.Image:
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    alpha = rgba.getchannel("A")
    rgb = rgba.convert("RGB")
    if alpha.getextrema() != (255, 255):
        rgb.paste((255, 255, 255), mask=ImageChops.invert(alpha))
    return rgb


def _scale_grey(image: Image.Image) -> Image.Image:
    """Return deep grey (16-bit, 32-bit integer, floating point) as 8-bit grey."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=-np.inf)
        unit = values.min() >= 0 and values.max() <= 1
        scaled = np.clip(values * 255 if unit else values, 0, 255) + 0.5
        return Image.fromarray(scaled.astype(np.uint8))
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high <= 65535:
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    stretched = (values.astype(np.float64) - low) * (255 / (high - low)) + 0.5
    return Image.fromarray(stretched.astype(np.uint8))
