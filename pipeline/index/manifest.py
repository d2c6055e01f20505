"""The manifest of a generation: ``generations/<generation>/manifest.json``.

The manifest names every file with its digest; a reader trusts nothing else.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pipeline.records import Space, digest_json
from pipeline.storage import Storage, join_uri

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One immutable file of an index.

    Attributes:
        path: Path under the index.
        size_bytes: Its size.
        sha256: Digest of its bytes, hex.
    """

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SearchParams:
    """How far a search looks; the least that meets the target recall.

    Attributes:
        nprobe: Inverted lists that are scanned; 0 for kinds without lists.
        candidates: Rows of each segment that are ranked again by their stored vectors, at least;
            0 where the codes are exact.
        ef: Candidates that HNSW keeps; 0 for other kinds.
    """

    nprobe: int = 0
    candidates: int = 0
    ef: int = 0


@dataclass(frozen=True, slots=True)
class ShardRows:
    """Where the rows of one shard begin and end in a segment.

    Attributes:
        shard_id: The shard.
        first: Number of its first row.
        rows: How many rows it has there.
        skipped: How many of its rows were left out, having no usable vector.
    """

    shard_id: str
    first: int
    rows: int
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """One immutable segment: some rows, their codes, vectors and keys.

    Attributes:
        id: Digest of what it was built from; names its folder.
        kind: How its rows are encoded.
        delta: True for the rows that a later run added.
        packed: True for the blocked code layout.
        rows: Number of rows, deleted ones included.
        files: ``index`` (FAISS codes), ``vectors`` (float16, row-major), ``keys`` (Parquet),
            ``order`` (row numbers in the order of keys, uint32), ``truth`` (exact neighbours of the
            held-out queries), and ``lists`` (rows per inverted list, uint32) where there are any.
        skipped: Rows left out by reason: ``zero``, ``non_finite``.
        mean_cosine: Mean cosine of rows to the centroid of their list; None without lists.
        first_key: Smallest key.
        last_key: Largest key.
    """

    id: str
    kind: str
    delta: bool
    packed: bool
    rows: int
    files: Mapping[str, FileInfo]
    skipped: Mapping[str, int] = field(default_factory=dict)
    mean_cosine: float | None = None
    first_key: str = ""
    last_key: str = ""

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        return sum(file.size_bytes for file in self.files.values())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SegmentInfo":
        """Read ``asdict``."""
        known = _pick(cls, values)
        known["files"] = {name: FileInfo(**file) for name, file in values["files"].items()}
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Tombstones:
    """The deleted rows of one segment.

    Attributes:
        file: One bit a row, lowest first; 1 is deleted.
        rows: Number of deleted rows.
    """

    file: FileInfo
    rows: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Tombstones":
        """Read ``asdict``."""
        return cls(FileInfo(**values["file"]), values["rows"])


@dataclass(frozen=True, slots=True)
class CodecInfo:
    """The codec that all segments share.

    Attributes:
        id: Digest of its file.
        kind: Kind of index it encodes for.
        factory: FAISS factory string.
        lists: Number of inverted lists; 0 for kinds without.
        file: The trained, empty index; None for kinds without training.
        trained_rows: Rows of the index when it was trained.
        imbalance: Imbalance of the lists then: 1 is even. None without lists.
        mean_cosine: Mean cosine of rows to their centroid then; None without lists.
    """

    id: str
    kind: str
    factory: str
    lists: int = 0
    file: FileInfo | None = None
    trained_rows: int = 0
    imbalance: float | None = None
    mean_cosine: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CodecInfo":
        """Read ``asdict``."""
        return cls(**_pick(cls, values) | {"file": _parse_file(values.get("file"))})


