import datetime
import json
import math
from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.index.search.values import find_compared_type, read_literal, read_scalar, to_json

KINDS = [
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32()),
    *(pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_()),
    *(pa.decimal32(5, 2), pa.decimal64(15, 0), pa.decimal128(38, 10), pa.decimal256(70, 3)),
    *(pa.string(), pa.large_string(), pa.string_view(), pa.date32(), pa.date64()),
    *(pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")),
    *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
    *(
        pa.timestamp(unit, zone)
        for unit in ("s", "ms", "us", "ns")
        for zone in (None, "UTC", "Europe/Berlin", "+05:30")
    ),
]
YEARS = (-62135596800, 253402300800)
"""From the year 1 to before the year 10000, seconds since 1970."""


def draw_stored(kind: pa.DataType) -> st.SearchStrategy[object]:
    """Return what ``pa.scalar`` makes any value of a type of."""
    per_s = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}.get(getattr(kind, "unit", ""), 0)
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_floating(kind):
        return st.floats(width=kind.bit_width)
    if pa.types.is_decimal(kind):
        limit = 10**kind.precision - 1
        digits = st.integers(-limit, limit).map(lambda n: Decimal(n).as_tuple())
        return digits.map(lambda t: Decimal((t.sign, t.digits, -kind.scale)))
    if pa.types.is_integer(kind):
        bits = kind.bit_width - (not pa.types.is_unsigned_integer(kind))
        low = 0 if pa.types.is_unsigned_integer(kind) else -(2**bits)
        return st.integers(low, 2**bits - 1)
    if pa.types.is_date(kind):
        return st.dates()
    if pa.types.is_time(kind):
        return st.integers(0, 86400 * per_s - 1)
    if pa.types.is_duration(kind):
        return st.integers(-(2**62) // 10**9 * per_s, 2**62 // 10**9 * per_s)
    if pa.types.is_timestamp(kind):
        low, high = (max(-(2**63), min(2**63, year * per_s)) for year in YEARS)
        return st.integers(low + 86400 * per_s, high - 86400 * per_s)
    return st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_json_shows_of_a_value_finds_it_again(kind):
    """Whatever is stored: printed, sent, read back and used in a filter, it is the same value."""

    @settings(derandomize=True, database=None, deadline=None, max_examples=60)
    @given(draw_stored(kind))
    def check(stored):
        scalar = pa.scalar(stored, kind)
        shown = json.loads(json.dumps(to_json(read_scalar(scalar)), allow_nan=False))
        if isinstance(stored, float) and not math.isfinite(stored):
            assert shown is None
            return
        literal = read_literal(shown, kind)
        assert literal.exact
        assert literal.floor.equals(scalar.cast(find_compared_type(kind)))

    check()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2**64 - 1, 2**64 - 1),
        (math.nan, None),
        (-math.inf, None),
        ([1.0, math.nan], [1.0, None]),
        ({"a": math.inf, "b": b"\xff"}, {"a": None, "b": "ff"}),
        (Decimal("1.50"), "1.50"),
        (datetime.date(2024, 5, 31), "2024-05-31"),
        (datetime.datetime(2024, 5, 31, tzinfo=datetime.UTC), "2024-05-31T00:00:00Z"),
        (datetime.datetime(2024, 5, 31, 1, 2, 3, 4), "2024-05-31T01:02:03.000004"),
        (datetime.time(12, 30), "12:30:00"),
        (datetime.timedelta(days=1, seconds=3), "P1DT3S"),
        (datetime.timedelta(0), "PT0S"),
        (datetime.timedelta(days=-2), "-P2D"),
        (datetime.timedelta(microseconds=-1), "-PT0.000001S"),
        (b"\x00\xff", "00ff"),
        (None, None),
        (True, True),
    ],
)
def test_a_value_is_shown_in_json_as_it_is(value, shown):
    assert to_json(value) == shown
    assert type(to_json(value)) is type(shown)
    json.dumps(to_json(value), allow_nan=False)


@pytest.mark.parametrize(
    ("stored", "kind", "text"),
    [
        (1, pa.time64("ns"), "00:00:00.000000001"),
        (253402300800, pa.timestamp("s"), "10000-01-01 00:00:00"),
        (-719163, pa.date32(), "0000-12-31"),
    ],
)
def test_a_value_that_python_has_not_is_read_as_text(stored, kind, text):
    assert read_scalar(pa.scalar(stored, kind)) == text
