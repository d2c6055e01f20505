"""Images in Parquet files: a binary column, or the ``{bytes, path}`` struct of Hugging Face."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.carried import choose_type, convert_column, to_values
from pipeline.errors import NoImagesError, RecordError, SettingsError, describe_excess_bytes
from pipeline.input.container import (
    BrokenContainerError,
    FoundImage,
    ReadOptions,
    is_fault_of_data,
    note_missing,
)

_REQUEST_BYTES = 8 << 20
_BATCH_BYTES = 8 << 20


_BINARY_TYPES = (pa.binary(), pa.large_binary(), pa.binary_view())


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns to read from a file.

    Attributes:
        image: Name of the column with the images.
        paths: What Parquet calls the columns to read.
        is_struct: Whether the images are in the field ``bytes`` of ``image``.
        key: Name of the column with the keys, if any.
        carried: Names of the carried columns that are there.
    """

    image: str
    paths: tuple[str, ...]
    is_struct: bool
    key: str | None
    carried: tuple[str, ...]


def read_parquet(
    file: BinaryIO, *, uri: str, options: ReadOptions, notes: Counter[str]
) -> Iterator[FoundImage]:
    """Yield the images of a file in row order; a row without image bytes is ``unreadable``.

    Reads a few MiB at a time, whatever the size of a row group. The one thing that has to fit
    into memory is a data page, which some writers fill with a thousand rows.

    Args:
        file: The file, seekable.
        uri: What error messages call it.
        options: Which columns to read.
        notes: Counts carried columns that the file is without.

    Raises:
        BrokenContainerError: The file is damaged. All rows before the damage have been yielded.
        NoImagesError: No column holds images.
        SettingsError: A named column is missing, more than one may hold the images, or a column
            is of the wrong type.
        UnfitValueError: The output's column cannot hold a carried value.
    """
    with _explaining_damage():
        source = _open(file)
        columns = _choose_columns(source.schema_arrow, uri, options)
        missing = [name for name in options.carry if name not in columns.carried]
        note_missing(missing, known=source.schema_arrow.names, notes=notes)
        rows = min(_choose_batch_rows(source, columns), options.chunk_images)
        row = 0
        for group in range(source.metadata.num_row_groups):
            for batch in _read_row_group(source, group, columns, rows):
                yield from _read_batch(batch, columns, row, options)
                row += len(batch)


def read_parquet_row(file: BinaryIO, row: int, *, uri: str, options: ReadOptions) -> bytes:
    """Return the encoded image of one row, reading as little as possible besides.

    Raises:
        BrokenContainerError: The file is damaged.
        RecordError: There is no image in this row.
        SettingsError: As for ``read_parquet``.
    """
    with _explaining_damage():
        source = _open(file)
        columns = _choose_columns(source.schema_arrow, uri, options)
        group, start = _find_row_group(source.metadata, row, uri)
        rows = _choose_batch_rows(source, columns)
        for batch in _read_row_group(source, group, columns, rows):
            if row - start < len(batch):
                found = next(_read_batch(batch.slice(row - start, 1), columns, row, options))
                if found.status != "ok":
                    raise RecordError(found.status, found.error or "")
                return found.data
            start += len(batch)
    raise BrokenContainerError(f"row {row} is missing in its row group {group}")


def read_schema(file: BinaryIO, *, uri: str, options: ReadOptions) -> pa.Schema:
    """Return the columns of a file; reads its footer.

    Raises:
        BrokenContainerError: The file is damaged.
        SettingsError: As for ``read_parquet``.
    """
    with _explaining_damage():
        schema = _open(file).schema_arrow
    _choose_columns(schema, uri, options)
    return schema


@contextmanager
def _explaining_damage() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError) as error:
        if not is_fault_of_data(error):
            raise
        raise BrokenContainerError(f"not readable as Parquet: {error}") from error


