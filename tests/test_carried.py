"""Carried values against what they mean in exact arithmetic, over pairs of Arrow types."""

import json
import math
from datetime import date, datetime, time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.carried import (
    UnfitValueError,
    choose_type,
    convert_column,
    to_array,
    to_values,
    unite_types,
)

WHOLE = [getattr(pa, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
DECIMALS = [pa.decimal128(5, 2), pa.decimal128(38, 0), pa.decimal256(60, 9)]
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
BYTES = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3), pa.uuid()]
DATES = [pa.date32(), pa.date64()]
CLOCKS = [pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")]
STAMPS = [
    pa.timestamp(unit, zone)
    for unit in ("s", "ms", "us", "ns")
    for zone in (None, "UTC", "Asia/Kathmandu")
]
SPANS = [pa.duration(unit) for unit in ("s", "ms", "us", "ns")]
TIMES = [*DATES, *CLOCKS, *STAMPS, *SPANS]
KINDS = [pa.null(), pa.bool_(), *WHOLE, *FLOATS, *DECIMALS, *TEXTS, *BYTES, *TIMES]

DAY_NS = 86400 * 10**9
TICK_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def draw_value(kind: pa.DataType) -> st.SearchStrategy[Any]:
    """Draw what ``pa.array`` takes for a value of ``kind``; times as the integers stored."""
    if pa.types.is_null(kind):
        return st.none()
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_integer(kind):
        low, high = np.iinfo(str(kind)).min, np.iinfo(str(kind)).max
        return st.integers(int(low), int(high)) | st.integers(0, 127)
    if pa.types.is_floating(kind):
        some = st.integers(-(2**11), 2**11).map(float) | st.sampled_from([0.5, 2.25])
        return st.floats(width=kind.bit_width) | some
    if pa.types.is_decimal(kind):
        top = 10**kind.precision - 1
        number = st.integers(-top, top) | st.integers(0, 9).map(lambda n: n * 10**kind.scale)
        return number.map(lambda n: Decimal(f"{n}E-{kind.scale}"))
    if kind in TEXTS:
        return st.text(st.characters(codec="utf-8"), max_size=3)
    if kind in BYTES:
        size = {pa.binary(3): 3, pa.uuid(): 16}.get(kind)
        return st.binary(min_size=size or 0, max_size=size or 4)
    return draw_time(kind)


def draw_time(kind: pa.DataType) -> st.SearchStrategy[int]:
    if kind in CLOCKS:
        return st.integers(0, DAY_NS // TICK_NS[kind.unit] - 1)
    if kind in DATES:
        days = st.integers(-(2**31), 2**31 - 1) | st.integers(19_000, 21_000)
        return days if kind == pa.date32() else days.map(lambda n: n * 86_400_000)
    ticks = st.integers(-(2**63), 2**63 - 1)
    return ticks | st.integers(0, 40_000).map(lambda n: n * 43_200 * 10**9 // TICK_NS[kind.unit])


def make_array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind == pa.uuid():
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    if pa.types.is_dictionary(kind):
        return pa.array(values, pa.string()).cast(kind)
    if pa.types.is_float16(kind):
        return pa.array([None if v is None else np.float16(v) for v in values], kind)
    return pa.array(values, kind)


def tell_meaning(array: pa.Array) -> list[object]:
    """Return what each value says, as text, bytes, or exact numbers; times in nanoseconds."""
    kind = array.type
    if kind == pa.uuid():
        return tell_meaning(array.storage)
    if not pa.types.is_temporal(kind):
        return [tell_scalar(value) for value in array.to_pylist()]
    if kind in DATES:
        scale = DAY_NS if kind == pa.date32() else 10**6
        sort = "local"
    else:
        scale = TICK_NS[kind.unit]
        zoned = pa.types.is_timestamp(kind) and kind.tz is not None
        sort = "instant" if zoned else "local" if pa.types.is_timestamp(kind) else str(kind)[:4]
    width = pa.int32() if kind.bit_width == 32 else pa.int64()
    return [None if n is None else (sort, n * scale) for n in array.view(width).to_pylist()]


def tell_scalar(value: Any) -> object:
    if value is None or isinstance(value, (str, bytes)):
        return value
    if isinstance(value, bool):
        return "true" if value else "false", bool
    if isinstance(value, float) and not math.isfinite(value):
        return str(value), float
    return Fraction(value)


@st.composite
def draw_column(draw: st.DrawFn) -> pa.Array:
    kind = draw(st.sampled_from(KINDS))
    return make_array(draw(st.lists(st.none() | draw_value(kind), min_size=1, max_size=4)), kind)


@settings(max_examples=500, deadline=None)
@given(column=draw_column(), target=st.sampled_from(KINDS).map(choose_type))
def test_a_value_is_kept_exactly_or_refused_whatever_the_two_types(
    column: pa.Array, target: pa.DataType
):
    try:
        converted = convert_column("c", column, target)
    except UnfitValueError:
        assert column.null_count < len(column)
    else:
        assert converted.type == target
        assert tell_meaning(converted) == tell_meaning(column)


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_a_moment_beyond_the_calendar_is_refused_with_its_number(unit: str):
    far = pa.array([2**62], pa.timestamp(unit))
    with pytest.raises(UnfitValueError, match=f"{2**62} of timestamp"):
        convert_column("c", far, pa.date32())


@settings(max_examples=150, deadline=None)
@given(column=draw_column())
def test_a_column_travels_as_plain_values_and_is_the_same_afterwards(column: pa.Array):
    kind = choose_type(column.type)
    converted = convert_column("c", column, kind)
    arrived = to_array(to_values(converted), kind)
    assert tell_meaning(arrived) == tell_meaning(column)
    assert arrived.type == kind


@settings(max_examples=300, deadline=None)
@given(one=draw_column(), other=draw_column())
def test_united_types_do_not_depend_on_the_order_and_take_both_or_say_what_they_cannot(
    one: pa.Array, other: pa.Array
):
    kinds = [choose_type(column.type) for column in (one, other)]
    united = unite_types(*kinds)
    assert united == unite_types(*reversed(kinds))
    if united is None:
        return
    assert unite_types(united, kinds[0]) == united
    for column in (one, other):
        try:
            converted = convert_column("c", column, united)
        except UnfitValueError:  # integers beyond 2^53 in floats, seconds beyond 1677 to 2262 in ns
            assert len(set(kinds)) == 2
        else:
            assert tell_meaning(converted) == tell_meaning(column)


@pytest.mark.parametrize(
    ("value", "kind", "target", "words"),
    [
        (0.97, pa.float64(), pa.int64(), "0.97"),
        (300, pa.int64(), pa.int8(), "300"),
        (-1, pa.int64(), pa.uint16(), "-1"),
        (0.1, pa.float64(), pa.float32(), "0.1"),
        (2049, pa.int16(), pa.float16(), "2049"),
        (2**53 + 1, pa.int64(), pa.float64(), "9007199254740993"),
        (datetime(2026, 1, 2, 13, 45), pa.timestamp("us"), pa.date32(), "2026-01-02 13:45"),
        (datetime(2026, 1, 2, 3, 4, 5, 6), pa.timestamp("us"), pa.timestamp("ms"), "lose data"),
        (datetime(2026, 1, 2), pa.timestamp("us"), pa.timestamp("us", "UTC"), "type timestamp"),
        (time(1, 2, 3, 4), pa.time64("us"), pa.time32("s"), "lose data"),
        (Decimal("0.125"), pa.decimal128(9, 3), pa.decimal128(9, 2), "data loss"),
        (date(2026, 1, 2), pa.date32(), pa.int32(), "type date32"),
        ("7", pa.string(), pa.int64(), "type string"),
        (True, pa.bool_(), pa.int64(), "type bool"),
        (b"x", pa.binary(), pa.string(), "type binary"),
    ],
)
def test_what_arrow_would_turn_into_something_else_is_refused_with_the_value(
    value: object, kind: pa.DataType, target: pa.DataType, words: str
):
    with pytest.raises(UnfitValueError, match=r"column 'c': .*" + words):
        convert_column("c", make_array([value], kind), target)


@pytest.mark.parametrize(
    ("kinds", "united"),
    [
        ([pa.null(), pa.large_string()], pa.large_string()),
        ([pa.int64(), pa.float64()], pa.float64()),
        ([pa.int32(), pa.null(), pa.uint8()], pa.int32()),
        ([pa.date32(), pa.timestamp("us")], pa.timestamp("us")),
        ([pa.timestamp("s", "UTC"), pa.timestamp("ms", "Asia/Tokyo")], pa.timestamp("ms", "UTC")),
        ([pa.int64(), pa.string()], None),
        ([pa.timestamp("us"), pa.timestamp("us", "UTC")], None),
    ],
)
def test_types_unite_into_one_that_holds_both(kinds: list[pa.DataType], united: pa.DataType | None):
    found = kinds[0]
    for kind in kinds[1:]:
        found = unite_types(found, kind)
    assert found == united


def test_nested_values_become_json_that_every_reader_takes():
    values = [{"a": [1.5, math.nan], "b": {"é": -math.inf}}, None, {"a": [], "b": None}]
    texts = convert_column("c", pa.array(values), pa.string()).to_pylist()
    assert texts[1] is None
    assert texts[0] == '{"a": [1.5, "NaN"], "b": {"é": "-Infinity"}}'
    assert json.loads(texts[2]) == values[2]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (pa.list_(pa.struct([("at", pa.time64("ns"))])), "times of day need microseconds"),
        (pa.list_(pa.timestamp("s")), "it cannot be written as JSON: .* too large"),
    ],
)
def test_nested_times_that_python_cannot_write_are_refused(kind: pa.DataType, words: str):
    inner = [{"at": 1}] if kind.value_type.num_fields else [2**60]
    with pytest.raises(UnfitValueError, match=rf"column 'c': .*{words}"):
        convert_column("c", pa.array([inner], kind), pa.string())
