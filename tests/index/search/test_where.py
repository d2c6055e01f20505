import datetime
import math
import pickle
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import QueryError
from pipeline.index.search.values import read_literal
from pipeline.index.search.where import (
    MAX_DEPTH,
    OPERATORS,
    compile_where,
    is_filterable,
    parse_where,
    serialise_where,
)

TABLE = pa.table(
    {
        "key": ["a", "b", "c", "d", "e"],
        "cls": ["dress", "hat", None, "Dress shirt", "5"],
        "width": pa.array([100, 200, 300, None, 500], pa.int32()),
        "price": [1.5, None, 3.0, 4.0, 5.0],
        "sold": [True, False, None, True, False],
        "taken": pa.array([datetime.date(2024, month, 1) for month in range(1, 6)]),
        "tags": [["x"], [], None, ["y"], ["z"]],
        "and": ["1", "2", "3", "4", "5"],
        "at": pa.array([0, 1, 2, None, 4], pa.timestamp("s")),
        "opens": pa.array([0, 1, 2, None, 4], pa.time32("s")),
        "lasts": pa.array([0, 1, 2, None, 4], pa.duration("s")),
    }
)


def keep_rows(table, where):
    scanner = ds.dataset(table).scanner(columns={"kept": where})
    kept = scanner.to_table().column("kept").to_pylist()
    return [row for row, keep in enumerate(kept) if keep]


def find(where):
    return "".join(TABLE.filter(compile_where(where, TABLE.schema)).column("key").to_pylist())


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ({"cls": "hat"}, "b"),
        ({"cls": {"$eq": "hat"}}, "b"),
        ({"cls": {"$ne": "hat"}}, "ade"),
        ({"width": {"$gte": 200, "$lt": 500}}, "bc"),
        ({"width": {"$lte": 100}}, "a"),
        ({"price": {"$gt": 3}}, "de"),
        ({"cls": {"$in": ["hat", "5"]}}, "be"),
        ({"cls": {"$nin": ["hat", "5"]}}, "ad"),
        ({"cls": {"$contains": "DRESS"}}, "ad"),
        ({"cls": {"$prefix": "Dress"}}, "d"),
        ({"cls": {"$exists": False}}, "c"),
        ({"cls": {"$exists": True}}, "abde"),
        ({"sold": True}, "ad"),
        ({"sold": {"$ne": True}}, "be"),
        ({"taken": {"$gte": "2024-04-01"}}, "de"),
        ({"cls": "dress", "width": 100}, "a"),
        ({"$or": [{"cls": "hat"}, {"width": 500}]}, "be"),
        ({"$and": [{"cls": {"$exists": True}}, {"$not": {"width": {"$lt": 200}}}]}, "be"),
    ],
)
def test_the_json_form_keeps_the_rows_it_describes(where, keys):
    assert find(where) == keys


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("cls = hat", "b"),
        ("cls='hat'", "b"),
        ('cls = "Dress shirt"', "d"),
        ("cls = 5", "e"),
        ("width >= 200 and width < 500", "bc"),
        ("width>=200 AND width<500", "bc"),
        ("cls = hat or cls = dress and width = 999", "b"),
        ("(cls = hat or cls = dress) and width < 150", "a"),
        ("not width < 300", "ce"),
        ("not (cls = hat or width < 300)", "e"),
        ("cls in (hat, 5)", "be"),
        ("cls not in (hat, 5)", "ad"),
        ("cls ~ dress", "ad"),
        ("cls ^= Dress", "d"),
        ("cls is null", "c"),
        ("cls is not null and price is null", "b"),
        ("sold = true", "ad"),
        ("taken > 2024-04-01", "e"),
        ('"and" = 3', "c"),
        ("cls != hat", "ade"),
    ],
)
def test_the_text_form_keeps_the_rows_it_describes(text, keys):
    assert find(text) == keys


