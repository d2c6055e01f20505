"""Lists the inputs: which objects there are, and what each holds.

No shard is opened. The one exception is a list of URIs, which has to be read to know what it names.
"""

import csv
import io
import posixpath
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import NoShardsError, ObjectMissingError, SettingsError
from pipeline.records import ObjectInfo, Shard, ShardKind, digest_json
from pipeline.storage import Storage, normalise_uri

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PARQUET_SUFFIXES = (".parquet", ".pq")
LIST_SUFFIXES = (".txt", ".csv", ".tsv")


# fmt: off
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".tga", ".ico", ".icns", ".jp2", ".j2k",
    ".jpx", ".j2c", ".avif", ".avifs", ".heic", ".heif", ".qoi", ".pcx", ".sgi", ".xbm", ".dds",
    ".psd", ".hdr", ".exr", ".svg",
)
"""Names that make a loose object an image of the input; unreadable kinds become failed rows."""

_THREADS = 32

InputKind = Literal["auto", "tar", "parquet", "images", "list"]


@dataclass(frozen=True, slots=True)
class Source:
    """One object of the input, before it is cut into shards.

    Attributes:
        kind: How to read it; ``"image"`` is a loose one.
        root: The input it was found under.
        name: Path under the root; unique over all inputs.
        info: The object as listed.
    """

    kind: Literal["tar", "parquet", "image"]
    root: str
    name: str
    info: ObjectInfo


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything the inputs hold.

    Attributes:
        roots: The inputs as URIs.
        sources: What there is to embed, by name.
        ignored: Number of objects that are neither shards nor images.
    """

    roots: tuple[str, ...]
    sources: tuple[Source, ...]
    ignored: int


def list_sources(inputs: Sequence[str], kind: InputKind, storage: Storage) -> Listing:
    """List the inputs.

    Args:
        inputs: Prefixes, folders, single objects, or lists of URIs.
        kind: What they hold; ``"auto"`` decides by each object's name.
        storage: How to reach them.

    Raises:
        NoShardsError: An input holds nothing to embed.
        SettingsError: Two objects of different inputs would get the same keys.
    """
    roots = tuple(dict.fromkeys(normalise_uri(text) for text in inputs))
    sources: list[Source] = []
    ignored = 0
    for root in roots:
        found, others = _list_root(root, kind, storage)
        if not found:
            raise NoShardsError(
                f"no image shards under {root!r}"
                + (f" ({others} objects of other kinds)" if others else "")
                + "; check the prefix, or say what it holds with --input-kind"
            )
        sources += found
        ignored += others
    return Listing(roots, _merge_sources(sources), ignored)


def _list_root(root: str, kind: InputKind, storage: Storage) -> tuple[list[Source], int]:
    infos = [info for info in storage.list_objects(root) if info.size_bytes >= 0]
    sources: list[Source] = []
    ignored = 0
    for info in infos:
        found = _classify(info, kind, explicit=info.uri == root)
        name = posixpath.basename(root) if info.uri == root else info.uri[len(root) :].lstrip("/")
        if found == "list" and info.uri == root:
            sources += _read_list(info, storage)
        elif found in ("tar", "parquet", "image"):
            sources.append(Source(found, root, name, info))  # type: ignore[arg-type]
        else:
            ignored += 1
    return sources, ignored


def _classify(info: ObjectInfo, kind: InputKind, *, explicit: bool) -> str | None:
    name = info.uri.lower()
    if any(part.startswith((".", "_")) for part in (posixpath.basename(name),)) and not explicit:
        return None  # _SUCCESS, ._x.jpg, .DS_Store: what other tools leave beside data
    by_suffix = {
        "tar": name.endswith(TAR_SUFFIXES),
        "parquet": name.endswith(PARQUET_SUFFIXES),
        "image": name.endswith(IMAGE_SUFFIXES),
        "list": name.endswith(LIST_SUFFIXES),
    }
    if kind == "auto":
        return next((found for found, fits in by_suffix.items() if fits), None)
    wanted = "image" if kind == "images" else kind
    if explicit or by_suffix[wanted]:
        return wanted
    # Loose images often have names without a suffix; any other suffix is something else.
    return "image" if wanted == "image" and "." not in posixpath.basename(name) else None


def _read_list(info: ObjectInfo, storage: Storage) -> list[Source]:
    def look_up(uri: str) -> Source:
        name = uri.split("://", 1)[-1].lstrip("/")
        try:
            return Source("image", info.uri, name, storage.stat(uri))
        except ObjectMissingError:  # becomes a row that says so, until the object appears
            return Source("image", info.uri, name, ObjectInfo(uri, 0, "missing"))

    uris = [normalise_uri(uri) for uri in _parse_list(info.uri, storage.read(info.uri))]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(look_up, uris))


def _parse_list(uri: str, data: bytes) -> list[str]:
    """Return the URIs in a text, CSV/TSV or Parquet list, in order, without repetitions."""
    name = uri.lower()
    if name.endswith(PARQUET_SUFFIXES):
        table = pq.read_table(pa.BufferReader(data))
        return _unique(table.column(_find_uri_column(uri, table.column_names)).to_pylist())
    text = data.decode("utf-8-sig", errors="replace")
    if name.endswith((".csv", ".tsv")):
        rows = list(csv.reader(io.StringIO(text), delimiter="\t" if name.endswith("tsv") else ","))
        column = rows[0].index(_find_uri_column(uri, rows[0])) if rows else 0
        return _unique(row[column] for row in rows[1:] if len(row) > column)
    return _unique(line for line in text.splitlines() if not line.startswith("#"))


def _find_uri_column(uri: str, names: Sequence[str]) -> str:
    for wanted in ("uri", "url", "path", "file", "image", "filename"):
        for name in names:
            if name.strip().lower() == wanted:
                return name
    raise SettingsError(
        f"{uri} has no column named uri, url, path, file or image; its columns are {list(names)}"
    )


def _unique(uris: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(uri.strip() for uri in uris if uri and uri.strip()))


def _merge_sources(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Drop objects that two inputs share; refuse different objects of one name."""
    by_uri: dict[str, Source] = {}
    for source in sources:
        by_uri.setdefault(source.info.uri, source)
    by_name: dict[str, Source] = {}
    for source in by_uri.values():
        other = by_name.setdefault(source.name, source)
        if other is not source:
            raise SettingsError(
                f"{other.info.uri} and {source.info.uri} would both get the key {source.name!r}; "
                "give their common parent as --input, or embed them to two outputs"
            )
    return tuple(sorted(by_name.values(), key=lambda source: source.name))


def make_object_shard(source: Source, *, chunking: Sequence[object]) -> Shard:
    """Return the shard that an object is; ``chunking`` is what else decides its identity."""
    info = source.info
    kind: ShardKind = "parquet" if source.kind == "parquet" else "tar"
    return Shard(
        id=digest_json([info.uri, info.version, *chunking]),
        kind=kind,
        source=info.uri,
        root=source.root,
        name=source.name,
        size_bytes=info.size_bytes,
        version=info.version,
        modified_s=info.modified_s,
    )