def _open(file: BinaryIO) -> pq.ParquetFile:
    return pq.ParquetFile(
        file, buffer_size=_REQUEST_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def _choose_columns(schema: pa.Schema, uri: str, options: ReadOptions) -> _Columns:
    image = options.image_column or _find_image_column(schema, uri, options)
    for name in filter(None, (image, options.key_column)):
        if name not in schema.names:
            raise SettingsError(f"{uri} has no column {name!r}; its columns are {schema.names}")
    kind = schema.field(image).type
    if not _holds_images(kind):
        raise SettingsError(
            f"column {image!r} of {uri} is of type {kind}; images are read from binary columns "
            "and from structs with a binary field 'bytes'; choose another --image-column"
        )
    if options.key_column and pa.types.is_nested(schema.field(options.key_column).type):
        raise SettingsError(
            f"key column {options.key_column!r} of {uri} is of type "
            f"{schema.field(options.key_column).type}; choose one of text or numbers"
        )
    is_struct = pa.types.is_struct(kind)
    carried = tuple(name for name in options.carry if name in schema.names)
    paths = [image] if not is_struct else [f"{image}.bytes", f"{image}.path"]
    paths += [name for name in (options.key_column, *carried) if name and name != image]
    return _Columns(image, tuple(dict.fromkeys(paths)), is_struct, options.key_column, carried)


def _find_image_column(schema: pa.Schema, uri: str, options: ReadOptions) -> str:
    others = {options.key_column, *options.carry}
    fields = [field for field in schema if field.name not in others and _holds_images(field.type)]
    best = min((_rank(field.type) for field in fields), default=0)
    names: list[str] = [field.name for field in fields if _rank(field.type) == best]
    if len(names) == 1:
        return names[0]
    if not names:
        taken = any(_holds_images(field.type) for field in schema)  # carried, or the key
        fault = SettingsError if taken else NoImagesError
        raise fault(
            f"{uri} has no column of encoded images (binary, or a struct with a binary field "
            f"'bytes'); its columns are {schema.names}"
        )
    raise SettingsError(f"columns {names} of {uri} may all hold the images; set --image-column")


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_fixed_size_binary(kind) or kind in _BINARY_TYPES


def _rank(kind: pa.DataType) -> int:
    """Order types by how likely they hold images; what repeats or has one length seldom does."""
    return 2 * bool(pa.types.is_fixed_size_binary(kind)) + bool(pa.types.is_dictionary(kind))


def _choose_batch_rows(source: pq.ParquetFile, columns: _Columns) -> int:
    """Return how many rows make about ``_BATCH_BYTES``, going by the fullest row group."""
    row_bytes = 1.0
    for group in map(source.metadata.row_group, range(source.metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.split(".")[0] == columns.image.split(".")[0]:
                row_bytes = max(row_bytes, chunk.total_uncompressed_size / max(1, group.num_rows))
    return max(1, int(_BATCH_BYTES / row_bytes))


def _find_row_group(metadata: pq.FileMetaData, row: int, uri: str) -> tuple[int, int]:
    """Return the row group that holds a row, and the number of its first row."""
    start = 0
    for group in range(metadata.num_row_groups):
        if row < start + metadata.row_group(group).num_rows:
            return group, start
        start += metadata.row_group(group).num_rows
    raise RecordError("unreadable", f"{uri} has {start:,} rows; row {row:,} was asked for")


def _read_row_group(
    source: pq.ParquetFile, group: int, columns: _Columns, rows: int
) -> Iterator[pa.RecordBatch]:
    """Yield batches of a row group; on damage, row by row, all rows before it."""
    done = 0
    try:
        for batch in _iterate_row_group(source, group, columns, rows):
            yield batch
            done += len(batch)
    except (pa.ArrowException, OSError):
        yield from islice(_iterate_row_group(source, group, columns, 1), done, None)


def _iterate_row_group(
    source: pq.ParquetFile, group: int, columns: _Columns, rows: int
) -> Iterator[pa.RecordBatch]:
    batches: Iterator[pa.RecordBatch] = source.iter_batches(
        rows, row_groups=[group], columns=columns.paths, use_threads=False
    )
    return batches


def _read_batch(
    batch: pa.RecordBatch, columns: _Columns, first_row: int, options: ReadOptions
) -> Iterator[FoundImage]:
    images = batch.column(columns.image)
    paths: Sequence[str | None] = [None] * len(batch)
    if columns.is_struct:
        if images.type.get_field_index("path") >= 0:
            paths = pc.struct_field(images, "path").to_pylist()
        images = pc.struct_field(images, "bytes")
    lengths = _measure_images(images).to_pylist()
    keys = batch.column(columns.key).to_pylist() if columns.key else [None] * len(batch)
    carried = {name: _read_carried(batch, name, options) for name in columns.carried}
    for i, length in enumerate(lengths):
        name = _to_name(keys[i], first_row + i)
        values = {column: carried[column][i] for column in carried}
        if length is None:
            reason = "no image bytes in this row"
            if paths[i]:
                reason += f"; its path {paths[i]!r} is not followed"
            yield FoundImage(name, b"", None, values, "unreadable", reason)
        elif length > options.max_image_bytes:
            reason = describe_excess_bytes(length, options.max_image_bytes)
            yield FoundImage(name, b"", None, values, "too_large", reason)
        else:
            yield FoundImage(name, images[i].as_py(), None, values)


def _measure_images(images: pa.Array) -> pa.Array:
    """Return the encoded length of each image; Arrow does not know that of every layout."""
    if pa.types.is_dictionary(images.type):
        return _measure_images(images.dictionary).take(images.indices)
    if pa.types.is_binary_view(images.type):
        images = images.cast(pa.large_binary())
    return pc.binary_length(images)


def _to_name(key: Any, row: int) -> str:
    if key is None:
        return str(row)
    return key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else str(key)


def _read_carried(batch: pa.RecordBatch, name: str, options: ReadOptions) -> list[Any]:
    column = batch.column(name)
    kind = options.carried.field(name).type if options.carried else choose_type(column.type)
    return to_values(convert_column(name, column, kind))
