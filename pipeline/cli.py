"""Command lines: a settings class becomes flags and TOML keys; one call, an exit code."""

import argparse
import ast
import inspect
import json
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, TypeVar, get_args, get_origin

from pipeline.errors import AbortError, SettingsError
from pipeline.log import configure_logging
from pipeline.settings import list_kinds, split_kind, suggest

Settings = TypeVar("Settings")

_OWN_FLAGS = {"--help", "--config"}
_EPILOG = "Flags override the file; --no-<flag> and a value of None unset what it sets."


class Report(Protocol):
    """The report of a job; printed as the last line of its standard output."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        ...


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of a command line.

    Attributes:
        name: Its name, with hyphens and without the two before it.
        path: Where its value goes: the names of fields, from the outermost settings class on.
        kind: Type of the field.
        help: The field's docstring.
        default: What the help shows as the default; empty for none.
    """

    name: str
    path: tuple[str, ...]
    kind: Any
    help: str
    default: str


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
    TOML table for each; a flag that several know goes to each. What a value may be is not decided
    here: the settings class reads text as it reads what Python gives it.

    Args:
        settings_class: A class made by ``@settings``; its fields are the flags and the TOML keys.
        argv: Arguments without the program's name; those of the process by default.
        prog: Name shown in the help text.

    Raises:
        SettingsError: An unknown flag or key (the message names the nearest), or a bad value.
        SystemExit: ``--help`` was asked for (0).
    """
    arguments = [_hyphenate(text) for text in (sys.argv[1:] if argv is None else argv)]
    flags = list(_list_flags(settings_class))
    _check_flags({text.split("=")[0] for text in arguments if text.startswith("--")}, flags)
    given = vars(_make_parser(settings_class, flags, prog=prog).parse_args(arguments))
    config_path = given.pop("config", None)
    values = _read_toml(Path(config_path), settings_class) if config_path else {}
    for name in _list_sections(settings_class):
        values.setdefault(name, {})
    for flag in flags:
        if flag.name in given:
            _put(values, flag.path, _unset(given[flag.name], flag.kind))
    return settings_class(**values)


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        values = values.setdefault(name, {})
    values[path[-1]] = value


def _unset(value: Any, kind: Any) -> Any:
    return None if value == "None" and split_kind(kind)[2] else value


def _list_sections(settings_class: type) -> list[str]:
    """Return the fields that are settings of their own, where a class has only such fields."""
    kinds = list_kinds(settings_class)
    return list(kinds) if all(map(is_dataclass, kinds.values())) else []


def _list_flags(settings_class: type, path: tuple[str, ...] = ()) -> Iterator[Flag]:
    """Yield the flags of a settings class and of those inside it; a name may come repeatedly."""
    kinds, texts = list_kinds(settings_class), _read_docstrings(settings_class)
    for item in fields(settings_class):
        kind = kinds[item.name]
        if is_dataclass(kind):
            yield from _list_flags(kind, (*path, item.name))  # type: ignore[arg-type]
            continue
        default = "required" if item.default is MISSING else f"default: {_show(item.default)}"
        name = item.name.replace("_", "-")
        shown = "" if item.default in (None, ()) else default
        yield Flag(name, (*path, item.name), kind, texts.get(item.name, ""), shown)


def _show(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _read_docstrings(settings_class: type) -> dict[str, str]:
    """Return the strings below the fields of a class, which Python itself does not keep."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(settings_class))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        before.target.id: inspect.cleandoc(node.value.value)
        for before, node in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
    }


class _Parser(argparse.ArgumentParser):
    """An argument parser that refuses as the settings do."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; --help lists all flags")


class _Store(argparse.Action):
    """Keeps a flag's value; given again, a list grows, and of all else the last one counts."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Book one occurrence of the flag."""
        values = self.const if values in (None, []) and self.nargs != "*" else values
        before = getattr(namespace, self.dest, None)
        if self.nargs == "*" and before is not None:
            values = [*before, *values]
        elif before is not None and before != values:
            flag = f"--{self.dest}"
            print(
                f"note: {flag} is given twice; {values!r} counts, not {before!r}", file=sys.stderr
            )
        setattr(namespace, self.dest, values)


def _make_parser(settings_class: type, flags: Sequence[Flag], *, prog: str) -> _Parser:
    needed = " ".join(f"--{flag.name} …" for flag in flags if flag.default == "required")
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {needed} [--config FILE] [flags]",
        description=inspect.getdoc(settings_class),
        epilog=_EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_make_formatter,
    )
    parser.add_argument(
        "--config", action=_Store, metavar="FILE", help="TOML file to read settings from"
    )
    groups: dict[tuple[str, ...], Any] = {}
    for name in dict.fromkeys(flag.name for flag in flags):
        same = [flag for flag in flags if flag.name == name]
        title = " and ".join(dict.fromkeys(flag.path[0] for flag in same if flag.path[1:]))
        group = groups.setdefault((title,), None) or parser.add_argument_group(title or "settings")
        groups[title,] = group
        _add_flag(group, same[0])
    return parser


def _make_formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=32, width=100)


def _add_flag(group: Any, flag: Flag) -> None:
    kind, is_list, _ = split_kind(flag.kind)
    text = " ".join([flag.help, f"({flag.default})" if flag.default else ""]).replace("%", "%%")
    words = {int: "NUMBER", float: "NUMBER", bool: "yes|no"}
    metavar = words.get(kind, "TEXT")
    if get_origin(kind) is Literal:
        metavar = "{" + ",".join(map(str, get_args(kind))) + "}"
    add = partial(group.add_argument, dest=flag.name, action=_Store)
    if kind is bool:
        add(f"--{flag.name}", nargs="?", const=True, metavar=metavar, help=text)
        add(f"--no-{flag.name}", nargs=0, const=False, help=argparse.SUPPRESS)
        return
    add(f"--{flag.name}", nargs="*" if is_list else None, metavar=metavar, help=text)


def _hyphenate(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, *value = argument.split("=", 1)
    return "=".join([name.replace("_", "-"), *value])


def _check_flags(given: set[str], flags: Sequence[Flag]) -> None:
    known = {f"--{flag.name}" for flag in flags} | _OWN_FLAGS
    known |= {f"--no-{flag.name}" for flag in flags if flag.kind is bool}
    for flag in sorted(given - known - {"--"}):
        raise SettingsError(f"unknown flag {flag}{suggest(flag, known)}; --help lists them all")


def _read_toml(path: Path, settings_class: type) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"cannot read --config {path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise SettingsError(f"--config {path} is not TOML: {error}") from error
    return _name_fields(values, settings_class, where=str(path))


def _name_fields(values: Mapping[str, Any], settings_class: type, *, where: str) -> dict[str, Any]:
    """Return a table with the names of fields as keys, and so with the tables inside it."""
    kinds = list_kinds(settings_class)
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in kinds:
            what = "table" if isinstance(value, dict) else "key"
            raise SettingsError(f"unknown {what} {key!r} in {where}{suggest(name, kinds)}")
        if is_dataclass(kinds[name]):
            if not isinstance(value, dict):
                raise SettingsError(f"{key!r} in {where} is a table: write [{key}]")
            value = _name_fields(value, kinds[name], where=f"[{key}] of {where}")
        named[name] = value
    return named
