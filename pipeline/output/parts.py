"""Parts: one Parquet object a chunk, encoded, digested and written under its own name."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from pipeline.carried import to_array, to_values
from pipeline.errors import (
    SettingsError,
)
from pipeline.records import (
    Embedding,
    PartInfo,
    Record,
    count_statuses,
)
from pipeline.storage import Storage, join_uri


def part_path(folder: str, chunk: int, sha256: str) -> str:
    """Return the path of a part under the output.

    The digest is in the name, so two attempts at one chunk whose outcomes differ (an image that was
    too slow once, float noise) never write to one name, however late one of them writes.

    Args:
        folder: The shard's folder under ``parts/``.
        chunk: Position among the shard's chunks.
        sha256: Digest of the Parquet object, hex.
    """
    return f"parts/{folder}/{chunk:05d}-{sha256[:16]}.parquet"


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
    """Write one chunk's rows as a Parquet object named by its content, and describe it."""
    rows_sha256 = digest_rows(table)
    metadata = {
        "space_id": space_id,
        "chunk": str(chunk),
        "rows_sha256": rows_sha256,
    }
    data = encode_part(table, metadata=metadata)
    sha256 = hashlib.sha256(data).hexdigest()
    path = part_path(folder, chunk, sha256)
    storage.put(join_uri(output, path), data)
    counts = pc.value_counts(table.column("status")).to_pylist()
    statuses = count_statuses([{item["values"]: item["counts"]} for item in counts])
    return PartInfo(path, table.num_rows, rows_sha256, len(data), statuses, sha256)


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
        array = to_array(values, kind)
        reason = _find_changed(values, to_values(array))
    except (pa.ArrowException, TypeError, OverflowError) as error:
        reason = str(error)
    if reason:
        raise SettingsError(
            f"column {name!r} of {records[0].shard} does not fit the output's type {kind}: "
            f"{reason}; leave it out of --carry, or use another --output"
        )
    return array


def _find_changed(values: Sequence[Any], stored: Sequence[Any]) -> str:
    """Return what became of the first value that is not stored as it is; empty where all are."""
    for value, kept in zip(values, stored, strict=True):
        if value != kept and not (value != value and kept != kept):  # NaN is NaN
            return f"{value!r} would become {kept!r}"
    return ""