def test_and_binds_tighter_than_or():
    assert parse_where("a = 1 or b = 2 and c = 3") == {
        "$or": [{"a": {"$eq": "1"}}, {"$and": [{"b": {"$eq": "2"}}, {"c": {"$eq": "3"}}]}]
    }


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({}, "no filter"),
        ({"cls": {}}, "condition on 'cls' is empty"),
        ({"clss": "hat"}, "did you mean 'cls'"),
        ({"zzz": 1}, "there are: key, cls, width, price, sold, taken, and, at, opens, lasts"),
        ({"tags": "x"}, "no column 'tags' to filter by; it holds list"),
        ({5: "x"}, "5 is no name of a column"),
        ({"cls": {"$like": "x"}}, "'$like' is no operator"),
        ({"$where": "1"}, "$where is no operator here"),
        ({"$or": {}}, "$or takes a list"),
        ({"$and": []}, "$and takes a list"),
        ({"$not": 3}, "3 is no filter"),
        ({"cls": 5}, "column 'cls' holds string, which 5 is not"),
        ({"width": "wide"}, "column 'width' holds int32, which 'wide' is not"),
        ({"width": True}, "which True is not"),
        ({"width": None}, "cannot be compared with null"),
        ({"cls": {"$in": ["hat", None]}}, "cannot be compared with null"),
        ("cls = null", "cannot be compared with null"),
        ("cls in (hat, NULL)", "cannot be compared with null"),
        ({"price": "1_000"}, "which '1_000' is not: it is no number"),
        ({"sold": "maybe"}, "neither true nor false"),
        ({"cls": "\ud800"}, "column 'cls' holds string"),
        ({"cls": {"$contains": "\ud800"}}, "column 'cls' holds string"),
        ({"taken": "yesterday"}, "write it as 2024-05-31 or 2024-05-31T12:30:15"),
        ({"taken": 20240531}, "write it as text: 2024-05-31T12:30:15"),
        ({"taken": "2024-05-31Z"}, "write it as 2024-05-31"),
        ({"at": "2024-05-31T12:00:00Z"}, "the column has no time zone"),
        ({"at": "2024-05-31T12.5"}, "write it as 2024-05-31"),
        ({"opens": "12:30+02:00"}, "times of day have no time zone"),
        ({"opens": "noon"}, "write it as 12:30:15"),
        ({"lasts": "soon"}, "write it as P1DT2H3M4.5S"),
        ({"lasts": "P"}, "write it as P1DT2H3M4.5S"),
        ({"sold": 1}, "column 'sold' holds bool"),
        ({"cls": {"$in": []}}, "list of 1 to 1000 values"),
        ({"cls": {"$in": ["x"] * 1001}}, "list of 1 to 1000 values"),
        ({"cls": {"$contains": ""}}, "takes some text"),
        ({"width": {"$contains": "1"}}, "needs a text column"),
        ({"cls": {"$exists": 1}}, "takes true or false"),
        ({"$or": [{"cls": "x"}] * 65}, "more than 64 conditions"),
        ("", "expected a column, found 'the end'"),
        ("cls", "expected one of"),
        ("cls =", "expected a value, found 'the end'"),
        ("cls = hat width = 3", "did not expect 'width'"),
        ("(cls = hat", "closing parenthesis"),
        ("cls in hat", "expected a parenthesis after in"),
        ("cls in (hat", "closing parenthesis"),
        ("cls = 'open", "cannot read the filter from"),
        ("cls = o'clock", "write a quote inside them twice"),
        ("cls '=' hat", "expected one of"),
        ("x" * 2001, "longer than 2000"),
        ("(" * 500, "nested deeper"),
        ("not " * 300 + "cls = hat", "nested deeper"),
        ("__import__('os')", "expected one of"),
    ],
)
def test_a_wrong_filter_says_what_is_wrong(where, words):
    with pytest.raises(QueryError) as caught:
        compile_where(where, TABLE.schema)
    assert words in str(caught.value)


def test_nesting_is_bounded():
    deep = {"cls": "hat"}
    for _ in range(MAX_DEPTH):
        deep = {"$not": deep}
    assert find(deep) == "b"
    with pytest.raises(QueryError, match="nested deeper than 8"):
        compile_where({"$not": deep}, TABLE.schema)


def test_missing_values_are_asked_for_as_the_message_about_null_says():
    with pytest.raises(QueryError) as caught:
        find("cls = null")
    remedy = str(caught.value).split("ask for missing values with ")[1].split(",")[0]
    assert find(remedy) == find({"cls": {"$exists": False}}) == "c"


def test_a_quoted_null_is_text():
    table = pa.table({"cls": ["null", None, "x"]})
    assert table.filter(compile_where("cls = 'null'", table.schema)).num_rows == 1


