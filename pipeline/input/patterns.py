"""Inputs written as patterns: brace ranges and wildcards, as in shells and WebDataset.

``{000..127}`` and ``{train,val}`` name every alternative, and each has to be there. ``*``, ``?``
and ``[0-9]`` match within one part of a path, ``**`` across parts; a folder that matches means all
that is in it. Wildcards are matched against a listing of the folder before the first of them.
"""

import re
import string
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.errors import NoShardsError, SettingsError
from pipeline.records import FailedObject, ObjectInfo
from pipeline.storage import Storage

_THREADS = 32
_MAX_ALTERNATIVES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?|([a-zA-Z])\.\.([a-zA-Z])")
_WILDCARD = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]/]*\]")
_TRANSLATIONS = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def survey_pattern(
    pattern: str, storage: Storage
) -> tuple[str, list[ObjectInfo], list[FailedObject]] | None:
    """List what a pattern names.

    Args:
        pattern: A URI, normalised, that is no object or folder itself.
        storage: How to reach it.

    Returns:
        The folder before the first brace or wildcard, under which the objects have their names;
        the objects; and those that cannot be looked at. None where the URI is no pattern.

    Raises:
        NoShardsError: One of the alternatives in braces is not there.
        SettingsError: There are too many alternatives, or a bucket's name has a wildcard.
    """
    alternatives = expand_braces(pattern)
    if len(alternatives) == 1 and _split_wildcard(alternatives[0]) is None:
        return None
    objects: dict[str, ObjectInfo] = {}
    failed: dict[str, FailedObject] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        surveys = pool.map(lambda uri: _survey_one(uri, pattern, storage), alternatives)
        for some_objects, some_failed in surveys:
            objects |= {found.uri: found for found in some_objects}
            failed |= {found.uri: found for found in some_failed}
    return _find_base(pattern), list(objects.values()), list(failed.values())


def _survey_one(
    uri: str, pattern: str, storage: Storage
) -> tuple[list[ObjectInfo], list[FailedObject]]:
    split = _split_wildcard(uri)
    if split is None:
        objects, failed = storage.survey(uri)
        if not objects and not failed:
            raise NoShardsError(f"there is no {uri!r}, which {pattern!r} names; correct the range")
        return objects, failed
    base, expression = split
    objects, failed = storage.survey(base)
    return (
        [found for found in objects if expression.fullmatch(found.uri)],
        [found for found in failed if expression.fullmatch(found.uri)],
    )


def _find_base(pattern: str) -> str:
    found = [*_BRACES.finditer(pattern), *_WILDCARD.finditer(pattern)]
    first = min(match.start() for match in found)
    return pattern[:first].rpartition("/")[0] or "/"


def expand_braces(text: str) -> list[str]:
    """Return every alternative that braces name, in order and without repetitions.

    Raises:
        SettingsError: There are more than a million.
    """
    for match in _BRACES.finditer(text):
        options = _list_options(match[1])
        if options is not None:
            rests = [text[: match.start()] + option + text[match.end() :] for option in options]
            expanded = dict.fromkeys(found for rest in rests for found in expand_braces(rest))
            if len(expanded) > _MAX_ALTERNATIVES:
                raise _too_many(text)
            return list(expanded)
    return [text]


def _list_options(content: str) -> Sequence[str] | None:
    """Return the alternatives of one pair of braces; None where it stands for itself."""
    match = _RANGE.fullmatch(content)
    if match is None:
        return content.split(",") if "," in content else None
    if match[4]:
        letters = string.ascii_letters
        first, last = letters.index(match[4]), letters.index(match[5])
        return [letters[i] for i in _count(first, last, 1)]
    width = max(map(len, match.group(1, 2))) if re.search(r"(^|[.-])0\d", content) else 0
    numbers = _count(int(match[1]), int(match[2]), int(match[3] or 1) or 1)
    if len(numbers) > _MAX_ALTERNATIVES:
        raise _too_many("{" + content + "}")
    return [f"{number:0{width}d}" for number in numbers]


def _count(first: int, last: int, step: int) -> range:
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)


def _too_many(text: str) -> SettingsError:
    return SettingsError(f"{text!r} names more than a million objects; give their folder instead")


def _split_wildcard(uri: str) -> tuple[str, re.Pattern[str]] | None:
    """Return the folder before the first wildcard, and what a URI has to match."""
    first = _WILDCARD.search(uri)
    if first is None or uri.startswith(("http://", "https://")):  # a ? starts a query there
        return None
    base = uri[: first.start()].rpartition("/")[0] or "/"
    if base.endswith((":/", ":")):
        raise SettingsError(f"{uri!r} has a wildcard in the bucket's name; name the bucket")
    expression, position = "", 0
    for match in _WILDCARD.finditer(uri):
        expression += re.escape(uri[position : match.start()]) + _translate(match[0])
        position = match.end()
    return base, re.compile(expression + re.escape(uri[position:]) + r"(/.*)?", re.DOTALL)


def _translate(wildcard: str) -> str:
    if wildcard in _TRANSLATIONS:
        return _TRANSLATIONS[wildcard]
    content = wildcard[1:-1].replace("\\", r"\\").replace("[", r"\[")
    return f"[^/{content[1:]}]" if content.startswith("!") else f"[{content}]"