@dataclass(frozen=True, slots=True)
class EmbeddingsInfo:
    """Where the rows came from.

    Attributes:
        uri: The embeddings output.
        space: The space of all vectors.
        weights: URI of the backbone's weights, to embed a query picture.
        statuses: Rows of the output by status.
        newest_image_s: Change time of the newest image, in seconds since 1970, if known.
    """

    uri: str
    space: Space
    weights: str
    statuses: Mapping[str, int] = field(default_factory=dict)
    newest_image_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {
            "uri": self.uri,
            "space": self.space.to_dict(),
            "space_id": self.space.id,
            "weights": self.weights,
            "statuses": dict(self.statuses),
            "newest_image_s": self.newest_image_s,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EmbeddingsInfo":
        """Read ``to_dict``."""
        return cls(**_pick(cls, values) | {"space": Space.from_dict(values["space"])})


@dataclass(frozen=True, slots=True)
class Manifest:
    """One published, immutable index.

    Attributes:
        generation: Its name, ``"<seq>-<uid>"``.
        seq: Number of the publication that made it; grows by one.
        parent: The generation it was derived from, or None.
        created_s: When, in seconds since 1970.
        embeddings: Where its rows came from.
        dim: Width of the vectors.
        rows: Live rows.
        codec: What its segments share.
        segments: Its segments; main ones first.
        tombstones: Deleted rows by segment id.
        search: Tuned search parameters.
        reason: Why this kind was chosen, in one line.
        change: What became of the parent's rows, in one line.
        queries: Held-out queries and the floors of their exact neighbours; empty without rows.
        measured: Recall and latency of ``search`` on them.
        curve: The same for every setting that was tried.
        owners: The file that says which live shards own which rows.
        map: A sample of the rows in two dimensions, to look at; None where there is none.
        skipped: Committed vectors that are not usable: zero, or not finite.
        faiss_version: The library that wrote the codes.
        version: Version of this project that built it; empty before versions were recorded.
        metric: Always ``"cosine"``: inner product of unit vectors.
        format: Version of this layout.
    """

    generation: str
    seq: int
    parent: str | None
    created_s: float
    embeddings: EmbeddingsInfo
    dim: int
    rows: int
    codec: CodecInfo
    segments: tuple[SegmentInfo, ...]
    tombstones: Mapping[str, Tombstones] = field(default_factory=dict)
    search: SearchParams = SearchParams()
    reason: str = ""
    change: str = ""
    queries: Mapping[str, FileInfo] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    curve: tuple[Mapping[str, Any], ...] = ()
    owners: FileInfo | None = None
    map: FileInfo | None = None
    skipped: int = 0
    faiss_version: str = ""
    version: str = ""
    metric: str = "cosine"
    format: int = FORMAT_VERSION

    def list_files(self) -> list[FileInfo]:
        """Return every file that the generation names."""
        return self.list_needed() + ([] if self.map is None else [self.map])

    def list_needed(self) -> list[FileInfo]:
        """Return the files without which it can neither be searched nor built on.

        The map is not among them: it is only to look at.
        """
        files = [file for segment in self.segments for file in segment.files.values()]
        files += [tombstones.file for tombstones in self.tombstones.values()]
        files += self.queries.values()
        files += [file for file in (self.codec.file, self.owners) if file is not None]
        return files

    def to_json(self) -> bytes:
        """Serialise for ``manifest.json``."""
        values = {item.name: getattr(self, item.name) for item in fields(self)} | {
            "embeddings": self.embeddings.to_dict(),
            "codec": asdict(self.codec),
            "segments": [asdict(segment) for segment in self.segments],
            "tombstones": {name: asdict(item) for name, item in self.tombstones.items()},
            "search": asdict(self.search),
            "queries": {name: asdict(file) for name, file in self.queries.items()},
            "owners": asdict(self.owners) if self.owners else None,
            "map": asdict(self.map) if self.map else None,
        }
        return seal(values, indent=1)

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read ``to_json``.

        Raises:
            ValueError: It has been damaged, or is something else; so do KeyError and TypeError.
        """
        values = unseal(data)
        parsed = {
            "embeddings": EmbeddingsInfo.from_dict(values["embeddings"]),
            "codec": CodecInfo.from_dict(values["codec"]),
            "segments": tuple(map(SegmentInfo.from_dict, values["segments"])),
            "tombstones": {k: Tombstones.from_dict(v) for k, v in values["tombstones"].items()},
            "search": SearchParams(**values["search"]),
            "queries": {name: FileInfo(**file) for name, file in values["queries"].items()},
            "curve": tuple(values["curve"]),
            "owners": _parse_file(values.get("owners")),
            "map": _parse_file(values.get("map")),
        }
        return cls(**_pick(cls, values) | parsed)


def seal(values: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """Serialise values as JSON together with their digest, so that damage shows to any reader."""
    plain = json.loads(json.dumps(values))  # tuples become lists, as whoever reads them gets them
    sealed = plain | {"digest": digest_json(plain)}
    return json.dumps(sealed, indent=indent, ensure_ascii=False).encode() + b"\n"


def unseal(data: bytes, *, strict: bool = False) -> dict[str, Any]:
    """Read ``seal``.

    Args:
        data: What was serialised.
        strict: Refuse values without a digest; older programs wrote none.

    Raises:
        ValueError: It is no JSON object, or its digest is another.
    """
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    digest = values.pop("digest", None)
    if digest != digest_json(values) and (strict or digest is not None):
        raise ValueError("its content does not match its digest")
    return values


def _pick(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(cls) if item.name in values}


def _parse_file(values: Mapping[str, Any] | None) -> FileInfo | None:
    return None if values is None else FileInfo(**values)


def digest_bytes(data: bytes) -> str:
    """Return the SHA-256 of ``data``, hex."""
    return hashlib.sha256(data).hexdigest()


def put_file(index: str, path: str, *, data: bytes, storage: Storage) -> FileInfo:
    """Write a small file of an index and describe it."""
    storage.put(join_uri(index, path), data)
    return FileInfo(path, len(data), digest_bytes(data))
