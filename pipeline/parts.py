"""The embeddings output: space, parts and commits; written, listed, verified, read.

A shard is done if and only if ``commits/<shard id>.json`` exists. Everything a reader sees goes
through ``list_commits``; nothing else decides what is live.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from pipeline.errors import (
    CorruptionError,
    ObjectMissingError,
    SettingsError,
    SpaceMismatchError,
    StorageError,
)
from pipeline.records import (
    FORMAT_VERSION,
    Commit,
    Embedding,
    Layout,
    PartInfo,
    Record,
    Space,
    count_statuses,
    part_schema,
)
from pipeline.storage import Storage, join_uri, normalise_uri

_THREADS = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class OutputInfo:
    """What ``space.json`` records about an output.

    Attributes:
        space: The space of all its vectors.
        layout: Its rows and columns.
        carried: Arrow types of the carried columns, in the order of ``layout.carry``.
        weights: Path of the weights under the output; actors and lookups load them from there.
        weights_source: What was asked for when the output was made, e.g. ``"pretrained"``.
        weights_revision: Commit of the weights on the hub; None for other sources.
    """

    space: Space
    layout: Layout
    carried: pa.Schema
    weights: str
    weights_source: str
    weights_revision: str | None = None

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of every part."""
        return part_schema(self.space, self.layout, self.carried)

    def to_json(self) -> bytes:
        """Serialise for ``space.json``."""
        values = self.space.to_dict() | {
            "id": self.space.id,
            "format": FORMAT_VERSION,
            "layout": self.layout.to_dict(),
            "carried_schema": self.carried.serialize().to_pybytes().hex(),
            "weights": self.weights,
            "weights_source": self.weights_source,
            "weights_revision": self.weights_revision,
        }
        return json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "OutputInfo":
        """Read ``to_json``."""
        values = json.loads(data)
        carried = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(values["carried_schema"])))
        layout = Layout.from_dict(values["layout"])
        return cls(
            Space.from_dict(values),
            layout,
            carried,
            values["weights"],
            values["weights_source"],
            values["weights_revision"],
        )


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of ``verify_output``.

    Attributes:
        commits: Number of live commits looked at.
        parts: Number of parts read.
        rows: Number of rows read.
        statuses: Rows by status.
        problems: One sentence per problem, with the object it is about; empty if all is well.
    """

    commits: int
    parts: int
    rows: int
    statuses: Mapping[str, int]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "job": "verify",
            "commits": self.commits,
            "parts": self.parts,
            "rows": self.rows,
            "statuses": dict(self.statuses),
            "problems": list(self.problems),
        }


def part_path(folder: str, chunk: int) -> str:
    """Return the path of a part under the output; ``folder`` is the shard's."""
    return f"parts/{folder}/{chunk:05d}.parquet"


def commit_path(shard_id: str) -> str:
    """Return the path of a live commit under the output."""
    return f"commits/{shard_id}.json"


def retired_path(shard_id: str) -> str:
    """Return where the commit of a removed or superseded shard is kept until it is pruned."""
    return f"retired/{shard_id}.json"


def read_output_info(output: str, storage: Storage) -> OutputInfo | None:
    """Return what ``space.json`` of ``output`` records, or None where there is no output yet.

    Raises:
        CorruptionError: ``space.json`` is there but cannot be understood.
    """
    uri = join_uri(output, "space.json")
    try:
        data = storage.read(uri)
    except ObjectMissingError:
        return None
    try:
        return OutputInfo.from_json(data)
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CorruptionError(
            f"{uri} is not a space record ({error}); restore it, or write to another output"
        ) from error


def read_space(output: str, storage: Storage) -> Space:
    """Return the space of an existing output.

    Raises:
        ObjectMissingError: There is no output at that URI.
    """
    info = read_output_info(output, storage)
    if info is None:
        raise ObjectMissingError(
            f"no embeddings at {output!r}: space.json is missing; check the URI, or run embed first"
        )
    return info.space


