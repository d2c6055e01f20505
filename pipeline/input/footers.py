"""The types of carried columns, united over the footers of all Parquet shards of an input."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa

from pipeline.carried import choose_type, unite_types
from pipeline.errors import NoImagesError, SettingsError, StorageError
from pipeline.input.container import BrokenContainerError, ReadOptions, suggest_name
from pipeline.input.parquet import read_schema
from pipeline.records import Shard
from pipeline.storage import Storage

_FOOTER_THREADS = 32


_MAX_SHOWN_NAMES = 20


def find_carried_schema(
    shards: Iterable[Shard], *, storage: Storage, options: ReadOptions, check_names: bool = False
) -> pa.Schema:
    """Return the types of carried columns in an output of these shards.

    Reads the footers of Parquet shards, many at once, and nothing else. Files without images, and
    those that cannot be read, have no say. Sidecars of archives are text. A column that is in no
    shard, or holds nulls only, has the type ``null``: it is not known yet. Of types that no type
    can hold together the first one stays; the files of the other are refused when they are read.

    Args:
        shards: What is to be embedded.
        storage: How to reach it.
        options: Which columns are carried, and which holds the images.
        check_names: Refuse names that are certain to be in no shard: there are Parquet files, none
            of them has the column, and no archive might have it.

    Raises:
        SettingsError: ``check_names`` found such a name; the message shows the nearest.
    """
    shards = list(shards)
    schemas = _read_schemas(shards, storage, options) if options.carry else []
    archives = any(shard.kind == "tar" for shard in shards)
    if check_names and schemas and not archives:
        _check_names(options.carry, schemas)
    text = pa.string() if archives else pa.null()
    return pa.schema([(name, _unite_column(name, schemas, text)) for name in options.carry])


def _read_schemas(
    shards: Sequence[Shard], storage: Storage, options: ReadOptions
) -> list[pa.Schema]:
    files = [shard for shard in shards if shard.kind == "parquet"]
    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footer") as pool:
        read = partial(_read_schema, storage=storage, options=options)
        return [schema for schema in pool.map(read, files) if schema is not None]


def _read_schema(shard: Shard, *, storage: Storage, options: ReadOptions) -> pa.Schema | None:
    """Return the columns of a file that holds images, or None; reading it will say why not."""
    try:
        with storage.open_random(shard.source, version=shard.version or None) as file:
            return read_schema(file, uri=shard.source, options=options)
    except (BrokenContainerError, NoImagesError, SettingsError, StorageError):
        return None


def _check_names(carry: Sequence[str], schemas: Sequence[pa.Schema]) -> None:
    names = list(dict.fromkeys(name for schema in schemas for name in schema.names))
    for name in carry:
        if name not in names:
            raise SettingsError(
                f"carry names {name!r}, which no Parquet file of the input has"
                f"{suggest_name(name, names)}; their columns are {names[:_MAX_SHOWN_NAMES]}"
            )


def _unite_column(name: str, schemas: Sequence[pa.Schema], text: pa.DataType) -> pa.DataType:
    united = pa.null()
    for schema in schemas:
        if name in schema.names:
            united = unite_types(united, choose_type(schema.field(name).type)) or united
    return text if pa.types.is_null(united) else united
