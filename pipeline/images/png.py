"""PNGs with long texts or colour profiles, which Pillow writes and then refuses to read.

Pillow decompresses every text and profile of a file, and gives the picture up where one is longer
than a limit against bombs. None of them changes a pixel here: a picture that failed for that reason
is decoded without those that are too long. The orientation, which small texts can hold, stays.
"""

import re
import zlib
from collections.abc import Iterator

from PIL import PngImagePlugin

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LIMITS = re.compile(r"MAX_TEXT_CHUNK|MAX_TEXT_MEMORY")


def drop_long_texts(data: bytes, error: Exception) -> bytes | None:
    """Return a PNG without the texts and profiles for which decoding failed with ``error``.

    None where it failed for another reason. No more is decompressed than Pillow's limits allow.
    """
    if not (data.startswith(_SIGNATURE) and _LIMITS.search(str(error))):
        return None
    kept = [_SIGNATURE]
    room = PngImagePlugin.MAX_TEXT_MEMORY // 2
    for kind, chunk in _split_chunks(data):
        size_bytes = _measure_text(kind, chunk[8:-4])
        if size_bytes is not None and size_bytes <= min(room, PngImagePlugin.MAX_TEXT_CHUNK - 1):
            room -= size_bytes
            kept.append(chunk)
    return b"".join(kept)


def _split_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(_SIGNATURE)
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        yield data[position + 4 : position + 8], data[position:end]
        position = end


def _measure_text(kind: bytes, body: bytes) -> int | None:
    """Return the length of a chunk's text, 0 for other chunks; None where it is too long."""
    if kind == b"tEXt":
        return len(body)
    if kind in (b"zTXt", b"iCCP"):
        return _measure_compressed(body.partition(b"\0")[2][1:])
    if kind != b"iTXt":
        return 0
    flags = body.partition(b"\0")[2]
    if flags[:1] == b"\0":
        return len(body)
    return _measure_compressed(flags[2:].partition(b"\0")[2].partition(b"\0")[2])


def _measure_compressed(data: bytes) -> int | None:
    decompressor = zlib.decompressobj()
    try:
        size_bytes = len(decompressor.decompress(data, PngImagePlugin.MAX_TEXT_CHUNK))
    except zlib.error:
        return 0  # Pillow passes over it
    return None if decompressor.unconsumed_tail else size_bytes
