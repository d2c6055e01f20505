"""Values of columns: read exactly in filters, printed without loss in answers.

A filter compares with what a number or a time is, never with what a cast leaves of it: 300 and 2.5
are proper values to compare an int8 with, although no row can equal them. So a value is read as the
largest one of the column's type that does not exceed it, and whether that is the value itself.

What ``to_json`` prints, ``read_literal`` reads back.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_NUMBER = re.compile(
    r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,6})?|[+-]?inf(?:inity)?|nan", re.ASCII | re.IGNORECASE
)

_FRACTION = re.compile(r"(.*\d\d:\d\d:\d\d)[.,](\d+)(.*)", re.ASCII)

_DURATION = re.compile(
    r"(-?)P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?)?", re.ASCII
)

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}

_UNITS_PER_S = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

_DAY_S = 86_400

_EPOCH = datetime(1970, 1, 1)  # of times without a zone


Moment = TypeVar("Moment", datetime, time)


@dataclass(frozen=True, slots=True)
class Literal:
    """A value as a column of some type sees it.

    Attributes:
        floor: The largest value of the type that does not exceed it; None where all exceed it.
        exact: True if ``floor`` is the value itself.
    """

    floor: pa.Scalar | None
    exact: bool


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a type holds text."""
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_comparable(kind: pa.DataType) -> bool:
    """Tell whether filters can compare values of a type; not so for bytes, lists and intervals."""
    types = pa.types
    plain = (is_text, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal)
    times = (types.is_date, types.is_time, types.is_timestamp, types.is_duration)
    return any(test(kind) for test in (*plain, *times))


def find_compared_type(kind: pa.DataType) -> pa.DataType:
    """Return the type in which Arrow compares a column: its own, or one that holds all of it."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    return kind


def read_literal(value: object, kind: pa.DataType) -> Literal:
    """Read a value that a column is compared with.

    Text reads as any type, so that the text form of a filter needs to know no types. Nothing else
    is converted: a number is no time, since nobody could tell its unit.

    Args:
        value: Text, a number, a boolean, or a date, time or duration of Python's.
        kind: Type of the column, one that ``is_comparable``.

    Returns:
        The value in the type that ``find_compared_type`` gives.

    Raises:
        ValueError: It is no value to compare this type with.
    """
    value = _simplify(value)
    if is_text(kind):
        return Literal(pa.scalar(_expect_text(value), find_compared_type(kind)), True)
    if pa.types.is_boolean(kind):
        return Literal(pa.scalar(_read_boolean(value)), True)
    if pa.types.is_floating(kind):
        return _fit_float(_read_number(value), kind)
    if pa.types.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        number = _read_number(value)
        return _fit_units(number, int(limits.min), int(limits.max), make=_maker(kind))
    if pa.types.is_decimal(kind):
        return _fit_decimal(_read_number(value), find_compared_type(kind))
    if not isinstance(value, str):
        raise ValueError("write it as text: 2024-05-31T12:30:15, 12:30:15 or PT1H30M")
    return _fit_time(value.strip(), kind)


def _simplify(value: object) -> object:
    """Return numpy's and Python's richer values as those that JSON has; decimals as they are."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (date, time, timedelta)):
        return to_json(value)
    return value


def _expect_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    value.encode()  # half a surrogate pair is no text either; that error is a ValueError
    return value


def _read_boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    found = _BOOLEANS.get(_expect_text(value).strip().lower())
    if found is None:
        raise ValueError("it is neither true nor false")
    return found


def _read_number(value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, str)):
        raise ValueError(f"{value!r} is no number")
    if isinstance(value, int):
        return Decimal(value)
    # Of a float what was written, not the longer decimal that it is.
    text = repr(value) if isinstance(value, float) else str(value).strip()
    if not _NUMBER.fullmatch(text):
        raise ValueError("it is no number")
    return Decimal(text)


def _fit_units(
    units: Decimal | Fraction, low: int, high: int, *, make: Callable[[int], pa.Scalar]
) -> Literal:
    """Return the literal of a type whose values are whole numbers of some unit."""
    if units != units or units > high:  # not a number comes after all numbers
        return Literal(make(high), False)
    if units < low:
        return Literal(None, False)
    floor = math.floor(units)
    return Literal(make(floor), floor == units)


def _maker(kind: pa.DataType, step: int = 1) -> Callable[[int], pa.Scalar]:
    return lambda units: pa.scalar(units * step, kind)


def _fit_float(number: Decimal, kind: pa.DataType) -> Literal:
    """Return the nearest value of the type, as every program reads it; finite stays finite."""
    width, compared = np.dtype(kind.to_pandas_dtype()), find_compared_type(kind)
    with np.errstate(over="ignore"):
        nearest = width.type(float(number))
    if np.isinf(nearest) and number.is_finite():
        beyond = -math.inf if number < 0 else float(np.finfo(width).max)
        return Literal(pa.scalar(beyond, compared), False)
    return Literal(pa.scalar(float(nearest), compared), True)


def _fit_decimal(number: Decimal, kind: pa.DataType) -> Literal:
    limit = 10**kind.precision - 1

    def make(units: int) -> pa.Scalar:
        return pa.scalar(_shift(Decimal(units), -kind.scale), kind)

    return _fit_units(_shift(number, kind.scale), -limit, limit, make=make)


