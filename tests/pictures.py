"""Real pictures, real shards, and pictures that no decoder should trust."""

import functools
import io
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.records import Member, Shard
from pipeline.storage import Storage

TAR_MODES = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


def make_picture(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Return an RGB picture of smooth colours that differ with the seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_jpeg(seed: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    return encode(make_picture(seed, size))


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], *, kind: int = tarfile.GNU_FORMAT
) -> Path:
    """Write an archive; the compression follows the name. Names may hold surrogates."""
    mode = TAR_MODES.get("".join(path.suffixes[-2:])) or TAR_MODES.get(path.suffix, "w")
    target = path.with_suffix("") if path.suffix == ".zst" else path
    with tarfile.open(target, mode, format=kind, errors="surrogateescape") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    if target != path:
        path.write_bytes(pa.Codec("zstd").compress(target.read_bytes(), asbytes=True))
        target.unlink()
    return path


def write_parquet(
    path: Path, images: Sequence[bytes | None], *, struct: bool = False, **columns: Any
) -> Path:
    """Write images as a plain binary column, or as the struct that Hugging Face datasets use.

    Of ``columns``, what Arrow knows as arrays become columns; the rest are writer options.
    """
    if struct:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        values = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
        table = {"image": pa.array(values, kind)}
    else:
        table = {"image": pa.array(images, pa.binary())}
    table |= {name: value for name, value in columns.items() if isinstance(value, pa.Array)}
    options = {name: value for name, value in columns.items() if name not in table}
    pq.write_table(pa.table(table), path, **options)
    return path


def write_loose(folder: Path, images: Mapping[str, bytes]) -> Path:
    for name, data in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def make_shard(path: Path | str, storage: Storage | None = None) -> Shard:
    """Describe a tar or Parquet object as planning would."""
    info = (storage or Storage()).stat(str(path))
    root, _, name = info.uri.rpartition("/")
    kind = "parquet" if name.endswith(".parquet") else "tar"
    return Shard("0123456789abcdef", kind, info.uri, root, name, info.size_bytes, info.version)


def make_bundle(root: Path | str, storage: Storage | None = None) -> Shard:
    """Describe all objects under a folder or prefix as one bundle."""
    infos = (storage or Storage()).list_objects(str(root))
    members = tuple(
        Member(info.uri[len(str(root)) + 1 :], info.uri, info.size_bytes, info.version)
        for info in infos
    )
    size_bytes = sum(member.size_bytes for member in members)
    uri = members[0].uri
    return Shard("fedcba9876543210", "bundle", uri, str(root), "", size_bytes, "v", members=members)


@dataclass(frozen=True, slots=True)
class HostilePicture:
    """Bytes that must not hurt, and what has to be said of them.

    Attributes:
        data: The bytes.
        status: The status they must get.
        words: What the reason must contain.
    """

    data: bytes
    status: str
    words: str


@functools.cache
def make_hostile_pictures() -> dict[str, HostilePicture]:
    """Return pictures that are broken or lie, by the name they would have in a dataset."""
    jpeg, png = make_jpeg(), encode(make_picture(), "PNG")
    webp, gif = encode(make_picture(), "WEBP"), encode(make_picture(), "GIF")
    html = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>"
    return {
        "empty.jpg": HostilePicture(b"", "unreadable", "zero bytes"),
        "html.jpg": HostilePicture(html, "unsupported", "HTML"),
        "drawing.svg": HostilePicture(b"<?xml version='1.0'?><svg/>", "unsupported", "SVG"),
        "paper.jpg": HostilePicture(b"%PDF-1.7\n", "unsupported", "PDF"),
        "print.jpg": HostilePicture(b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported", "PostScript"),
        "zeros.png": HostilePicture(bytes(4096), "unsupported", "zeros"),
        "phone.heic": HostilePicture(b"\0\0\0\x18ftypheic" + bytes(40), "unsupported", "HEIC"),
        "icon.ico": HostilePicture(encode(make_picture(), "ICO"), "unsupported", "ICO"),
        "noise.jpg": HostilePicture(bytes(range(256)) * 9, "unsupported", "no known image format"),
        "half.jpg": HostilePicture(jpeg[: len(jpeg) // 2], "truncated", "truncated"),
        "header.jpg": HostilePicture(jpeg[:20], "truncated", "JPEG"),
        "half.png": HostilePicture(png[: len(png) // 2], "truncated", "truncated"),
        "half.webp": HostilePicture(webp[: len(webp) // 2], "truncated", ""),
        "half.gif": HostilePicture(gif[: len(gif) // 2], "truncated", "truncated"),
        "crc.png": HostilePicture(png[:60] + b"\xff" + png[61:], "unreadable", ""),
        "lie.jpg": HostilePicture(
            resize_jpeg_header(jpeg, 60000, 60000), "too_large", "max_pixels"
        ),
        "lie.png": HostilePicture(make_lying_png(50000, 50000), "too_large", "max_pixels"),
        "lie.gif": HostilePicture(gif[:6] + b"\xff\xff\xff\xff" + gif[10:], "too_large", ""),
        "nothing.png": HostilePicture(make_lying_png(0, 5), "unreadable", ""),
        "photo.jxl": HostilePicture(b"\xff\x0a\xfa" + bytes(90), "unsupported", "JPEG XL"),
    }


def resize_jpeg_header(jpeg: bytes, width: int, height: int) -> bytes:
    """Return a JPEG whose header claims another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def make_lying_png(width: int, height: int) -> bytes:
    """Return a PNG of a size that its few bytes of pixels do not fill."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(make_png_chunk(*chunk) for chunk in chunks)


def make_png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the bytes with a few of them changed, removed, repeated, or all after a point cut."""
    values = bytearray(data)
    for _ in range(rng.integers(1, 12)):
        at = int(rng.integers(0, max(1, len(values))))
        action = rng.integers(0, 6)
        if action < 3 and values:
            values[at % len(values)] = rng.integers(0, 256)
        elif action == 3:
            del values[at : at + int(rng.integers(1, 40))]
        elif action == 4:
            values[at:at] = values[at : at + int(rng.integers(1, 40))]
        elif rng.integers(0, 4) == 0:
            del values[at:]
    return bytes(values)
