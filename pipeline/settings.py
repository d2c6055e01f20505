"""DOOR to the validation library: what a settings class is, and the sentence that refuses a value.

``@settings`` makes a frozen dataclass that reads every value it is given, whether Python, a flag or
a TOML file gave it, so all three accept and refuse the same in the same words.
"""

import difflib
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import field, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from pipeline.errors import SettingsError

Cls = TypeVar("Cls", bound=type)

_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(cls: Cls) -> Cls:
    """Make ``cls`` a frozen, slotted dataclass whose values are read and checked when it is made.

    Paths are accepted where text is meant, one value where a list is meant, and text where it is
    a number or a truth value; anything else is a ``SettingsError`` that names field, value, what is
    allowed, and the nearest word.
    """
    readers: Any = cls
    readers._read_value = field_validator("*", mode="before")(_read_value)
    readers._explain_refusal = model_validator(mode="wrap")(_explain_refusal)
    config = ConfigDict(defer_build=True, allow_inf_nan=False, extra="forbid")
    return dataclass(frozen=True, slots=True, config=config)(cls)  # type: ignore[return-value]


@classmethod  # type: ignore[misc]
def _explain_refusal(cls: type, values: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(values)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        if not found["loc"]:  # no table at all: whoever holds this one says where
            raise
        raise SettingsError(_explain(found, cls)) from None


class Size(str):
    """A number of bytes as it was written, e.g. ``"64MiB"``, which is what reports show.

    Attributes:
        nbytes: The number.
    """

    nbytes: int

    def __new__(cls, text: str) -> "Size":
        """Read ``"8GB"``, ``"64MiB"`` or ``"1000"``.

        Raises:
            ValueError: The text is not a size.
        """
        pattern = r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*"
        match = re.fullmatch(pattern, text) if isinstance(text, str) else None
        if match is None or match[2].upper() not in _SIZE_UNITS:
            raise ValueError("write a size such as 64MiB, 8GB or 1000")
        size = super().__new__(cls, text)
        size.nbytes = int(float(match[1]) * _SIZE_UNITS[match[2].upper()])
        return size


class FailureLimit(str):
    """How many failures are too many, as it was written: ``"100"``, ``"1%"`` or ``"0.01"``.

    Attributes:
        images: The number; None for a share.
        share: The share, from 0 to 1; None for a number.
    """

    images: int | None
    share: float | None

    def __new__(cls, text: str) -> "FailureLimit":
        """Read a count or a share.

        Raises:
            ValueError: The text is neither.
        """
        limit = super().__new__(cls, text)
        is_count = isinstance(text, str) and text.isdecimal()
        limit.images = int(text) if is_count else None
        limit.share = None if is_count else _parse_share(text)
        return limit


def _parse_share(text: object) -> float:
    if isinstance(text, str) and re.fullmatch(r"[\d.e-]+%?", text):
        with suppress(ValueError):
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
            if 0 <= share <= 1:
                return share
    raise ValueError("use a count such as 100 or a share as 1%")


def _parse_image_size(text: str) -> str:
    if text not in ("train", "test") and not (text.isdecimal() and int(text) > 0):
        raise ValueError("use train, test, or a number of pixels")
    return text


def _write_number(value: object) -> object:
    """Return a number as the text it would be on a command line; all else as it is."""
    return str(value) if isinstance(value, int | float) and value is not True else value


def require(holds: Callable[[Any], bool], words: str) -> AfterValidator:
    """Return what refuses the values of a field for which ``holds`` is false, in these words."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(words)
        return value

    return AfterValidator(check)


_AT_LEAST_1 = "it must be at least 1"
Count = Annotated[int, require(lambda n: n >= 1, _AT_LEAST_1)]
NotNegativeInt = Annotated[int, require(lambda n: n >= 0, "it must not be negative")]
NotNegative = Annotated[float, require(lambda x: x >= 0, "it must not be negative")]
Positive = Annotated[float, require(lambda x: x > 0, "it must be positive")]
Share = Annotated[float, require(lambda x: 0 <= x <= 1, "use a share from 0 to 1")]
PositiveShare = Annotated[float, require(lambda x: 0 < x <= 1, "use more than 0, up to 1")]
TopK = Annotated[int, require(lambda n: 0 <= n <= 1000, "use 0 to 1000")]
ImageSize = Annotated[str, AfterValidator(_parse_image_size), BeforeValidator(_write_number)]
Bytes = Annotated[Size, PlainValidator(Size), BeforeValidator(_write_number)]
PositiveBytes = Annotated[Bytes, require(lambda size: size.nbytes >= 1, _AT_LEAST_1)]
Failures = Annotated[FailureLimit, PlainValidator(FailureLimit), BeforeValidator(_write_number)]


@cache
def list_kinds(cls: type) -> dict[str, Any]:
    """Return the type of each field of a settings class, by name, in order."""
    hints = get_type_hints(cls)
    return {name: hints[name] for name in cls.__dataclass_fields__}  # type: ignore[attr-defined]


def split_kind(kind: Any) -> tuple[Any, bool, bool]:
    """Return the type of one value of a field, whether it is a list, and whether None will do."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    optional = NoneType in options
    (one,) = (option for option in options if option is not NoneType)
    if get_origin(one) is tuple:
        return get_args(one)[0], True, optional
    return one, False, optional


@classmethod  # type: ignore[misc]
def _read_value(cls: type, value: Any, info: ValidationInfo) -> Any:
    """Bring a value into the form that the validation of its field takes."""
    kind, is_list, _ = split_kind(list_kinds(cls)[str(info.field_name)])
    if not is_list:
        return _read_one(kind, value)
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(_read_one(kind, item) for item in values)


def _read_one(kind: Any, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bytes) or (isinstance(value, bool) and kind in (int, float)):
        raise ValueError(describe_kind(kind))
    if isinstance(value, str) and kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return value


def describe_kind(kind: Any) -> str:
    """Return what to write for a value of this type, as an imperative."""
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"use {', '.join(others)} or {last}" if others else f"use {last}"
    if is_dataclass(kind):
        return "give a table of its settings"
    words = {int: "write a whole number", float: "write a number", bool: "write true or false"}
    return words.get(kind, "write text")


def suggest(word: object, known: Iterable[str]) -> str:
    """Return ``"; did you mean …?"`` with the nearest word, or nothing where none is near."""
    by_lower = {name.lower(): name for name in sorted(known)}
    nearest = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[nearest[0]]}?" if nearest else ""


def _explain(found: Mapping[str, Any], cls: type) -> str:
    """Return the sentence for a refused value."""
    kinds, value, place = list_kinds(cls), found["input"], found["loc"][0]
    if found["type"] == "unexpected_positional_argument":
        return f"{cls.__name__} has {len(kinds)} settings, and is given more; name them"
    name = list(kinds)[place] if isinstance(place, int) else place
    if found["type"] == "unexpected_keyword_argument":
        return f"there is no setting {name}{suggest(name, kinds)}"
    if found["type"] == "missing":
        return f"{name} is not given, and it has no default"
    kind, _, _ = split_kind(kinds[name])
    words = str(found["ctx"]["error"]) if found["type"] == "value_error" else describe_kind(kind)
    near = suggest(value, get_args(kind)) if get_origin(kind) is Literal else ""
    return f"{name} is {value!r}; {words}{near}"
