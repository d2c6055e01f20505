"""Filters over the metadata columns: JSON or a line of text becomes an Arrow expression.

The JSON form is the one vector databases have made common::

    {"cls": "dress", "width": {"$gte": 400}}                     all conditions hold
    {"$or": [{"cls": {"$in": ["hat", "shoes"]}}, {"$not": {"height": {"$lt": 100}}}]}

The text form says the same for people::

    cls = dress and width >= 400
    cls in (hat, shoes) or not height < 100
    title = "it""s 5 o'clock" and taken >= 2024-05-31

Operators: ``$eq = · $ne != · $lt < · $lte <= · $gt > · $gte >= · $in in (…) · $nin not in (…) ·
$contains ~ · $prefix ^= · $exists``, in text ``is null`` and ``is not null``. Nothing is ever
evaluated as code, and size and depth are bounded.

Conditions are SQL's, with three truth values: a comparison with a missing value is neither true nor
false, nor is its negation, and only what is true is found. NaN equals itself and comes after all
other numbers; -0.0 equals 0. Comparisons are exact whatever the column's type: no int8 equals 300
or 2.5, and all of them are less than 300. Times are ISO 8601; where a column has a time zone, a
time without one is read in the column's. ``$contains`` does not mind upper and lower case.
"""

import difflib
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import QueryError
from pipeline.index.search.values import (
    Literal,
    find_compared_type,
    is_comparable,
    is_text,
    read_literal,
)

MAX_DEPTH = 8
MAX_CONDITIONS = 64
MAX_VALUES = 1000
MAX_TEXT = 2000

_OPPOSITES = {"$ne": "$eq", "$lt": "$gte", "$lte": "$gt", "$nin": "$in"}
_TEXT_OPERATORS = {
    "=": "$eq",
    "!=": "$ne",
    "<": "$lt",
    "<=": "$lte",
    ">": "$gt",
    ">=": "$gte",
    "~": "$contains",
    "^=": "$prefix",
}
OPERATORS = (*_TEXT_OPERATORS.values(), "$in", "$nin", "$exists")

Where: TypeAlias = Mapping[str, Any] | str | pc.Expression
"""A filter: its JSON form, its text form, or compiled."""


def compile_where(where: Where, schema: pa.Schema) -> pc.Expression:
    """Return the Arrow expression of a filter.

    Args:
        where: The JSON form, the text form, or an Arrow expression, which is returned as it is.
        schema: The columns that may be named, with their types.

    Raises:
        QueryError: Naming the condition that is wrong and what would be right.
    """
    if isinstance(where, pc.Expression):
        return where
    tree = parse_where(where) if isinstance(where, str) else where
    return _Compiler(schema).compile(tree, 0)


def serialise_where(where: pc.Expression) -> bytes:
    """Return bytes that only equal filters have in common, to know a filter by.

    They hold the whole expression with the types of its values. Its text does not: ``str`` leaves
    out the middle of a long list, and prints 1, 1.0 and True alike.

    Raises:
        pa.ArrowNotImplementedError: Arrow cannot write it down; it names a column by its number.
    """
    return pickle.dumps(where, protocol=5)


