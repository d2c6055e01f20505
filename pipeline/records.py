"""The values and Arrow schemas that cross the borders between stages."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import __version__

FORMAT_VERSION = 1

STATUSES = (
    "ok",
    "unreadable",
    "unsupported",
    "too_large",
    "truncated",
    "non_finite",
    "bad_shard",
)
"""What became of a record. Everything but ``ok`` has a null embedding and a reason."""

PART_COLUMNS = frozenset(
    [
        "key",
        "shard",
        "row",
        "status",
        "error",
        "width",
        "height",
        "offset",
        "nbytes",
        "sha256",
        "embedding",
        "class_index",
        "class_prob",
    ]
)
"""Names of the columns that a part may have besides the carried ones."""

Classes = tuple[NDArray[np.int16], NDArray[np.float32]]
"""Class indices, int16 (k,) or (B, k), and their probabilities, float32, best first."""


def digest_json(value: object, *, length: int = 16) -> str:
    """Return the first ``length`` hex digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def describe_job(job: str) -> dict[str, Any]:
    """Return how every report begins: the job, and the version of this project that ran it."""
    return {"job": job, "version": __version__}


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as a listing shows it.

    Attributes:
        uri: Full URI, e.g. ``"s3://bucket/train/00042.tar"``; local files as absolute paths.
        size_bytes: Size as listed; -1 for what has no content: a pipe, a socket, a device.
        version: Changes whenever the content does: the etag, or ``"<size>-<mtime ns>"``.
        modified_s: Time of the last change in seconds since 1970, or None if unknown.
    """

    uri: str
    size_bytes: int
    version: str
    modified_s: float | None = None


@dataclass(frozen=True, slots=True)
class FailedObject:
    r"""An object, or a whole folder, that is there but cannot be described or read.

    Attributes:
        uri: Its URI; bytes of a name that are no UTF-8 are written as ``\xe9``.
        reason: Why, and what to do.
    """

    uri: str
    reason: str


@dataclass(frozen=True, slots=True)
class Space:
    """What decides the numbers of an embedding; vectors of two spaces never meet.

    Attributes:
        backbone: Tagged name, e.g. ``"resnetv2_50.a1h_in1k"``.
        weights_sha256: Digest of all weights (keys, dtypes, shapes, bytes), hex.
        image_size: Side of the square input, pixels.
        crop_pct: Share of the resized short side that the crop keeps.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        mean: Per-channel mean of RGB scaled to [0, 1].
        std: Per-channel standard deviation, same scale.
        exif: ``"apply"`` turns the picture as its EXIF orientation says, ``"ignore"`` does not.
        decode: ``"exact"``, ``"fast"`` (JPEG draft scaling) or ``"gpu"``.
        precision: Arithmetic of the forward pass: ``"fp32"``, ``"tf32"``, ``"bf16"``, ``"fp16"``.
        dim: Width of the embedding.
        versions: Versions of what the numbers depend on, e.g. ``{"pillow": "13.0.0"}``.
    """

    backbone: str
    weights_sha256: str
    image_size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    exif: str
    decode: str
    precision: str
    dim: int
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Digest of all fields, 16 hex digits."""
        return digest_json(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self) | {
            "mean": list(self.mean),
            "std": list(self.std),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Space":
        """Build a space from ``to_dict``; fields that are not a space's are left out."""
        known = {f.name: values[f.name] for f in fields(cls)}
        return cls(**known | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})


