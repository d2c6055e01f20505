"""Facets: what a column holds, counted over the live rows, for filters that nobody has to type."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.index.search.generation import Generation
from pipeline.index.search.keys import complete_columns
from pipeline.index.search.values import to_json
from pipeline.index.search.where import is_filterable

COUNTED_ROWS = 2_000_000
"""Rows that are looked at; of a larger collection a part of each segment."""

FACET_VALUES = 40
BINS = 24
MAX_VALUE_CHARS = 100
DISTINCT_SHARE = 0.5
"""A text column with more distinct values than this share of its rows names rows, not groups."""


@dataclass(frozen=True, slots=True)
class Facet:
    """What one column holds.

    Attributes:
        name: Name of the column.
        present: Counted rows that have a value.
        values: The most frequent values and their counts, as filters take them; empty where
            nearly every row has a value of its own.
        distinct: How many different values there are.
        low: Smallest value of a column of numbers or times, as filters take it.
        high: Largest value.
        bins: Rows in equal steps from ``low`` to ``high``; empty for other columns.
    """

    name: str
    present: int
    values: tuple[tuple[Any, int], ...]
    distinct: int
    low: Any = None
    high: Any = None
    bins: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Facets:
    """The facets of a generation.

    Attributes:
        counted: Live rows that were looked at.
        columns: One facet for each column.
    """

    counted: int
    columns: tuple[Facet, ...]


def count_facets(opened: Generation, names: Sequence[str]) -> Facets:
    """Count what columns hold in the live rows.

    Args:
        opened: The generation.
        names: Columns to count; those that filters cannot compare are left out.
    """
    schema = opened.columns
    chosen = [name for name in names if is_filterable(schema.field(name).type)]
    table = read_live_rows(opened, chosen)
    facets = [count_facet(name, table.column(name)) for name in chosen]
    return Facets(len(table), tuple(facets))


def read_live_rows(opened: Generation, names: Sequence[str]) -> pa.Table:
    """Return columns of the live rows, at most ``COUNTED_ROWS``."""
    total = sum(segment.info.rows for segment in opened.segments)
    share = min(1.0, COUNTED_ROWS / max(1, total))
    wanted = pa.schema([opened.columns.field(name) for name in names])
    tables = []
    for segment, live in zip(opened.segments, opened.live, strict=True):
        rows = int(np.ceil(share * segment.info.rows))
        table = complete_columns(segment.keys.read_columns(names, rows), wanted)
        kept = None if live is None else pa.array(live.flags[:rows])
        tables.append(table if kept is None else table.filter(kept))
    return pa.concat_tables(tables, promote_options="permissive")


def count_facet(name: str, column: pa.ChunkedArray) -> Facet:
    """Count what one column holds."""
    kind, column = column.type, column.drop_null()
    counted = column.value_counts()
    distinct = len(counted)
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    is_range = numeric or pa.types.is_temporal(kind)
    values: tuple[tuple[Any, int], ...] = ()
    if distinct <= max(FACET_VALUES, 0 if is_range else DISTINCT_SHARE * len(column)):
        values = pick_values(counted)
    if not is_range or not len(column):
        return Facet(name, len(column), values, distinct)
    finite = column.filter(pc.is_finite(column)) if pa.types.is_floating(kind) else column
    if not len(finite):
        return Facet(name, len(column), values, distinct)
    ends = pc.min_max(finite)
    low, high = (to_json(ends[end].as_py()) for end in ("min", "max"))
    bins = count_bins(finite) if numeric else ()
    return Facet(name, len(column), values, distinct, low, high, bins)


def pick_values(counted: pa.StructArray) -> tuple[tuple[Any, int], ...]:
    """Return the most frequent values with their counts; long texts are left out."""
    counts = counted.field("counts").to_numpy()
    order = np.argsort(-counts, kind="stable")[:FACET_VALUES]
    pairs = [(to_json(counted.field("values")[i].as_py()), int(counts[i])) for i in order.tolist()]
    return tuple(
        (value, count)
        for value, count in pairs
        if value is not None and len(str(value)) <= MAX_VALUE_CHARS
    )


def count_bins(column: pa.ChunkedArray) -> tuple[int, ...]:
    """Return how many numbers lie in each of equal steps from the smallest to the largest."""
    numbers = column.cast(pa.float64(), safe=False).to_numpy()
    low, high = float(numbers.min()), float(numbers.max())
    if not (low < high and np.isfinite(high - low)):
        return (len(numbers),)
    return tuple(np.histogram(numbers, bins=BINS, range=(low, high))[0].tolist())
