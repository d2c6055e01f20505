"""The kind of an object or archive member: from its name, else from its first bytes.

One table for listings and for archives. Whatever is not read has a reason, so that nothing is
left out without a word.
"""

import posixpath
import re
from typing import Literal

Kind = Literal["tar", "parquet", "image", "list"]
"""``"list"`` is a list of URIs."""

# fmt: off
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "tar": (
        ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst",
        ".tzst", ".tar.zstd", ".tar.lz4",
    ),
    "parquet": (".parquet", ".pq"),
    "image": (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib",
        ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".tga", ".ico", ".icns", ".jp2",
        ".j2k", ".jpx", ".j2c", ".jxl", ".avif", ".avifs", ".heic", ".heif", ".hif", ".qoi", ".pcx",
        ".sgi", ".xbm", ".dds", ".psd", ".hdr", ".exr", ".svg",
    ),
    "list": (".txt", ".csv", ".tsv"),
}
"""Names that say what an object is; images of kinds that cannot be decoded become failed rows."""

SET_ASIDE: dict[str, tuple[str, ...]] = {
    "camera raw": (
        ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mrw",
        ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
    ),
    "video, or a thumbnail of one": (
        ".3gp", ".avi", ".flv", ".lrv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
        ".mts", ".thm", ".webm", ".wmv",
    ),
    "sound": (".aac", ".flac", ".m4a", ".mp3", ".ogg", ".wav"),
    "archive of a kind that is not read": (
        ".7z", ".bz2", ".gz", ".lz4", ".rar", ".xz", ".zip", ".zst",
    ),
    "text or metadata": (
        ".aae", ".cls", ".crc", ".db", ".doc", ".docx", ".html", ".idx", ".index", ".ini", ".json",
        ".jsonl", ".log", ".md", ".md5", ".ndjson", ".pdf", ".sha1", ".sha256", ".toml", ".xml",
        ".xmp", ".yaml", ".yml",
    ),
    "arrays, tables or weights": (
        ".arrow", ".avro", ".bin", ".feather", ".h5", ".hdf5", ".npy", ".npz", ".orc", ".pickle",
        ".pkl", ".pt", ".pth", ".safetensors", ".tfrecord",
    ),
    "program": (".exe", ".ipynb", ".js", ".py", ".pyc", ".sh"),
}
"""Names of what is never read, by the reason to give."""

_MAGICS = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*",
    b"II+\0", b"MM\0+", b"8BPS", b"qoif", b"DDS ", b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n",
    b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"#?RADIANCE", b"v/1\x01", b"icns",
)
# fmt: on
_BRANDS = re.compile(rb"....ftyp(avi[fs]|hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
_BMP = re.compile(rb"BM....\0\0\0\0", re.DOTALL)
_PNM = re.compile(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s|P7\nWIDTH ")
_FOLDERS = frozenset(
    ("@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found", "system volume information")
)
"""Where disk stations and other systems keep thumbnails and what was deleted; in lower case."""

HEAD_BYTES = 512
"""How much of the start ``recognise`` wants to see."""


def is_hidden(path: str, *, parquet: bool = False) -> bool:
    """Tell whether a path under an input is one that readers of datasets pass over.

    As in Hugging Face's readers: a name or a folder that starts with a dot, a folder that starts
    with two underscores. As in Arrow's and Spark's readers, of Parquet files alone: a name or a
    folder that starts with an underscore (``_temporary/``, ``_delta_log/``). Cameras and programs
    give photographs such names too (``_DSC0001.JPG``), which are not hidden.

    Args:
        path: Path under the input; what the input itself is called does not count.
        parquet: Whether it is a Parquet file.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    if any(part.startswith(".") or (parquet and part.startswith("_")) for part in parts):
        return True
    return any(
        folder.startswith("__") or folder == "_temporary" or folder.lower() in _FOLDERS
        for folder in parts[:-1]
    )


def tell_kind(name: str) -> Kind | None:
    """Return what a name says, by its suffix; None where it says nothing known."""
    name = name.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)), None)


def tell_reason(name: str) -> str | None:
    """Return why an object of this name is never read; None where its name does not tell."""
    name = name.lower()
    return next((why for why, suffixes in SET_ASIDE.items() if name.endswith(suffixes)), None)


def has_suffix(path: str) -> bool:
    """Tell whether the last part of a path has a dot, so that its name says or hides its kind."""
    return "." in posixpath.basename(path)


def recognise(head: bytes) -> Literal["tar", "parquet", "image"] | None:
    """Return what an object is by its first ``HEAD_BYTES``; None where it is nothing known.

    A compressed archive is not told from other compressed data.
    """
    if head.startswith(_MAGICS) or any(p.match(head) for p in (_BRANDS, _BMP, _PNM)):
        return "image"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image"
    if head.startswith(b"PAR1"):
        return "parquet"
    return "tar" if head[257:262] == b"ustar" else None