@settings(derandomize=True, database=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from("\"'"))
def test_any_text_is_written_in_quotes_with_its_own_quotes_doubled(text, quote):
    written = quote + text.replace(quote, 2 * quote) + quote
    assert parse_where(f"cls = {written}") == {"cls": {"$eq": text}}
    assert parse_where(f"{written} in ({written}, x)") == {text: {"$in": [text, "x"]}}


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ({"cls": {"$nin": ["hat"]}}, "ade"),
        ({"$not": {"cls": {"$in": ["hat"]}}}, "ade"),
        ("not cls in (hat)", "ade"),
        ("not cls ~ dress", "be"),
    ],
)
def test_a_missing_value_is_neither_in_a_list_nor_outside_it(where, keys):
    assert find(where) == keys


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("small = 300", []),
        ("small != 300", [0, 1, 2]),
        ("small < 300", [0, 1, 2]),
        ("not small > -1000", []),
        ({"small": 2.5}, []),
        ({"small": {"$gt": 2.5}}, [2]),
        ({"small": {"$lte": 2.5}}, [0, 1]),
        ({"small": {"$in": [1, 300, 2.0]}}, [0, 1]),
        ({"small": {"$nin": [300]}}, [0, 1, 2]),
        ({"big": 2**64 - 1}, [2]),
        ({"big": {"$lt": 2**64}}, [0, 1, 2]),
        ({"big": {"$gte": 2**53 + 1}}, [1, 2]),
        ({"half": {"$lt": 70000}}, [0, 1]),
        ({"half": {"$gte": 65504}}, [1, 2]),
        ({"half": 0.1}, [0]),
        ("price = 1.5", [0]),
        ("price = 1.50", [0]),
        ({"price": {"$lt": 1.005}}, [1]),
        ("zero = -0.0", [0, 1]),
        ({"zero": {"$in": [0.0, 5]}}, [0, 1]),
        ("zero = nan", [2]),
        ("zero > 1e300", [2]),
        ({"zero": {"$in": ["nan", -1]}}, [2]),
        ("opens = 08:30", [0]),
        ("opens > 08:30:00.5", [1, 2]),
        ("berlin = 2024-07-01", [0]),
        ("berlin >= 2024-07-01T00:00:00+02:00", [0, 1, 2]),
        ("berlin > 2024-06-30T22:00:00Z", [1, 2]),
        ("berlin <= '2024-07-01 00:00:00.000001'", [0, 1]),
        ("lasts = PT1H", [1]),
        ({"lasts": {"$lt": "P1D"}}, [0, 1]),
        ("view > a", [1, 2]),
        ("view in (a, b)", [0, 1]),
        ("view ^= c", [2]),
    ],
)
def test_a_comparison_is_exact_whatever_the_type_of_the_column(where, rows):
    table = pa.table(
        {
            "small": pa.array([1, 2, 3, None], pa.int8()),
            "big": pa.array([0, 2**53 + 1, 2**64 - 1, None], pa.uint64()),
            "half": pa.array([0.1, 65504.0, math.inf, None], pa.float16()),
            "price": pa.array(map(Decimal, ("1.50", "1.00", "2.00")), pa.decimal128(9, 2)).take(
                [0, 1, 2, None]
            ),
            "zero": [0.0, -0.0, math.nan, None],
            "opens": pa.array([30600, 30601, 43200, None], pa.time32("s")),
            "berlin": pa.array(
                [1719784800000000, 1719784800000001, 1719800000000000, None],
                pa.timestamp("us", "Europe/Berlin"),
            ),
            "lasts": pa.array([0, 3600, 86400, None], pa.duration("s")),
            "view": pa.array(["a", "b", "c", None], pa.string_view()),
        }
    )
    assert keep_rows(table, compile_where(where, table.schema)) == rows


def test_python_values_are_taken_as_they_are():
    assert find({"taken": datetime.date(2024, 2, 1)}) == "b"
    assert find({"taken": {"$lt": datetime.datetime(2024, 2, 1, 12)}}) == "ab"
    assert find({"lasts": {"$gt": datetime.timedelta(seconds=1)}}) == "ce"
    assert find({"width": {"$in": {np.int64(100), np.float32(200)}}}) == "ab"
    assert find({"price": Decimal("1.5")}) == "a"


