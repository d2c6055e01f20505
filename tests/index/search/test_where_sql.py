"""Filters against DuckDB: the same conditions, asked in SQL over the same rows."""

import datetime
import json
import math
import random
from decimal import Decimal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from pipeline.errors import QueryError
from pipeline.index.search.where import compile_where

ROWS = 120
TOGETHER = 100
"""Filters in one question to DuckDB; planning takes most of its time."""

DAY = datetime.date(2024, 2, 28)
NOON = datetime.datetime(2024, 3, 31, 12, 0, 0)
TEXTS = ["hat", "Hat", "", "it's", 'a "quote"', "null", "true", "Ärmel", "日本", "50%_\\", "a, (b)"]
FLOATS = [0.0, -0.0, 0.5, 0.1, -2.5, 65504.0, 1e9, math.inf, -math.inf, math.nan]
DECIMALS = ["0.00", "1.50", "-1.50", "1.01", "99999999.99"]
CLOCKS = ["00:00:00", "12:30:00", "12:30:00.5", "12:30:00.000000001", "23:59:59"]
INTEGERS = {
    name: (getattr(pa, name)(), low, high)
    for bits in (8, 16, 32, 64)
    for name, low, high in (
        (f"int{bits}", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        (f"uint{bits}", 0, 2**bits - 1),
    )
}
NEAR = [0, 1, -1, 2.5, -0.5, 127, 128, -129, 255, 300, 65536, 2**31, 2**53 + 1, 2**63, 2**64, 1e30]
HALVES = [0.5, -2.5, 0, 65504, 70000, -1e9, "inf", "-inf", "nan"]


def count_ns(text: str) -> int:
    """Return the nanoseconds since midnight of a time of day."""
    hours, minutes, seconds = text.split(":")
    return int((int(hours) * 3600 + int(minutes) * 60 + Decimal(seconds)) * 10**9)


def make_table(seed: int) -> pa.Table:
    """Return a column of each type, every tenth value missing."""
    rng = random.Random(seed)

    def draw(values, kind):
        drawn = [None if rng.random() < 0.1 else rng.choice(values) for _ in range(ROWS)]
        return pa.array(drawn, kind)

    columns = {
        name: draw([v for v in (*NEAR, low, high) if v == int(v) and low <= v <= high], kind)
        for name, (kind, low, high) in INTEGERS.items()
    }
    for name, kind in (("f16", pa.float16()), ("f32", pa.float32()), ("f64", pa.float64())):
        columns[name] = draw([v for v in FLOATS if kind != pa.float16() or v != 1e9], kind)
    for name, kind in (
        ("dec32", pa.decimal32(9, 1)),
        ("dec64", pa.decimal64(12, 2)),
        ("dec", pa.decimal128(10, 2)),
        ("dec38", pa.decimal128(38, 2)),
    ):
        fit = [v for v in DECIMALS if Decimal(v) == round(Decimal(v), kind.scale)]
        fit = [v for v in fit if abs(Decimal(v)) < 10 ** (kind.precision - kind.scale)]
        columns[name] = draw([Decimal(v) for v in fit], kind)
    for name, kind in (
        ("text", pa.string()),
        ("long", pa.large_string()),
        ("view", pa.string_view()),
    ):
        columns[name] = draw(TEXTS, kind)
    columns["flag"] = draw([True, False], pa.bool_())
    days = [DAY + datetime.timedelta(n) for n in range(4)]
    columns |= {"d32": draw(days, pa.date32()), "d64": draw(days, pa.date64())}
    for name, kind, unit in (
        ("t32", pa.time32("s"), 10**9),
        ("t64", pa.time64("us"), 10**3),
        ("tns", pa.time64("ns"), 1),
    ):
        columns[name] = draw([count_ns(v) // unit for v in CLOCKS], kind)
    seconds = int(NOON.replace(tzinfo=datetime.UTC).timestamp())
    for unit, per_s in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        moments = [(seconds + n * 43200) * per_s + extra for n in range(-2, 3) for extra in (0, 1)]
        columns[f"ts_{unit}"] = draw(moments, pa.timestamp(unit))
        columns[f"utc_{unit}"] = draw(moments, pa.timestamp(unit, "UTC"))
        columns[f"tz_{unit}"] = draw(moments, pa.timestamp(unit, "Europe/Berlin"))
        lengths = [n * per_s for n in (0, 1, -1, 90, 86400)]
        columns[f"dur_{unit}"] = draw(lengths, pa.duration(unit))
    return pa.table(columns)


def quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def draw_literal(rng: random.Random, column: str) -> tuple[object, str]:
    """Return a value for a filter on ``column``, and the same value in SQL."""
    if column in INTEGERS:
        value = rng.choice([*NEAR, *INTEGERS[column][1:], "nan", "-inf"])
        return value, f"'{value}'::double" if isinstance(
            value, (str, float)
        ) and value != 2.5 else str(value)
    if column in ("f16", "f32", "f64"):
        values = HALVES if column == "f16" else [*FLOATS[2:], -0.0, 0, 1e300, -1e300, 16777217]
        value = rng.choice(values)
        kind = "double" if column == "f64" or value in (1e300, -1e300, 70000) else "float"
        value = str(value) if value != value or value in (math.inf, -math.inf) else value
        return value, f"'{value}'::{kind}"
    if column.startswith("dec"):
        value = rng.choice([*DECIMALS, "1.505", "-1.5", "0.001", "100000000", "-1e20", 1.5, 1.01])
        return value, format(Decimal(str(value)), "f")
    if column in ("text", "long", "view"):
        value = rng.choice([*TEXTS, "Hats", "zzz"])
        return value, quote(value)
    if column == "flag":
        value = rng.choice([True, False])
        return value, str(value)
    return draw_time(rng, column)


def draw_time(rng: random.Random, column: str) -> tuple[str, str]:
    if column.startswith("t") and column in ("t32", "t64", "tns"):
        value = rng.choice(CLOCKS)
        return value, f"{quote(value)}::time_ns"
    if column.startswith("dur"):
        value, seconds = rng.choice(
            [
                ("PT1S", 1),
                ("-PT1S", -1),
                ("P1D", 86400),
                ("PT24H0.000001S", 86400.000001),
                ("PT0S", 0),
            ]
        )
        return value, f"to_microseconds({round(seconds * 10**6)})"
    moment = NOON + rng.randrange(-3, 4) * datetime.timedelta(hours=12)
    form = rng.choice(["day", "second", "fraction", "zone"])
    if form == "day":
        value = sql = str(moment.date())
    else:
        value = sql = moment.isoformat() + (".000000001" if form == "fraction" else "")
    if column.startswith(("utc", "tz")):
        if form == "zone":
            return f"{value}+05:00", f"timestamptz {quote(sql + '+05:00')}"
        zone = "UTC" if column.startswith("utc") else "Europe/Berlin"
        value = sql = value.removesuffix(".000000001")
        return value, f"(timestamp {quote(sql)} at time zone {quote(zone)})"
    return value, f"timestamp_ns {quote(sql)}"


def show_column(name: str) -> str:
    """Return how SQL names a column; what DuckDB compares with no finer time is made finer."""
    if name in ("t32", "t64", "tns"):
        return f"{name}::time_ns"
    return f"{name}::timestamp_ns" if name.startswith(("ts_", "d32", "d64")) else name


def draw_condition(rng: random.Random, columns: list[str]) -> tuple[dict, str]:
    """Return a condition as JSON, and the same in SQL."""
    column = rng.choice(columns)
    shown = show_column(column)
    operator = rng.choice(["$eq", "$ne", "$lt", "$lte", "$gt", "$gte", "$in", "$nin", "$exists"])
    if column in ("text", "long", "view") and rng.random() < 0.3:
        text = rng.choice(["h", "HAT", "'", '"', "%", "_", "\\", "ä", "本", "Ä", ", ("])
        if rng.random() < 0.5:
            return {column: {"$prefix": text}}, f"starts_with({shown}, {quote(text)})"
        return {column: {"$contains": text}}, f"contains(lower({shown}), lower({quote(text)}))"
    if operator == "$exists":
        exists = rng.random() < 0.5
        return {column: {operator: exists}}, f"{shown} is {'not ' if exists else ''}null"
    if operator in ("$in", "$nin"):
        drawn = [draw_literal(rng, column) for _ in range(rng.randint(1, 5))]
        word = "in" if operator == "$in" else "not in"
        # One comparison a value: DuckDB would unite the types of a list, to doubles for instance.
        any_of = " or ".join(f"{shown} = {sql}" for _, sql in drawn)
        sql = f"({any_of})" if word == "in" else f"(not ({any_of}))"
        return {column: {operator: [value for value, _ in drawn]}}, sql
    value, sql = draw_literal(rng, column)
    mark = {"$eq": "=", "$ne": "<>", "$lt": "<", "$lte": "<=", "$gt": ">", "$gte": ">="}[operator]
    return {column: {operator: value}}, f"({shown} {mark} {sql})"


def draw_filter(rng: random.Random, columns: list[str], depth: int = 0) -> tuple[dict, str]:
    kind = rng.random()
    if depth > 3 or kind < 0.4:
        return draw_condition(rng, columns)
    if kind < 0.6:
        tree, sql = draw_filter(rng, columns, depth + 1)
        return {"$not": tree}, f"(not {sql})"
    parts = [draw_filter(rng, columns, depth + 1) for _ in range(rng.randint(1, 3))]
    word = rng.choice(["and", "or"])
    return {f"${word}": [tree for tree, _ in parts]}, f"({f' {word} '.join(s for _, s in parts)})"


def write_text(tree: dict) -> str:
    """Return the text form of a filter in JSON."""
    [(name, value)] = tree.items()
    if name == "$not":
        return f"not ({write_text(value)})"
    if name in ("$and", "$or"):
        return "(" + f" {name[1:]} ".join(map(write_text, value)) + ")"
    [(operator, literal)] = value.items()
    if operator == "$exists":
        return f"{name} is {'not ' if literal else ''}null"
    if operator in ("$in", "$nin"):
        listed = ", ".join(map(write_value, literal))
        return f"{name} {'in' if operator == '$in' else 'not in'} ({listed})"
    marks = {"$eq": "=", "$ne": "!=", "$lt": "<", "$lte": "<=", "$gt": ">", "$gte": ">="}
    marks |= {"$contains": "~", "$prefix": "^="}
    return f"{name} {marks[operator]} {write_value(literal)}"


def write_value(value: object) -> str:
    text = str(value)
    return quote(text) if "'" not in text or '"' in text else f'"{text}"'


def ask_arrow(table: pa.Table, where: object) -> list[bool | None]:
    expression = compile_where(where, table.schema)
    scanner = ds.dataset(table).scanner(columns={"found": expression})
    return scanner.to_table().column("found").to_pylist()


def ask_duckdb(connection: duckdb.DuckDBPyConnection, filters: list[str]) -> list[list]:
    columns = ", ".join(f"{sql} as c{number}" for number, sql in enumerate(filters))
    found = connection.sql(f"select {columns} from t").to_arrow_table()
    return [column.to_pylist() for column in found.columns]


def compare(seed: int, number: int) -> list[str]:
    """Return the filters of ``number`` random ones that DuckDB answers otherwise."""
    rng = random.Random(seed)
    table = make_table(seed)
    connection = duckdb.connect()
    connection.execute("set TimeZone = 'America/New_York'")
    halves = table.column("f16").cast(pa.float32())  # DuckDB knows no smaller floats
    view = table.set_column(table.column_names.index("f16"), "f16", halves)
    connection.register("t", view)
    drawn = [draw_filter(rng, table.column_names) for _ in range(number)]
    differing = []
    for first in range(0, number, TOGETHER):
        some = drawn[first : first + TOGETHER]
        for (tree, sql), expected in zip(
            some, ask_duckdb(connection, [s for _, s in some]), strict=True
        ):
            for where in (json.loads(json.dumps(tree)), write_text(tree)):
                if ask_arrow(table, where) != expected:
                    differing.append(f"{where} against {sql}")
    return differing


ODD = [
    *("1e999999", "-1e999999", "1e-999999", "٣", "nan", "-nan", "inf", "+.5", "5.", ".", "", "  "),
    *(
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59.999999999",
        "2024-02-30",
        "24:00",
        "x" * 500,
    ),
    *("PT" + "9" * 40 + "S", "-P1D", "P", "1" * 400, "0." + "1" * 400, "\0", "\ud800", "1_0"),
    *(10**400, -(10**400), 1e308, 5e-324, math.nan, -math.inf, True, None, [], {}, b"x"),
    *(datetime.date.max, datetime.datetime.max, datetime.datetime.min, datetime.timedelta.max),
    *(datetime.time.max, Decimal("NaN"), Decimal("sNaN"), Decimal("1e1000000"), np.int8(-1)),
    *(np.float16(1), np.bool_(True), np.datetime64("2024-01-01"), np.timedelta64(5, "s")),
]


@pytest.mark.parametrize("operator", ["$eq", "$gt", "$contains"])
def test_an_odd_value_is_refused_or_compared_whatever_the_column(operator):
    table = make_table(0).slice(0, 8)
    for column in table.column_names:
        for value in ODD:
            try:
                compiled = compile_where({column: {operator: value}}, table.schema)
            except QueryError:
                continue
            ds.dataset(table).scanner(columns={"found": compiled}).to_table()


@pytest.mark.parametrize("seed", range(2))
def test_random_filters_are_answered_as_by_sql(seed):
    assert compare(seed, 500) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_many_random_filters_are_answered_as_by_sql(seed):
    assert compare(seed, 2000) == []
