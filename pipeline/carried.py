"""Carried columns: what a source's type becomes in an output, and how values get there unchanged.

A value is kept or refused, never rounded, cut or wrapped. It is kept where its type and the
column's say the same kind of thing (numbers, text, bytes, dates and times without a zone, instants,
…), and where converting it and converting it back gives the value again. The second check is what
counts: Arrow's own safe casts turn 0.1 into the nearest float32, and 13:45 into its day.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

_Test = Callable[[pa.DataType], bool]


def _is_naive_timestamp(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) and kind.tz is None)


def _is_instant(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) and kind.tz is not None)


_KINDS: tuple[tuple[_Test, ...], ...] = (
    (pa.types.is_boolean,),
    (pa.types.is_integer, pa.types.is_floating),
    (pa.types.is_integer, pa.types.is_decimal),
    (pa.types.is_string, pa.types.is_large_string),
    (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary),
    (pa.types.is_date, _is_naive_timestamp),
    (_is_instant,),
    (pa.types.is_time,),
    (pa.types.is_duration,),
)
"""Types that can hold the same values, each group by the tests that its types pass."""


class UnfitValueError(Exception):
    """A carried value that the output's column cannot hold unchanged.

    Attributes:
        column: Name of the column.
        reason: The value or type at fault, and the column's type.
    """

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(f"column {column!r}: {reason}")
        self.column = column
        self.reason = reason


def choose_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that a source's column has in an output.

    Scalars keep their types, without the packing (dictionaries, views, extensions); lists, structs
    and maps become JSON text.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return choose_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return choose_type(kind.value_type)
    if pa.types.is_string_view(kind) or pa.types.is_nested(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def unite_types(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the type that holds the values of both, or None where there is none.

    Both are as ``choose_type`` gives them. A column of nulls only has the type ``null``, which
    unites with every other.
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if not _is_akin(one, other):
        return None
    if pa.types.is_floating(one) or pa.types.is_floating(other):
        return pa.float64()
    if pa.types.is_date(one) != pa.types.is_date(other):
        return other if pa.types.is_date(one) else one
    if _is_instant(one) and one.tz != other.tz:
        return unite_types(pa.timestamp(one.unit, "UTC"), pa.timestamp(other.unit, "UTC"))
    schemas = [pa.schema([("value", kind)]) for kind in (one, other)]
    try:
        united: pa.DataType = pa.unify_schemas(schemas, promote_options="permissive")[0].type
    except pa.ArrowException:  # more digits than any decimal has
        return None
    return united


def _is_akin(one: pa.DataType, other: pa.DataType) -> bool:
    return any(
        any(test(one) for test in tests) and any(test(other) for test in tests) for tests in _KINDS
    )


def convert_column(name: str, array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return a source's column in the type of the output's, every value unchanged.

    Raises:
        UnfitValueError: ``kind`` cannot hold a value of the column; the message shows it.
    """
    simple = _simplify(name, array)
    if simple.null_count == len(simple):
        return pa.nulls(len(simple), kind)
    if simple.type == kind:
        return simple
    if not _is_akin(simple.type, kind):
        raise UnfitValueError(name, f"it is of type {array.type}, the output's is {kind}")
    try:
        there = _cast(simple, kind)
        back = _cast(there, simple.type)
    except pa.ArrowException as error:
        raise UnfitValueError(name, f"{error}; the output's type is {kind}") from error
    changed = pc.and_(simple.is_valid(), pc.invert(_is_same(simple, back).fill_null(False)))
    if pc.any(changed).as_py():
        value = simple.filter(changed)[0]
        raise UnfitValueError(
            name, f"it holds {_show(value)}, which the output's type {kind} cannot"
        )
    return there


def _show(value: pa.Scalar) -> str:
    """Return a value for people; as a number where Python's dates do not reach that far."""
    try:
        return str(value)
    except (OverflowError, ValueError):
        return f"{value.value} of {value.type}"


def _simplify(name: str, array: pa.Array) -> pa.Array:
    if isinstance(array, pa.ExtensionArray):
        return _simplify(name, array.storage)
    if pa.types.is_dictionary(array.type):
        return _simplify(name, array.dictionary_decode())
    if pa.types.is_nested(array.type):
        return _write_json(name, array)
    return array.cast(choose_type(array.type))


def _write_json(name: str, array: pa.Array) -> pa.Array:
    if _holds_nanosecond_clocks(array.type):  # which Python's cut off
        raise UnfitValueError(name, f"it is of type {array.type}; times of day need microseconds")
    try:
        values = array.to_pylist()
    except (ValueError, OverflowError) as error:
        raise UnfitValueError(name, f"it cannot be written as JSON: {error}") from error
    texts = [None if value is None else _to_json(value) for value in values]
    return pa.array(texts, pa.string())


def _holds_nanosecond_clocks(kind: pa.DataType) -> bool:
    inner = (kind.field(i).type for i in range(kind.num_fields))
    return kind == pa.time64("ns") or any(map(_holds_nanosecond_clocks, inner))


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:  # JSON has no such numbers; text is how most write them
        return json.dumps(_name_numbers(value), ensure_ascii=False, default=str)


def _name_numbers(value: Any) -> Any:
    """Return a nested value with ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` in words."""
    if isinstance(value, dict):
        return {key: _name_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_name_numbers(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_integer(array.type) and pa.types.is_decimal(kind):
        # Arrow asks for room for any integer; the values may need less.
        return array.cast(pa.decimal256(76, kind.scale)).cast(kind)
    return array.cast(kind)


def _is_same(one: pa.Array, other: pa.Array) -> pa.Array:
    if not pa.types.is_floating(one.type):
        return pc.equal(one, other)
    wide, other_wide = one.cast(pa.float64()), other.cast(pa.float64())
    nan = pc.and_(pc.is_nan(wide), pc.is_nan(other_wide))
    return pc.or_(pc.equal(wide, other_wide), nan)


def to_values(array: pa.Array) -> list[Any]:
    """Return a column as plain Python values from which ``to_array`` makes it again, exactly.

    Times are the integers that Arrow stores: Python's own have no nanoseconds, and end in 9999.
    """
    kind = array.type
    if pa.types.is_temporal(kind):
        array = array.view(pa.int32() if kind.bit_width == 32 else pa.int64())
    return cast(list[Any], array.to_pylist())


def to_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return the column that ``to_values`` took apart."""
    return pa.array(values, kind)
