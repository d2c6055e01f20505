"""Filters over the metadata columns: JSON or a line of text becomes an Arrow expression.

The JSON form is the one vector databases have made common::

    {"cls": "dress", "width": {"$gte": 400}}                     all conditions hold
    {"$or": [{"cls": {"$in": ["hat", "shoes"]}}, {"$not": {"height": {"$lt": 100}}}]}

The text form says the same for people::

    cls = dress and width >= 400
    cls in (hat, shoes) or not height < 100

Operators: ``$eq = · $ne != · $lt < · $lte <= · $gt > · $gte >= · $in in (…) · $contains ~ ·
$prefix ^= · $exists``, in text ``is null`` and ``is not null``. As in SQL, a missing value
fulfils no comparison. Nothing is ever evaluated as code, and size and depth are bounded.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import QueryError

MAX_DEPTH = 8
MAX_CONDITIONS = 64
MAX_VALUES = 1000
MAX_TEXT = 2000

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "$eq": lambda column, value: column == value,
    "$ne": lambda column, value: column != value,
    "$lt": lambda column, value: column < value,
    "$lte": lambda column, value: column <= value,
    "$gt": lambda column, value: column > value,
    "$gte": lambda column, value: column >= value,
}
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
OPERATORS = (*_COMPARE, "$in", "$nin", "$contains", "$prefix", "$exists")


def compile_where(where: Mapping[str, Any] | str, schema: pa.Schema) -> pc.Expression:
    """Return the Arrow expression of a filter.

    Args:
        where: The JSON form, or the text form.
        schema: The columns that may be named, with their types.

    Raises:
        QueryError: Naming the condition that is wrong and what would be right.
    """
    tree = parse_where(where) if isinstance(where, str) else where
    return _Compiler(schema).compile(tree, 0)


def _shorten(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def is_filterable(kind: pa.DataType) -> bool:
    """Tell whether conditions on a column of this type are possible."""
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_temporal(kind)
    )


class _Compiler:
    """Walks one filter; counts its conditions on the way."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._conditions = 0

    def compile(self, node: object, depth: int) -> pc.Expression:
        if depth > MAX_DEPTH:
            raise QueryError(f"the filter is nested deeper than {MAX_DEPTH} levels")
        if not isinstance(node, Mapping) or not node:
            raise QueryError(f"{_shorten(node)} is no filter; write an object of conditions")
        parts = [self._compile_entry(key, value, depth) for key, value in node.items()]
        return _join(parts, "and")

    def _compile_entry(self, key: str, value: object, depth: int) -> pc.Expression:
        if key == "$not":
            return ~self.compile(value, depth + 1)
        if key in ("$and", "$or"):
            if not isinstance(value, list) or not value:
                raise QueryError(f"{key} takes a list of filters, not {_shorten(value)}")
            return _join([self.compile(part, depth + 1) for part in value], key[1:])
        if key.startswith("$"):
            raise QueryError(f"{key} is no operator here; $and, $or and $not join filters")
        return self._compile_column(key, value)

    def _compile_column(self, name: str, value: object) -> pc.Expression:
        kind = self._find_column(name)
        conditions = value if isinstance(value, Mapping) else {"$eq": value}
        if not conditions:
            raise QueryError(f"the condition on {name!r} is empty")
        parts = [self._compile_condition(name, kind, op, v) for op, v in conditions.items()]
        return _join(parts, "and")

    def _find_column(self, name: str) -> pa.DataType:
        names = [field.name for field in self._schema if is_filterable(field.type)]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
            raise QueryError(f"no column {_shorten(name)} to filter by; {hint}")
        return self._schema.field(name).type

    def _compile_condition(
        self, name: str, kind: pa.DataType, operator: str, value: object
    ) -> pc.Expression:
        self._conditions += 1
        if self._conditions > MAX_CONDITIONS:
            raise QueryError(f"the filter has more than {MAX_CONDITIONS} conditions")
        column = pc.field(name)
        if operator in _COMPARE:
            return _COMPARE[operator](column, _convert(value, kind, name))
        if operator in ("$in", "$nin"):
            inside = column.isin(_convert_list(value, kind, name))
            return inside if operator == "$in" else ~inside & column.is_valid()
        if operator == "$exists" and isinstance(value, bool):
            return column.is_valid() if value else ~column.is_valid()
        if operator in ("$contains", "$prefix"):
            return _match_text(operator, name, kind, value)
        raise QueryError(_explain_operator(operator, value))


def _explain_operator(operator: str, value: object) -> str:
    if operator == "$exists":
        return f"$exists takes true or false, not {_shorten(value)}"
    return f"{_shorten(operator)} is no operator; there are: {', '.join(OPERATORS)}"


def _join(parts: list[pc.Expression], word: str) -> pc.Expression:
    joined = parts[0]
    for part in parts[1:]:
        joined = joined & part if word == "and" else joined | part
    return joined


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _convert(value: object, kind: pa.DataType, name: str) -> pa.Scalar:
    # Text reads as any type, so that the text form needs to know no types; nothing else converts.
    fits = isinstance(value, str)
    if pa.types.is_boolean(kind):
        fits = fits or isinstance(value, bool)
    elif not _is_text(kind):
        fits = fits or (isinstance(value, (int, float)) and not isinstance(value, bool))
    if not fits:
        raise QueryError(f"column {name!r} holds {kind}, which {_shorten(value)} is not")
    try:
        return pa.scalar(value).cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OverflowError) as error:
        raise QueryError(f"column {name!r} holds {kind}, which {_shorten(value)} is not") from error


def _convert_list(value: object, kind: pa.DataType, name: str) -> pa.Array:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_VALUES:
        raise QueryError(f"$in and $nin take a list of 1 to {MAX_VALUES} values")
    return pa.array([_convert(v, kind, name).as_py() for v in value], type=kind)


def _match_text(operator: str, name: str, kind: pa.DataType, value: object) -> pc.Expression:
    if not _is_text(kind):
        raise QueryError(f"{operator} needs a text column; {name!r} holds {kind}")
    if not isinstance(value, str) or not value:
        raise QueryError(f"{operator} takes some text, not {_shorten(value)}")
    if operator == "$prefix":
        return pc.starts_with(pc.field(name), pattern=value)
    return pc.match_substring(pc.field(name), pattern=value, ignore_case=True)


_TOKEN = re.compile(
    r"""\s*(?:(?P<mark>\(|\)|,|<=|>=|!=|\^=|=|<|>|~)
        |"(?P<double>[^"]*)"|'(?P<single>[^']*)'
        |(?P<word>[^\s(),<>=!~^"']+))""",
    re.VERBOSE,
)


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
            raise QueryError(f"cannot read the filter from {_shorten(stripped[position:], 30)}")
        tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
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
        column = self._take_value("a column")
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
        return {column: {operator: self._take_value("a value")}}

    def _parse_list(self) -> list[str]:
        if not self._accept("(", kind="mark"):
            raise QueryError(f"expected a parenthesis after in, found {self._peek()!r}")
        values = [self._take_value("a value")]
        while self._accept(",", kind="mark"):
            values.append(self._take_value("a value"))
        if not self._accept(")", kind="mark"):
            raise QueryError(f"expected a closing parenthesis, found {self._peek()!r}")
        return values

    def _take_value(self, what: str) -> str:
        if self._next >= len(self._tokens) or self._tokens[self._next][0] == "mark":
            raise QueryError(f"expected {what}, found {self._peek()!r}")
        self._next += 1
        return self._tokens[self._next - 1][1]
