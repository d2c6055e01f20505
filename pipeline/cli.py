"""DOOR to the command-line library: a settings class, one call, an exit code."""

import difflib
import json
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints

import tyro

from pipeline.errors import AbortError, SettingsError
from pipeline.log import configure_logging

Settings = TypeVar("Settings")


class Report(Protocol):
    """The report of a job; printed as the last line of its standard output."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        ...


def run_job(
    prog: str,
    settings_class: type[Settings],
    action: Callable[[Settings], Report | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the settings, call ``action``, print its report, if any, as one JSON line.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad usage or settings, 3 stopped by ``--max-failures``,
        130 interrupted.
    """
    try:
        settings = parse_settings(settings_class, argv, prog=prog)
        configure_logging(getattr(settings, "log_level", "info"))
        report = action(settings)
    except AbortError as error:
        print_report(error.report)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the committed shards", file=sys.stderr)
        return 130
    print_report(report)
    return 0


def print_report(report: Any) -> None:
    """Print ``report`` as one line of JSON on standard output; nothing for None."""
    if report is not None:
        sys.stderr.flush()
        print(json.dumps(report.to_dict(), ensure_ascii=False), flush=True)


def parse_settings(
    settings_class: type[Settings], argv: Sequence[str] | None = None, *, prog: str = "job"
) -> Settings:
    """Build settings from flags and, with ``--config FILE``, a TOML file that flags override.

    A class made of other jobs' settings (``NightlyConfig``) takes the flags of all of them, and a
    TOML table for each; a flag that several know goes to each.

    Args:
        settings_class: A frozen dataclass; its fields are the flags and the TOML keys.
        argv: Arguments without the program's name; those of the process by default.
        prog: Name shown in the help text.

    Raises:
        SettingsError: An unknown flag or key (the message names the nearest), or a bad value.
        SystemExit: ``--help`` was asked for (0), or the flags do not parse (2).
    """
    arguments = [_hyphenate(text) for text in (sys.argv[1:] if argv is None else argv)]
    arguments, config_path = _take_config(arguments)
    values = {} if config_path is None else _read_toml(config_path)
    flags = dict(_list_flags(settings_class))
    _check_flags({text.split("=")[0] for text in arguments if text.startswith("--")}, flags)
    sections = _list_sections(settings_class)
    if not sections:
        return _parse_one(settings_class, arguments, values, where=str(config_path), prog=prog)
    for key in set(values) - set(sections):
        raise SettingsError(f"unknown table {key!r} in {config_path}{_suggest(key, set(sections))}")
    parsed: dict[str, Any] = {
        name: _parse_one(
            section,
            _select_flags(arguments, section),
            values.get(name, {}),
            where=f"[{name}] of {config_path}",
            prog=f"{prog} ({name})",
        )
        for name, section in sections.items()
    }
    return settings_class(**parsed)


def _list_sections(settings_class: type) -> dict[str, type]:
    """Return the fields that are settings of their own, where a class has only such fields."""
    hints = get_type_hints(settings_class)
    sections = {item.name: hints[item.name] for item in fields(settings_class)}
    return sections if all(map(is_dataclass, sections.values())) else {}


def _select_flags(arguments: Sequence[str], settings_class: type) -> list[str]:
    """Return the arguments whose flags the class has, with their values."""
    names = {name for name, _ in _list_flags(settings_class)} | {"help"}
    selected: list[str] = []
    wanted = False
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.removeprefix("--").split("=")[0]
            wanted = flag in names or flag.removeprefix("no-") in names
        if wanted:
            selected.append(argument)
    return selected


def _parse_one(
    settings_class: type[Settings],
    arguments: list[str],
    values: Mapping[str, Any],
    *,
    where: str,
    prog: str,
) -> Settings:
    given = {text.split("=")[0] for text in arguments if text.startswith("--")}
    tokens = [
        token
        for name, value in _flatten(values, settings_class, where=where).items()
        if not given & {f"--{name}", f"--no-{name}"}
        for token in _to_tokens(name, value)
    ]
    description = (settings_class.__doc__ or "") + "\n\n--config FILE reads settings from TOML."
    return tyro.cli(
        settings_class,
        args=arguments + tokens,
        prog=prog,
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _hyphenate(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, *value = argument.split("=", 1)
    return "=".join([name.replace("_", "-"), *value])


def _list_flags(settings_class: type) -> Iterator[tuple[str, type]]:
    hints = get_type_hints(settings_class)
    for item in fields(settings_class):
        if is_dataclass(hints[item.name]):
            yield from _list_flags(hints[item.name])
        else:
            yield item.name.replace("_", "-"), hints[item.name]


def _check_flags(given: set[str], flags: Mapping[str, type]) -> None:
    known = {f"--{name}" for name in flags} | {"--help", "--config"}
    known |= {f"--no-{name}" for name, kind in flags.items() if kind is bool}
    for flag in sorted(given - known - {"--"}):
        raise SettingsError(f"unknown flag {flag}{_suggest(flag, known)}; --help lists them all")


def _suggest(word: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    for index, argument in enumerate(arguments):
        if argument == "--config":
            if index + 1 == len(arguments):
                raise SettingsError("--config needs the path of a TOML file")
            return arguments[:index] + arguments[index + 2 :], Path(arguments[index + 1])
        if argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
            return arguments[:index] + arguments[index + 1 :], path
    return arguments, None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"cannot read --config {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"--config {path} is not TOML: {error}") from error


def _flatten(values: Mapping[str, Any], settings_class: type, *, where: str) -> dict[str, Any]:
    hints = get_type_hints(settings_class)
    known = {item.name for item in fields(settings_class)}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise SettingsError(f"unknown key {key!r} in {where}{_suggest(name, known)}")
        if is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise SettingsError(f"{key!r} in {where} is a table: write [{key}]")
            flat |= _flatten(value, hints[name], where=f"[{key}] of {where}")
        else:
            flat[name.replace("_", "-")] = value
    return flat


def _to_tokens(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]