def _shorten(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def is_filterable(kind: pa.DataType) -> bool:
    """Tell whether conditions on a column of this type are possible."""
    return is_comparable(kind)


class _Compiler:
    """Walks one filter; counts its conditions on the way."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._kinds = {field.name: field.type for field in schema if is_filterable(field.type)}
        self._conditions = 0

    def compile(self, node: object, depth: int) -> pc.Expression:
        if depth > MAX_DEPTH:
            raise QueryError(f"the filter is nested deeper than {MAX_DEPTH} levels")
        if not isinstance(node, Mapping) or not node:
            raise QueryError(f"{_shorten(node)} is no filter; write an object of conditions")
        parts = [self._compile_entry(key, value, depth) for key, value in node.items()]
        return _join(parts, "and")

    def _compile_entry(self, key: object, value: object, depth: int) -> pc.Expression:
        if not isinstance(key, str):
            raise QueryError(f"{_shorten(key)} is no name of a column")
        if key == "$not":
            return ~self.compile(value, depth + 1)
        if key in ("$and", "$or"):
            if not isinstance(value, (list, tuple)) or not value:
                raise QueryError(f"{key} takes a list of filters, not {_shorten(value)}")
            return _join([self.compile(part, depth + 1) for part in value], key[1:])
        if key.startswith("$"):
            raise QueryError(f"{key} is no operator here; $and, $or and $not join filters")
        return self._compile_column(key, value)

    def _compile_column(self, name: str, value: object) -> pc.Expression:
        column = self._find_column(name)
        conditions = value if isinstance(value, Mapping) else {"$eq": value}
        if not conditions:
            raise QueryError(f"the condition on {name!r} is empty")
        self._conditions += len(conditions)
        if self._conditions > MAX_CONDITIONS:
            raise QueryError(f"the filter has more than {MAX_CONDITIONS} conditions")
        return _join([column.compile(op, v) for op, v in conditions.items()], "and")

    def _find_column(self, name: str) -> "_Column":
        if name not in self._kinds and name in self._schema.names:
            kind = self._schema.field(name).type
            raise QueryError(f"no column {name!r} to filter by; it holds {kind}")
        if name not in self._kinds:
            near = difflib.get_close_matches(name, self._kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(self._kinds)}"
            raise QueryError(f"no column {_shorten(name)} to filter by; {hint}")
        return _Column(name, self._kinds[name])


class _Column:
    """Makes the conditions on one column: null where a value is missing, else true or false."""

    def __init__(self, name: str, kind: pa.DataType) -> None:
        self._name, self._kind = name, kind
        self._compared = find_compared_type(kind)
        self._is_float = pa.types.is_floating(kind)
        stored = pc.field(name)
        self._values = stored if self._compared == kind else stored.cast(self._compared)

    def compile(self, operator: object, value: object) -> pc.Expression:
        if operator in _OPPOSITES:
            return ~self.compile(_OPPOSITES[operator], value)
        if operator == "$eq":
            return self._equal([self._read(value)])
        if operator == "$in":
            return self._equal(self._read_list(value))
        if operator in ("$gt", "$gte"):
            return self._exceed(self._read(value), inclusive=operator == "$gte")
        if operator == "$exists" and isinstance(value, bool):
            return self._values.is_valid() if value else ~self._values.is_valid()
        if operator in ("$contains", "$prefix"):
            return self._match_text(str(operator), value)
        raise QueryError(_explain_operator(operator, value))

    def _equal(self, literals: Sequence[Literal]) -> pc.Expression:
        """Return whether a row holds one of these values."""
        values = [item.floor for item in literals if item.exact and item.floor is not None]
        if len(values) == 1 and not _is_nan(values[0]):
            return self._values == values[0]
        if self._is_float and any(value.as_py() == 0 for value in values):
            values += [pa.scalar(zero, self._compared) for zero in (0.0, -0.0)]  # differing bits
        found = self._values.isin(pa.array(values, self._compared))
        if any(map(_is_nan, values)):
            found |= pc.is_nan(self._values)  # NaN has many
        return pc.if_else(self._values.is_valid(), found, pa.scalar(None, pa.bool_()))

    def _exceed(self, literal: Literal, *, inclusive: bool) -> pc.Expression:
        """Return whether a row holds more than a value, or if ``inclusive`` as much."""
        floor = literal.floor
        if floor is None:
            return self._answer(True)
        if _is_nan(floor):
            return pc.is_nan(self._values) if inclusive else self._answer(False)
        at_least = inclusive and literal.exact
        found = self._values >= floor if at_least else self._values > floor
        return found | pc.is_nan(self._values) if self._is_float else found

    def _answer(self, answer: bool) -> pc.Expression:
        return pc.if_else(self._values.is_valid(), answer, pa.scalar(None, pa.bool_()))

    def _read(self, value: object) -> Literal:
        if value is None:
            name = _quote(self._name)
            raise QueryError(
                f"column {self._name!r} cannot be compared with null; ask for missing values with "
                f"{name} is null, or with $exists"
            )
        try:
            return read_literal(value, self._kind)
        except ValueError as error:
            raise QueryError(
                f"column {self._name!r} holds {self._kind}, which {_shorten(value)} is not: {error}"
            ) from error

    def _read_list(self, values: object) -> list[Literal]:
        if isinstance(values, (list, tuple, set, frozenset)) and 1 <= len(values) <= MAX_VALUES:
            return [self._read(value) for value in values]
        raise QueryError(f"$in and $nin take a list of 1 to {MAX_VALUES} values")

    def _match_text(self, operator: str, value: object) -> pc.Expression:
        if not is_text(self._kind):
            raise QueryError(f"{operator} needs a text column; {self._name!r} holds {self._kind}")
        if not isinstance(value, str) or not value:
            raise QueryError(f"{operator} takes some text, not {_shorten(value)}")
        self._read(value)
        if operator == "$prefix":
            return pc.starts_with(self._values, pattern=value)
        return pc.match_substring(self._values, pattern=value, ignore_case=True)


def _is_nan(value: pa.Scalar) -> bool:
    return bool(pa.types.is_floating(value.type) and math.isnan(value.as_py()))


def _explain_operator(operator: object, value: object) -> str:
    if operator == "$exists":
        return f"$exists takes true or false, not {_shorten(value)}"
    return f"{_shorten(operator)} is no operator; there are: {', '.join(OPERATORS)}"


def _join(parts: list[pc.Expression], word: str) -> pc.Expression:
    joined = parts[0]
    for part in parts[1:]:
        joined = joined & part if word == "and" else joined | part
    return joined


_TOKEN = re.compile(
    r"""\s*(?:(?P<mark>\(|\)|,|<=|>=|!=|\^=|=|<|>|~)
        |"(?P<double>(?:[^"]|"")*)"|'(?P<single>(?:[^']|'')*)'
        |(?P<word>[^\s(),<>=!~^"']+))""",
    re.VERBOSE,
)


_QUOTES = {"double": '"', "single": "'"}


def _quote(text: str) -> str:
    """Return how the text form writes a name or a value that may look like anything."""
    return '"' + text.replace('"', '""') + '"'


def parse_where(text: str) -> dict[str, Any]:
    """Return the JSON form of the text form.

    Raises:
        QueryError: Showing where the text stops making sense.
    """
    if len(text) > MAX_TEXT:
        raise QueryError(f"the filter is longer than {MAX_TEXT} characters")
    tokens, position = [], 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if match is None:
            raise QueryError(
                f"cannot read the filter from {_shorten(stripped[position:], 30)}; put text with "
                "spaces or marks into quotes, and write a quote inside them twice"
            )
        kind = str(match.lastgroup)
        quote = _QUOTES.get(kind, "")
        tokens.append((kind, match[kind].replace(2 * quote, quote)))
        position = match.end()
    return _Parser(tokens).parse()


class _Parser:
    """Recursive descent over ``or`` < ``and`` < ``not`` < conditions and parentheses."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._next = 0

    def parse(self) -> dict[str, Any]:
        tree = self._parse_joined("or", 0)
        if self._next < len(self._tokens):
            raise QueryError(f"did not expect {self._peek()!r}; join conditions with and, or")
        return tree

    def _peek(self) -> str:
        return self._tokens[self._next][1] if self._next < len(self._tokens) else "the end"

    def _accept(self, *texts: str, kind: str = "word") -> bool:
        """Step over ``texts`` if they come next; words regardless of case, quoted ones never."""
        ahead = self._tokens[self._next : self._next + len(texts)]
        if [(k, t.lower()) for k, t in ahead] != [(kind, text) for text in texts]:
            return False
        self._next += len(texts)
        return True

    def _parse_joined(self, word: str, depth: int) -> dict[str, Any]:
        if depth > 2 * MAX_DEPTH:
            raise QueryError(f"the filter is nested deeper than {MAX_DEPTH} levels")
        parse = self._parse_factor if word == "and" else self._parse_and
        parts = [parse(depth)]
        while self._accept(word):
            parts.append(parse(depth))
        return parts[0] if len(parts) == 1 else {f"${word}": parts}

    def _parse_and(self, depth: int) -> dict[str, Any]:
        return self._parse_joined("and", depth + 1)

    def _parse_factor(self, depth: int) -> dict[str, Any]:
        if self._accept("not"):
            if depth > 2 * MAX_DEPTH:
                raise QueryError(f"the filter is nested deeper than {MAX_DEPTH} levels")
            return {"$not": self._parse_factor(depth + 1)}
        if self._accept("(", kind="mark"):
            inner = self._parse_joined("or", depth + 1)
            if not self._accept(")", kind="mark"):
                raise QueryError(f"expected a closing parenthesis, found {self._peek()!r}")
            return inner
        return self._parse_condition()

    def _parse_condition(self) -> dict[str, Any]:
        column = self._take_text("a column")
        if self._accept("is", "null"):
            return {column: {"$exists": False}}
        if self._accept("is", "not", "null"):
            return {column: {"$exists": True}}
        if self._accept("not", "in"):
            return {column: {"$nin": self._parse_list()}}
        if self._accept("in"):
            return {column: {"$in": self._parse_list()}}
        marked = self._tokens[self._next : self._next + 1] == [("mark", self._peek())]
        operator = _TEXT_OPERATORS.get(self._peek()) if marked else None
        if operator is None:
            known = ", ".join(_TEXT_OPERATORS)
            raise QueryError(f"expected one of {known} after {column!r}, found {self._peek()!r}")
        self._next += 1
        return {column: {operator: self._take_literal()}}

    def _parse_list(self) -> list[str | None]:
        if not self._accept("(", kind="mark"):
            raise QueryError(f"expected a parenthesis after in, found {self._peek()!r}")
        values = [self._take_literal()]
        while self._accept(",", kind="mark"):
            values.append(self._take_literal())
        if not self._accept(")", kind="mark"):
            raise QueryError(f"expected a closing parenthesis, found {self._peek()!r}")
        return values

    def _take_literal(self) -> str | None:
        return None if self._accept("null") else self._take_text("a value")

    def _take_text(self, what: str) -> str:
        if self._next >= len(self._tokens) or self._tokens[self._next][0] == "mark":
            raise QueryError(f"expected {what}, found {self._peek()!r}")
        self._next += 1
        return self._tokens[self._next - 1][1]
