"""Keys and metadata columns of a segment's rows: read by row, found by key, filtered."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.ipc
import pyarrow.parquet as pq

from pipeline.errors import CorruptionError, QueryError
from pipeline.index.files import REMEDY, FileStore
from pipeline.index.manifest import SegmentInfo
from pipeline.index.search.values import read_scalar

MAPPED_KEYS_ROWS = 200_000
"""Longer key tables are mapped from the cache directory rather than held in memory."""

SUGGEST_ROWS = 50_000
"""Rows whose file names are compared with an unknown key; they take 2 ms."""

SUGGEST_AROUND = 4
SUGGEST_NAMES = 8
MIN_LIKENESS = 0.6
COMPARED_LETTERS = 200


class Keys:
    """Keys, shards, positions and carried columns of a segment, one row each.

    Attributes:
        schema: All stored columns but the vector.
    """

    def __init__(self, info: SegmentInfo, files: FileStore) -> None:
        """Open the verified files of a segment.

        Raises:
            CorruptionError: They do not hold as many rows as the segment.
        """
        self._table = open_keys(info, files)
        self._columns = dict(zip(self._table.column_names, self._table.columns, strict=True))
        self._order = np.memmap(files.fetch(info.files["order"]), np.uint32, "r")
        self.schema: pa.Schema = self._table.schema
        if not len(self._table) == len(self._order) == info.rows:
            raise CorruptionError(
                f"segment {info.id} of {files.index} has {len(self._table)} keys for "
                f"{info.rows} rows; {REMEDY}"
            )

    def read_row(self, row: int) -> dict[str, Any]:
        """Return all columns of a row."""
        # For the few rows that a search finds, half the time of taking a table.
        return {name: read_scalar(column[row]) for name, column in self._columns.items()}

    def read_key(self, row: int) -> str:
        """Return the key of a row."""
        return str(self._columns["key"][row])

    def read_columns(self, names: Sequence[str], rows: int) -> pa.Table:
        """Return some columns of the first ``rows`` rows; one that is not here is left out."""
        return self._table.select([n for n in names if n in self._columns]).slice(0, rows)

    def find_row(self, key: str) -> int | None:
        """Return the row of ``key``, deleted or not."""
        position = self._find_position(key)
        if position == len(self._order):
            return None
        row = int(self._order[position])
        return row if self.read_key(row) == key else None

    def _find_position(self, key: str) -> int:
        low, high = 0, len(self._order)
        while low < high:
            middle = (low + high) // 2
            if self.read_key(int(self._order[middle])) < key:
                low = middle + 1
            else:
                high = middle
        return low

    def find_similar(self, key: str) -> Iterator[int]:
        """Yield some rows whose keys begin like ``key``, or end in the same file name.

        Looks at the neighbours in order, and at no more than the first ``SUGGEST_ROWS`` names.
        """
        position = self._find_position(key)
        yield from map(int, self._order[max(0, position - SUGGEST_AROUND) :][: 2 * SUGGEST_AROUND])
        some = self._columns["key"].slice(0, SUGGEST_ROWS)
        same = pc.indices_nonzero(pc.ends_with(some, f"/{find_name(key)}"))
        yield from same[:SUGGEST_NAMES].to_pylist()

    def filter_rows(self, where: ds.Expression, columns: pa.Schema) -> npt.NDArray[np.bool_]:
        """Return which rows a filter keeps.

        Args:
            where: The filter.
            columns: Their types in the generation, for columns that hold nothing but nulls here.

        Raises:
            QueryError: It names a column that is not there, or compares what cannot be compared.
        """
        try:
            table = complete_columns(self._table, columns)
            scanner = ds.dataset(table).scanner(columns={"kept": where})
            kept = scanner.to_table().column("kept")
        except (pa.ArrowException, KeyError) as error:
            reason = str(error).split(" in key: ")[0]
            columns = ", ".join(self.schema.names)
            raise QueryError(f"cannot filter by {where}: {reason}; columns: {columns}") from error
        if not pa.types.is_boolean(kept.type):
            raise QueryError(f"the filter {where} is no condition; compare a column with a value")
        return kept.fill_null(False).to_numpy().astype(bool)  # type: ignore[no-any-return]


def complete_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with the types of ``schema`` for its columns of the type ``null``."""
    for number, item in enumerate(table.schema):
        if pa.types.is_null(item.type) and item.name in schema.names:
            nulls = pa.nulls(len(table), schema.field(item.name).type)
            table = table.set_column(number, item.name, nulls)
    return table


def find_name(key: str) -> str:
    """Return the file name in a key."""
    return key.rsplit("/", 1)[-1]


def choose_similar(key: str, candidates: Iterable[str]) -> list[str]:
    """Return the candidates that resemble ``key``: its file name elsewhere first, then by letters.

    Those that share neither are left out.
    """
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(key[-COMPARED_LETTERS:])
    likeness: dict[str, tuple[bool, float]] = {}
    for candidate in candidates:
        matcher.set_seq1(candidate[-COMPARED_LETTERS:])
        likeness[candidate] = find_name(candidate) == find_name(key), matcher.ratio()
    similar = [name for name, (same, ratio) in likeness.items() if same or ratio >= MIN_LIKENESS]
    return sorted(similar, key=lambda name: likeness[name], reverse=True)


def open_keys(info: SegmentInfo, files: FileStore) -> pa.Table:
    """Return a segment's keys; mapped from the cache directory where long."""
    if info.rows < MAPPED_KEYS_ROWS:
        return _read_keys(files.fetch(info.files["keys"]))
    path = files.derive(info.files["keys"], _write_arrow)
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _read_keys(path: Path) -> pa.Table:
    table = pq.ParquetFile(path).read()
    names = table.schema.get_field_index("key")
    keys = table.column("key").cast(pa.large_string())  # one chunk may exceed 2 GiB
    named = table.set_column(names, "key", keys).replace_schema_metadata(None)
    return named.combine_chunks()


def _write_arrow(source: Path, target: Path) -> None:
    table = _read_keys(source)
    with pa.ipc.new_file(target, table.schema) as writer:
        writer.write_table(table)