def test_an_hour_that_comes_twice_is_the_first_and_one_that_is_skipped_ends():
    kind = pa.timestamp("s", "Europe/Berlin")
    assert read_literal("2024-10-27T02:30", kind).floor.value == 1729989000
    assert read_literal("2024-03-31T02:30", kind).floor.value == 1711846800


UNLIKE = [
    *(1, 1.0, True, "1", b"1", 0.0, -0.0, Decimal("1"), Decimal("1.0"), Decimal("1.00")),
    *(datetime.date(1970, 1, 2), datetime.datetime(1970, 1, 2), datetime.time(1), [1], [1, 2]),
    *(pa.scalar(1, kind()) for kind in (pa.int8, pa.uint8, pa.int32, pa.uint64, pa.float32)),
    *(pa.scalar(1, pa.timestamp(unit, zone)) for unit in ("s", "ms", "us") for zone in ("", "UTC")),
    *(pa.scalar(1, pa.duration(unit)) for unit in ("s", "ns")),
    *(pa.scalar("1", kind()) for kind in (pa.large_string, pa.large_binary)),
    *(math.nan, math.inf, None, "1 ", "", "null"),
]


def test_filters_with_unlike_values_are_told_apart():
    filters = [pc.field("x") == value for value in UNLIKE]
    filters += [pc.field(name) == 1 for name in ("X", "y", "x.y", "")]
    filters += [pc.field("x").isin([value]) for value in (1, 1.0, True, "1")]
    filters += [pc.starts_with(pc.field("x"), "1"), pc.ends_with(pc.field("x"), "1")]
    filters += [pc.match_substring(pc.field("x"), "1", ignore_case=flag) for flag in (False, True)]
    assert len({serialise_where(where) for where in filters}) == len(filters)


NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.decimals(allow_nan=False))
COLUMNS = {
    "text": (pa.string(), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
    "count": (pa.int64(), NUMBERS),
    "size": (pa.float64(), NUMBERS),
    "half": (pa.float16(), NUMBERS),
    "price": (pa.decimal128(12, 3), NUMBERS),
    "taken": (pa.timestamp("us"), st.datetimes()),
}


@settings(derandomize=True, database=None, deadline=None)
@given(st.sampled_from(list(COLUMNS)), st.data())
def test_a_filter_with_another_value_is_another_filter(name, data):
    """One value of a list is replaced: rows then tell the two filters apart, or nothing may."""
    kind, values = COLUMNS[name]
    some = data.draw(st.lists(values, min_size=1, max_size=60))
    place, other = data.draw(st.integers(0, len(some) - 1)), data.draw(values)
    lists = (some, [*some[:place], other, *some[place + 1 :]])
    schema = pa.schema([(name, kind)])
    filters = [compile_where({name: {"$in": listed}}, schema) for listed in lists]
    literals = [read_literal(value, kind) for value in (*some, other)]
    held = [literal.floor for literal in literals if literal.exact]
    table = pa.table({name: pa.array(held, held[0].type if held else kind)})
    kept = [keep_rows(table, where) for where in filters]
    assert kept[0] == kept[1] or serialise_where(filters[0]) != serialise_where(filters[1])
    for where, rows in zip(filters, kept, strict=True):
        assert keep_rows(table, pickle.loads(serialise_where(where))) == rows


WORDS = [*"()<>=!~^,", "'", '"', "and", "or", "not", "in", "is", "null", "cls", "width", "taken"]
KEYS = st.sampled_from([*TABLE.column_names, *OPERATORS, "$and", "$or", "$not", "$", ""])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=400)
@given(
    st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=12).map(" ".join)
    | st.dictionaries(KEYS, ANY_JSON, min_size=1, max_size=3)
)
def test_a_filter_is_refused_or_answered_whatever_it_is(where):
    try:
        compiled = compile_where(where, TABLE.schema)
    except QueryError:
        return
    keep_rows(TABLE, compiled)


def test_bytes_lists_and_intervals_are_no_columns_to_filter_by():
    kinds = (pa.binary(), pa.binary(4), pa.list_(pa.int8()), pa.month_day_nano_interval())
    assert not any(map(is_filterable, kinds))