@dataclass(frozen=True, slots=True)
class Layout:
    """What decides the rows and columns of an output besides the space.

    Attributes:
        chunk_images: Most images in a chunk, and so rows in a part.
        chunk_bytes: Most encoded bytes in a chunk; a larger single image is a chunk alone.
        embedding_dtype: ``"float32"`` or ``"float16"``.
        top_k_classes: Classes kept per row; 0 leaves the two class columns out.
        carry: Names of the carried columns: sidecar extensions or Parquet columns.
        image_column: Parquet column with the encoded images; None finds it by its type.
        key_column: Parquet column with the keys; None takes the row number.
    """

    chunk_images: int
    chunk_bytes: int
    embedding_dtype: Literal["float32", "float16"] = "float32"
    top_k_classes: int = 0
    carry: tuple[str, ...] = ()
    image_column: str | None = None
    key_column: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self) | {"carry": list(self.carry)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Layout":
        """Build a layout from ``to_dict``."""
        known = {f.name: values[f.name] for f in fields(cls)}
        return cls(**known | {"carry": tuple(values["carry"])})


@dataclass(frozen=True, slots=True)
class Member:
    """One loose image of a bundle.

    Attributes:
        key: Unique, stable name: its path under the input root.
        uri: The object.
        size_bytes: Size as listed.
        version: Version as listed.
    """

    key: str
    uri: str
    size_bytes: int
    version: str


ShardKind = Literal["tar", "parquet", "bundle"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of work: an input object, or a bundle of loose images.

    Attributes:
        id: Digest of source, version, space and chunking, 16 hex digits. Names the output, so a
            changed source is a new shard.
        kind: How to read it.
        source: URI of the object; of a bundle, the URI of its first member.
        root: The input it was found under, as a URI.
        name: Path under the root; prefix of its records' keys. Empty for a bundle.
        size_bytes: Size as listed, summed over a bundle's members.
        version: Version as listed; a digest of the members' for a bundle.
        modified_s: When the newest of it was changed, in seconds since 1970, if known.
        members: The images of a bundle in row order; empty otherwise.
        supersedes: Ids of the shards whose rows this one replaces.
        folder: Where its parts go, under ``parts/``; its id, but for a shard embedded once more.
    """

    id: str
    kind: ShardKind
    source: str
    root: str
    name: str
    size_bytes: int
    version: str
    modified_s: float | None = None
    members: tuple[Member, ...] = ()
    supersedes: tuple[str, ...] = ()
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a shard as it was read: encoded bytes, not yet looked at.

    Attributes:
        key: Unique and stable over the whole input.
        row: Position in its shard, from 0.
        shard: URI of the object that holds it.
        data: The encoded image, or a view of it in a larger buffer; empty where reading failed.
        offset: Where the encoded image starts in ``shard``, bytes; None where no ranged read can
            give it (Parquet, compressed tar).
        carried: Carried columns by name, values as ``carried.to_values`` gives them.
        status: ``"ok"`` as far as reading goes, or why there is nothing to decode.
        error: The reason when ``status`` is not ``"ok"``.
        left_behind_bytes: Length of the encoded image where only its crop travels on, and
            ``data`` is empty.
    """

    key: str
    row: int
    shard: str
    data: bytes | memoryview
    offset: int | None
    carried: Mapping[str, Any] = field(default_factory=dict)
    status: str = "ok"
    error: str | None = None
    left_behind_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Length of the encoded image."""
        return len(self.data) or self.left_behind_bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """Up to ``chunk_images`` consecutive records of one shard; becomes one part.

    Attributes:
        shard_id: The shard.
        index: Position among the shard's chunks, from 0.
        records: The records, in row order; none where the shard has none, or all are absent.
        last: True on the shard's final chunk, which closes the shard.
        notes: Counts that make no row, e.g. ``{"ignored_members": 2}``; of the whole shard, on
            its last chunk.
        absent: Images of a bundle that could not be had: row and reason. They take a place in the
            chunk but get no row of the output.
    """

    shard_id: str
    index: int
    records: Sequence[Record]
    last: bool
    notes: Mapping[str, int] = field(default_factory=dict)
    absent: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Embedding:
    """What became of one image.

    Attributes:
        status: ``"ok"`` or why there is no vector, one of ``STATUSES``.
        error: The reason when ``status`` is not ``"ok"``.
        width: Width of the original image, pixels; None when it could not be decoded.
        height: Height of the original image, pixels.
        digest: First 16 bytes of the SHA-256 of the encoded image; None without any bytes.
        vector: Pooled embedding, float32 (D,), not normalised.
        classes: Indices, int16 (k,), and probabilities, float32 (k,), best first.
    """

    status: str
    error: str | None = None
    width: int | None = None
    height: int | None = None
    digest: bytes | None = None
    vector: NDArray[np.float32] | None = None
    classes: Classes | None = None


@dataclass(frozen=True, slots=True)
class PartInfo:
    """One written part, as its commit records it.

    Attributes:
        path: Path under the output, ``"parts/<shard id>/<chunk>-<digest>.parquet"``.
        rows: Number of rows.
        rows_sha256: Digest of what identifies the rows (key, row, status, image digest): equal
            for every retry, whatever the float noise of the vectors.
        size_bytes: Size of the Parquet object.
        statuses: Number of rows by status.
        sha256: Digest of the Parquet object, hex; empty in commits written before it was recorded.
    """

    path: str
    rows: int
    rows_sha256: str
    size_bytes: int
    statuses: Mapping[str, int]
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """The record that a shard is complete; written last, by the driver alone.

    Attributes:
        shard_id: The shard.
        kind: How its source is read.
        source: URI of the source object; of a bundle, of its first member.
        root: The input it was found under, as a URI.
        name: Path under the root; prefix of its records' keys. Empty for a bundle.
        version: Version of the source as listed.
        size_bytes: Size of the source as listed.
        space_id: The space of its vectors.
        parts: Its parts, in order; they tile the shard.
        members: A bundle's images, in row order.
        supersedes: Ids of the shards whose rows this commit replaces.
        notes: Counts that make no row.
        sequence: Number of the run that committed it; of two commits that supersede each
            other (a source that went back to an older version) the higher one is live.
        run_id: The run that committed it.
        committed_s: When, in seconds since 1970.
        modified_s: When the newest of its source was changed, in seconds since 1970, if known.
    """

    shard_id: str
    kind: ShardKind
    source: str
    root: str
    name: str
    version: str
    size_bytes: int
    space_id: str
    parts: tuple[PartInfo, ...]
    members: tuple[Member, ...] = ()
    supersedes: tuple[str, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    sequence: int = 1
    run_id: str = ""
    committed_s: float = 0.0
    modified_s: float | None = None

    @property
    def rows(self) -> int:
        """Number of rows over all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def statuses(self) -> dict[str, int]:
        """Number of rows by status over all parts."""
        return count_statuses(part.statuses for part in self.parts)

    def to_json(self) -> bytes:
        """Serialise for ``commits/<shard id>.json``."""
        values = asdict(self) | {"rows": self.rows, "statuses": self.statuses}
        return json.dumps(values, ensure_ascii=False, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Commit":
        """Read ``to_json``; unknown fields are left out, so that newer writers stay readable."""
        values = json.loads(data)
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        known["parts"] = tuple(PartInfo(**part) for part in known["parts"])
        known["members"] = tuple(Member(**member) for member in known.get("members", ()))
        known["supersedes"] = tuple(known.get("supersedes", ()))
        return cls(**known)


def count_statuses(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add up mappings of status to number of rows, in the order of ``STATUSES``."""
    totals: dict[str, int] = {}
    for mapping in counts:
        for status, number in mapping.items():
            totals[status] = totals.get(status, 0) + number
    return {status: totals[status] for status in STATUSES if status in totals}


def part_schema(space: Space, layout: Layout, carried: pa.Schema | None = None) -> pa.Schema:
    """Return the Arrow schema of a part.

    Args:
        space: Gives the width of the embedding.
        layout: Gives its dtype and the optional columns.
        carried: Types of the carried columns; strings where None.
    """
    scalar = pa.float16() if layout.embedding_dtype == "float16" else pa.float32()
    columns = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("nbytes", pa.int32(), nullable=False),
        pa.field("sha256", pa.binary(16)),
        pa.field("embedding", pa.list_(scalar, space.dim)),
    ]
    if layout.top_k_classes:
        columns.append(pa.field("class_index", pa.list_(pa.int16())))
        columns.append(pa.field("class_prob", pa.list_(pa.float32())))
    for name in layout.carry:
        columns.append(carried.field(name) if carried is not None else pa.field(name, pa.string()))
    return pa.schema(columns)
