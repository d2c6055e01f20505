"""What a job says on a terminal when it ends: rows, rate, the report, what to type next."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.program import name_program

_SERVES = {"built", "added", "unchanged", "mended", "pinned", "unpinned", "rolled back"}
"""What an index job did when it leaves an index to search."""

Lines = Iterator[tuple[str, str]]


def summarise(values: Mapping[str, Any]) -> str:
    """Return a report, as its ``to_dict`` gives it, in a few lines for people.

    A report of a whole run says what comes next; any other one lists its single values.
    """
    if "freshness" in values:
        lines = [*_describe_embedding(values["embed"]), *_describe_index(values["index"])]
        lines += _describe_age(values["freshness"])
        lines += _suggest_lookups(values["index"]["index"])
    elif "run_id" in values:
        lines = [*_describe_embedding(values), *_suggest_index(values)]
    elif values.get("action") in _SERVES:
        lines = [*_describe_index(values), *_suggest_lookups(values["index"])]
    else:
        lines = list(_list_values(values))
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _describe_embedding(values: Mapping[str, Any]) -> Lines:
    images, shards = values["images"], values["shards"]
    done = images["embedded"] + sum(images["failed"].values())
    took = f"{_show_time(values['seconds'])}, {values['images_per_s']:,.1f} a second"
    yield "images", f"{done:,} embedded in {took}" if done else "nothing new to embed"
    yield "rows", ", ".join(f"{rows:,} {status}" for status, rows in values["rows"].items()) or "0"
    failed = len(values["failed_objects"])
    lost = f"; {failed:,} objects could not be read, the report names them" if failed else ""
    new = f", {shards['embedded']:,} new shards" if shards["embedded"] else ""
    yield "output", f"{_show_uri(values['output'])}{new}{lost}"
    yield "report", _show_uri(f"{values['output']}/runs/{values['run_id']}.html")


def _describe_index(values: Mapping[str, Any]) -> Lines:
    rows = f"{values['rows']:,} rows, {values['kind']}"
    yield "index", f"{values['action']}: generation {values['generation']}, {rows}"
    if recall := values.get("measured", {}).get("recall"):
        yield "recall", f"{recall:.4f}"


def _describe_age(freshness: Mapping[str, Any]) -> Lines:
    if freshness["age_s"] is not None:
        yield "newest", f"{_show_time(freshness['age_s'])} old"


def _suggest_index(values: Mapping[str, Any]) -> Lines:
    output = values["output"]
    index = f"{output.rpartition('/')[0]}/index"
    words = ["--embeddings", _show_uri(output), "--index", _show_uri(index)]
    endpoint = values["settings"]["storage"]["endpoint_url"]
    words += ["--endpoint-url", endpoint] if endpoint else []
    yield "next", f"{name_program('index')} {shlex.join(words)}"


def _suggest_lookups(index: str) -> Lines:
    words = shlex.join(["--index", _show_uri(index)])
    yield "next", f"{name_program('search')} {words} --image query.jpg"
    yield "or", f"{name_program('serve')} {words} --local"


def _list_values(values: Mapping[str, Any]) -> Lines:
    for name, value in values.items():
        shown = value
        if isinstance(value, Mapping):
            shown = ", ".join(f"{key} {item}" for key, item in value.items())
        if isinstance(value, float):
            shown = f"{value:,.3g}"
        if name not in ("job", "version", "dry_run") and isinstance(shown, str | int | float):
            yield name, str(shown)


def _show_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _show_uri(uri: str) -> str:
    """Return a path below the working directory as it would be typed there; else as it is."""
    path = Path(uri)
    below = path.is_absolute() and path.is_relative_to(Path.cwd()) and path != Path.cwd()
    return str(path.relative_to(Path.cwd())) if below else uri