def claim_output(output: str, info: OutputInfo, storage: Storage) -> OutputInfo:
    """Make ``output`` one of this space and layout, or check that it already is.

    Returns:
        What is recorded at the output.

    Raises:
        SpaceMismatchError: The output belongs to another space or layout; names the fields.
    """
    found = read_output_info(output, storage)
    if found is None:
        storage.put(join_uri(output, "space.json"), info.to_json())
        return info
    wanted, recorded = _list_fields(info), _list_fields(found)
    differing = [name for name in wanted if wanted[name] != recorded.get(name)]
    if differing:
        details = "; ".join(
            f"{name} is {recorded.get(name)!r} there and {wanted[name]!r} here"
            for name in differing
        )
        raise SpaceMismatchError(
            f"{output!r} holds other embeddings: {details}; "
            "use the same settings, or another --output"
        )
    return found


def _list_fields(info: OutputInfo) -> dict[str, Any]:
    return info.space.to_dict() | info.layout.to_dict()


def encode_part(table: pa.Table, *, metadata: Mapping[str, str]) -> bytes:
    """Return ``table`` as one Parquet object with page checksums and ``metadata``."""
    schema = table.schema.with_metadata(dict(metadata))
    sink = io.BytesIO()
    pq.write_table(
        table.cast(schema),
        sink,
        compression="zstd",
        write_page_checksum=True,
        use_dictionary=["shard", "status", "error"],
        write_statistics=["key", "row", "status"],
        row_group_size=max(1, table.num_rows),
    )
    return sink.getvalue()


def digest_rows(table: pa.Table) -> str:
    """Return the digest of what identifies the rows, the same for every retry, hex."""
    digest = hashlib.sha256()
    columns = [table.column(name).to_pylist() for name in ("row", "key", "status", "sha256")]
    for row, key, status, image in zip(*columns, strict=True):
        digest.update(f"{row}\0{key}\0{status}\0{image.hex() if image else ''}\n".encode())
    return digest.hexdigest()


def write_part(
    output: str, table: pa.Table, *, folder: str, chunk: int, space_id: str, storage: Storage
) -> PartInfo:
    """Write one chunk's rows under its content-derived name and describe it."""
    rows_sha256 = digest_rows(table)
    metadata = {
        "space_id": space_id,
        "chunk": str(chunk),
        "rows_sha256": rows_sha256,
    }
    data = encode_part(table, metadata=metadata)
    path = part_path(folder, chunk)
    storage.put(join_uri(output, path), data)
    counts = pc.value_counts(table.column("status")).to_pylist()
    statuses = count_statuses([{item["values"]: item["counts"]} for item in counts])
    return PartInfo(path, table.num_rows, rows_sha256, len(data), statuses)


def write_commit(output: str, commit: Commit, storage: Storage) -> None:
    """Make a shard's rows visible, and those it supersedes invisible, in one write."""
    storage.put(join_uri(output, commit_path(commit.shard_id)), commit.to_json())


def retire_commit(output: str, shard_id: str, storage: Storage) -> None:
    """Take a shard out of the live rows, reversibly: its parts stay until they are pruned."""
    uri = join_uri(output, commit_path(shard_id))
    try:
        data = storage.read(uri)
    except ObjectMissingError:
        return
    storage.put(join_uri(output, retired_path(shard_id)), data)
    storage.delete([uri])


def restore_commit(output: str, commit: Commit, storage: Storage) -> None:
    """Bring a retired shard back; ``commit`` is its record with the new sequence."""
    write_commit(output, commit, storage)
    storage.delete([join_uri(output, retired_path(commit.shard_id))])


def list_commits(output: str, storage: Storage) -> dict[str, Commit]:
    """Return the live commits by shard id, in the order of their ids.

    Superseded commits that still lie there are left out.

    Raises:
        CorruptionError: A commit cannot be understood.
    """
    return split_commits(_read_commits(output, "commits", storage))[0]


def list_present_commits(
    output: str, storage: Storage
) -> tuple[dict[str, Commit], dict[str, Commit]]:
    """Return the live commits, and the superseded ones that still lie among them."""
    return split_commits(_read_commits(output, "commits", storage))


def list_retired(output: str, storage: Storage) -> dict[str, Commit]:
    """Return the commits of removed and superseded shards by shard id."""
    return _read_commits(output, "retired", storage)