def _shift(number: Decimal, places: int) -> Decimal:
    """Return ``number`` times ten to the power of ``places``, with all its digits."""
    sign, digits, exponent = number.as_tuple()
    return Decimal((sign, digits, exponent + places)) if isinstance(exponent, int) else number


def _fit_time(text: str, kind: pa.DataType) -> Literal:
    types = pa.types
    low, high = -(2**63), 2**63 - 1
    if types.is_date(kind):
        days = _read_instant(text) / _DAY_S
        step = 1 if types.is_date32(kind) else _DAY_S * 1000
        low, high = (-(2**31), 2**31 - 1) if step == 1 else (low // step + 1, high // step)
        return _fit_units(days, low, high, make=_maker(kind, step))
    per_s = _UNITS_PER_S[kind.unit]
    if types.is_time(kind):
        seconds, low, high = _read_time(text), 0, _DAY_S * per_s - 1
    elif types.is_duration(kind):
        seconds = _read_duration(text)
    else:
        seconds = _read_instant(text, zone=kind.tz)
    return _fit_units(seconds * per_s, low, high, make=_maker(kind))


def _read_instant(text: str, *, zone: str | None = None) -> Fraction:
    """Return seconds since 1970; a time without a zone is the wall clock of ``zone``."""
    text, fraction = _split_fraction(text)
    moment = _parse(datetime.fromisoformat, text, example="2024-05-31 or 2024-05-31T12:30:15")
    if moment.tzinfo is not None:
        if zone is None:
            raise ValueError("the column has no time zone; write the time without one")
        return _count_seconds(moment - _EPOCH.replace(tzinfo=UTC)) + fraction
    seconds = _count_seconds(moment - _EPOCH)
    if zone is not None:
        wall = pa.scalar(int(seconds), pa.timestamp("s"))
        # Of an hour that comes twice, the first; what falls into a gap, its end.
        choice = {"ambiguous": "earliest", "nonexistent": "latest"}
        seconds = Fraction(pc.assume_timezone(wall, timezone=zone, **choice).value)
    return seconds + fraction


def _read_time(text: str) -> Fraction:
    text, fraction = _split_fraction(text)
    moment = _parse(time.fromisoformat, text, example="12:30:15")
    if moment.tzinfo is not None:
        raise ValueError("times of day have no time zone; write the time without one")
    return Fraction(moment.hour * 3600 + moment.minute * 60 + moment.second) + fraction


def _read_duration(text: str) -> Fraction:
    match = _DURATION.fullmatch(text)
    if match is None or not any(match.groups()[1:]):
        raise ValueError("write it as P1DT2H3M4.5S: days, hours, minutes and seconds")
    parts = [Fraction(part or 0) for part in match.groups()[1:]]
    seconds = sum(n * size for n, size in zip(parts, (_DAY_S, 3600, 60, 1), strict=True))
    return Fraction(-seconds if match[1] else seconds)


def _split_fraction(text: str) -> tuple[str, Fraction]:
    """Take the fraction of a second out of a time; Python would cut it after six digits."""
    match = _FRACTION.fullmatch(text)
    return (match[1] + match[3], Fraction(f"0.{match[2]}")) if match else (text, Fraction(0))


def _parse(read: Callable[[str], Moment], text: str, *, example: str) -> Moment:
    try:
        if "." in text or "," in text:
            raise ValueError("a fraction of something other than seconds")
        return read(text)
    except ValueError as error:
        raise ValueError(f"write it as {example}") from error


def _count_seconds(delta: timedelta) -> Fraction:
    return Fraction(delta // timedelta(microseconds=1), 10**6)


def read_scalar(scalar: pa.Scalar) -> Any:
    """Return a stored value as Python's, or as text where Python has no such value.

    Times of day in nanoseconds, and dates after the year 9999, are such values.
    """
    try:
        value = scalar.as_py()
    except (OverflowError, ValueError):
        return scalar.cast(pa.string()).as_py()
    if isinstance(value, time) and scalar.type.unit == "ns" and scalar.value % 1000:
        return scalar.cast(pa.string()).as_py()
    return value


def to_json(value: Any) -> Any:
    """Return a value of a column as JSON has it.

    Numbers keep all their digits, integers of 64 bits too; decimals become text, bytes hex digits,
    and dates, times and durations ISO 8601. NaN and the infinities become null, since JSON has no
    number for them.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int, type(None))):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, timedelta):
        return _print_duration(value)
    if isinstance(value, (date, time)):
        text = value.isoformat()
        return text.removesuffix("+00:00") + "Z" if text.endswith("+00:00") else text
    return str(value)


def _print_duration(value: timedelta) -> str:
    nanoseconds = getattr(value, "nanoseconds", 0)  # of pandas
    units = (value // timedelta(microseconds=1)) * 1000 + nanoseconds
    days, rest = divmod(abs(units), _DAY_S * 10**9)
    seconds = f"{rest // 10**9}.{rest % 10**9:09d}".rstrip("0").rstrip(".")
    written = (f"{days}D" if days else "") + (f"T{seconds}S" if rest or not days else "")
    return f"{'-' if units < 0 else ''}P{written}"
