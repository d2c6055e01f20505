import datetime

import pyarrow as pa
import pytest

from pipeline.errors import QueryError
from pipeline.index.search.where import MAX_DEPTH, compile_where, parse_where

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
    }
)


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
        ({"zzz": 1}, "there are: key, cls, width, price, sold, taken, and"),
        ({"tags": "x"}, "no column 'tags'"),
        ({"cls": {"$like": "x"}}, "'$like' is no operator"),
        ({"$where": "1"}, "$where is no operator here"),
        ({"$or": {}}, "$or takes a list"),
        ({"$and": []}, "$and takes a list"),
        ({"$not": 3}, "3 is no filter"),
        ({"cls": 5}, "column 'cls' holds string, which 5 is not"),
        ({"width": "wide"}, "column 'width' holds int32, which 'wide' is not"),
        ({"width": True}, "which True is not"),
        ({"width": None}, "which None is not"),
        ({"width": 1e30}, "which 1e+30 is not"),
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