def split_commits(commits: Mapping[str, Commit]) -> tuple[dict[str, Commit], dict[str, Commit]]:
    """Split commits into live and superseded ones.

    A commit is superseded by a later one that names it; later, because a source that went back to
    an older version brings back a commit that the newer version's had superseded.
    """
    newest: dict[str, int] = {}
    for commit in commits.values():
        for shard_id in commit.supersedes:
            newest[shard_id] = max(newest.get(shard_id, 0), commit.sequence)
    live = {key: c for key, c in commits.items() if newest.get(key, 0) <= c.sequence}
    return live, {key: c for key, c in commits.items() if key not in live}


def _read_commits(output: str, folder: str, storage: Storage) -> dict[str, Commit]:
    listed = storage.list_objects(join_uri(output, folder))
    uris = [info.uri for info in listed if info.uri.endswith(".json")]
    read = partial(_read_commit, storage=storage)
    found = [commit for commit in map_threads(read, uris) if commit is not None]
    return {commit.shard_id: commit for commit in found}


def _read_commit(uri: str, *, storage: Storage) -> Commit | None:
    try:
        data = storage.read(uri)
    except ObjectMissingError:  # retired between the listing and now
        return None
    try:
        return Commit.from_json(data)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptionError(
            f"{uri} is not a commit ({error}); delete it, and the next run embeds its shard again"
        ) from error


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Apply a function that waits for storage to all items at once, in order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def read_embeddings(uri: str, storage: Storage | None = None) -> pyarrow.dataset.Dataset:
    """Open the committed rows of an output as a dataset; parts without a commit are not seen.

    Args:
        uri: The output.
        storage: How to reach it; credentials from the environment otherwise.

    Returns:
        One row per image, columns as in ``records.part_schema``; the order of rows is the shards'
        in the order of their ids, and the images' within them.

    Raises:
        ObjectMissingError: There is no output at ``uri``.
    """
    storage = storage or Storage()
    output = normalise_uri(uri)
    info = read_output_info(output, storage)
    if info is None:
        raise ObjectMissingError(
            f"no embeddings at {uri!r}: space.json is missing; check the URI, or run embed first"
        )
    filesystem, base = storage.arrow_filesystem(output)
    paths = [
        f"{base}/{part.path}"
        for commit in list_commits(output, storage).values()
        for part in commit.parts
    ]
    if not paths:
        return pyarrow.dataset.dataset(info.schema.empty_table())
    return pyarrow.dataset.dataset(
        paths, schema=info.schema, filesystem=filesystem, format="parquet"
    )


def verify_output(output: str, storage: Storage) -> VerifyReport:
    """Read every part of every live commit and compare it with what the commit recorded.

    Checks that parts are there, whole (page checksums), of the recorded space, schema, row count
    and row digest, that vectors are null exactly where the status is not ``ok``, and that no key
    occurs twice.

    Raises:
        ObjectMissingError: There is no output at that URI.
    """
    info = read_output_info(output, storage)
    if info is None:
        raise ObjectMissingError(f"no embeddings at {output!r}: space.json is missing")
    commits = list_commits(output, storage)
    problems: list[str] = []
    keys: set[bytes] = set()
    checks = [(commit, part) for commit in commits.values() for part in commit.parts]
    for found, part_keys in _check_parts(output, info, checks, storage):
        problems += found
        for key in part_keys:
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            if digest in keys:
                problems.append(f"key {key!r} occurs more than once")
            keys.add(digest)
    return VerifyReport(
        commits=len(commits),
        parts=len(checks),
        rows=sum(commit.rows for commit in commits.values()),
        statuses=count_statuses(commit.statuses for commit in commits.values()),
        problems=tuple(problems),
    )


def _check_parts(
    output: str, info: OutputInfo, checks: Sequence[tuple[Commit, PartInfo]], storage: Storage
) -> Iterator[tuple[list[str], list[str]]]:
    def check(item: tuple[Commit, PartInfo]) -> tuple[list[str], list[str]]:
        uri = join_uri(output, item[1].path)
        try:
            table = pq.read_table(
                pa.BufferReader(storage.read(uri)), page_checksum_verification=True
            )
        except ObjectMissingError:
            return [f"{uri} is missing"], []
        except (pa.ArrowException, OSError, StorageError) as error:
            return [f"{uri} cannot be read: {error}"], []
        problems = [f"{uri} {problem}" for problem in _check_table(table, info, *item)]
        return problems, table.column("key").to_pylist()

    step = 4 * _THREADS
    for start in range(0, len(checks), step):
        yield from map_threads(check, checks[start : start + step])


def _check_table(
    table: pa.Table, info: OutputInfo, commit: Commit, part: PartInfo
) -> Iterator[str]:
    metadata = table.schema.metadata or {}
    if not table.schema.equals(info.schema, check_metadata=False):
        yield "has another schema than space.json describes"
        return
    if metadata.get(b"space_id", b"").decode() != commit.space_id:
        yield f"is of space {metadata.get(b'space_id', b'').decode()!r}, not {commit.space_id!r}"
    if commit.space_id != info.space.id:
        yield f"was committed for space {commit.space_id!r}; the output is of {info.space.id!r}"
    if table.num_rows != part.rows:
        yield f"has {table.num_rows} rows, its commit says {part.rows}"
    if digest_rows(table) != part.rows_sha256:
        yield "does not hold the rows that its commit recorded"
    valid = pc.is_valid(table.column("embedding"))
    if not valid.equals(pc.equal(table.column("status"), "ok")):
        yield "has embeddings that do not go with their status"


def prune_output(output: str, storage: Storage) -> int:
    """Delete the files of retired shards and parts that no commit names; return how many.

    Only the holder of the output's lease may call this: a run that is writing has parts that no
    commit names yet.
    """
    live = {part.path for commit in list_commits(output, storage).values() for part in commit.parts}
    base = len(output) + 1
    parts = [
        info.uri
        for info in storage.list_objects(join_uri(output, "parts"))
        if info.uri[base:] not in live
    ]
    retired = [info.uri for info in storage.list_objects(join_uri(output, "retired"))]
    storage.delete(retired)  # first: a retired commit promises that its parts are there
    storage.delete(parts)
    return len(retired) + len(parts)


def renew_commit(
    commit: Commit, *, sequence: int, run_id: str, supersedes: Sequence[str]
) -> Commit:
    """Return a retired commit as it is restored by a later run."""
    return replace(commit, sequence=sequence, run_id=run_id, supersedes=tuple(supersedes))


def build_part(
    records: Sequence[Record], embeddings: Sequence[Embedding], schema: pa.Schema
) -> pa.Table:
    """Return the rows of one chunk as a table of ``schema``; one row per record, in order.

    Raises:
        SettingsError: A carried value does not fit the column's type.
    """
    columns: dict[str, Any] = {
        "key": [record.key for record in records],
        "shard": [record.shard for record in records],
        "row": [record.row for record in records],
        "status": [embedding.status for embedding in embeddings],
        "error": [embedding.error for embedding in embeddings],
        "width": [embedding.width for embedding in embeddings],
        "height": [embedding.height for embedding in embeddings],
        "offset": [record.offset for record in records],
        "nbytes": [record.nbytes for record in records],
        "sha256": [embedding.digest for embedding in embeddings],
    }
    if "class_index" in schema.names:
        columns["class_index"] = [e.classes[0] if e.classes else None for e in embeddings]
        columns["class_prob"] = [e.classes[1] if e.classes else None for e in embeddings]
    arrays = {name: pa.array(column, schema.field(name).type) for name, column in columns.items()}
    arrays["embedding"] = _build_vectors(embeddings, schema.field("embedding").type)
    for name in set(schema.names) - set(arrays):
        arrays[name] = _build_carried(name, records, schema.field(name).type)
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _build_vectors(embeddings: Sequence[Embedding], kind: pa.DataType) -> pa.Array:
    dtype = kind.value_type.to_pandas_dtype()
    values = np.zeros((len(embeddings), kind.list_size), dtype)
    missing = np.ones(len(embeddings), bool)
    for i, embedding in enumerate(embeddings):
        if embedding.vector is not None:
            values[i] = embedding.vector
            missing[i] = False
    return pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1)), type=kind, mask=pa.array(missing)
    )


def _build_carried(name: str, records: Sequence[Record], kind: pa.DataType) -> pa.Array:
    values = [record.carried.get(name) for record in records]
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError) as error:
        raise SettingsError(
            f"column {name!r} of {records[0].shard} does not fit the output's type {kind}: "
            f"{error}; leave it out of --carry, or use another --output"
        ) from error
