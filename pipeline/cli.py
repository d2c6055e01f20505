"""Command lines: a settings class becomes flags and TOML keys; one call, an exit code."""

import argparse
import ast
import inspect
import json
import signal
import sys
import textwrap
import threading
import tomllib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, NoReturn, Protocol, TypeVar, get_args, get_origin

from pipeline import __version__
from pipeline.errors import AbortError, SettingsError
from pipeline.log import configure_logging
from pipeline.program import name_program
from pipeline.settings import list_kinds, split_kind, suggest
from pipeline.summary import summarise

Settings = TypeVar("Settings")

_EPILOG = "Flags override the file; --no-<flag> and a value of None unset what it sets."


_REQUIRED = "required"


class Report(Protocol):
    """The report of a job; printed when it ends."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        ...


@dataclass(frozen=True, slots=True)
class Command(Generic[Settings]):
    """What a command line asks for.

    Attributes:
        settings: The settings of the job.
        check_only: Say whether they are sound, and do nothing else.
        as_json: Print the report as JSON on a terminal too.
    """

    settings: Settings
    check_only: bool
    as_json: bool


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
    job: str,
    settings_class: type[Settings],
    action: Callable[[Settings], Report | None],
    argv: Sequence[str] | None = None,
    *,
    check: Callable[[Settings], object] = lambda _: None,
) -> int:
    """Parse the settings, call ``action``, print its report, if any, as a summary or JSON.

    Args:
        job: The job's name, e.g. ``"embed"``.
        settings_class: What the flags are read into.
        action: Does the work.
        argv: Arguments without the program's name; those of the process by default.
        check: What ``--check`` does beyond reading the settings; raises what is wrong with them.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad usage or settings, 3 stopped by ``--max-failures``,
        130 interrupted, 143 told to end.
    """
    as_json = False
    try:
        command = parse_command(settings_class, argv, prog=name_program(job))
        as_json = command.as_json
        if command.check_only:
            check(command.settings)
            print("the settings are sound; nothing was started")
            return 0
        configure_logging(getattr(command.settings, "log_level", "info"))
        with _end_when_told():
            report = action(command.settings)
    except AbortError as error:
        show_report(error.report, as_json=as_json)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print("stopped; the same command goes on from the committed shards", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, _ToldToEnd) else signal.SIGINT)
    show_report(report, as_json=as_json)
    return 0


class _ToldToEnd(KeyboardInterrupt):
    """SIGTERM came; everything ends as after Ctrl-C."""


@contextmanager
def _end_when_told() -> Iterator[None]:
    """Raise ``_ToldToEnd`` in the block on SIGTERM; a second one ends the process at once."""

    def end(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _ToldToEnd

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show_report(report: Any, *, as_json: bool) -> None:
    """Print ``report`` on standard output: for people on a terminal, else one line of JSON."""
    if report is None:
        return
    sys.stderr.flush()
    if sys.stdout.isatty() and not as_json:
        print(summarise(report.to_dict()), flush=True)
    else:
        print(json.dumps(report.to_dict(), ensure_ascii=False), flush=True)


def parse_settings(
    settings_class: type[Settings], argv: Sequence[str] | None = None, *, prog: str = "job"
) -> Settings:
    """Return the settings of ``parse_command``."""
    return parse_command(settings_class, argv, prog=prog).settings


def parse_command(
    settings_class: type[Settings], argv: Sequence[str] | None = None, *, prog: str
) -> Command[Settings]:
    """Build settings from flags and, with ``--config FILE``, a TOML file that flags override.

    A class made of other jobs' settings (``NightlyConfig``) takes the flags of all of them, and a
    TOML table for each; a flag that several know goes to each. What a value may be is not decided
    here: the settings class reads text as it reads what Python gives it.

    Args:
        settings_class: A class made by ``@settings``; its fields are the flags and the TOML keys.
        argv: Arguments without the program's name; those of the process by default.
        prog: What to type for the program, shown in the help text.

    Raises:
        SettingsError: An unknown flag or key (the message names the nearest), or a bad value.
        SystemExit: ``--help``, ``--version`` or a completion was asked for (0).
    """
    arguments = [_hyphenate(text) for text in (sys.argv[1:] if argv is None else argv)]
    flags = list(_list_flags(settings_class))
    parser = _make_parser(settings_class, flags, prog=prog)
    _check_flags({text.split("=")[0] for text in arguments if text.startswith("--")}, parser)
    given = vars(parser.parse_args(arguments))
    if "print-completion" in given:
        _print_completion(parser, given["print-completion"])
    values = _read_toml(Path(given["config"]), settings_class) if "config" in given else {}
    for name in _list_sections(settings_class):
        values.setdefault(name, {})
    for flag in flags:
        if flag.name in given:
            _put(values, flag.path, _unset(given[flag.name], flag.kind))
    _check_required(flags, values)
    made = settings_class(**values)
    return Command(made, check_only="check" in given, as_json="json" in given)


def _print_completion(parser: argparse.ArgumentParser, shell: str) -> NoReturn:
    import shtab  # for this alone

    parser.prog = parser.prog.split()[-1]
    print(shtab.complete(parser, shell=shell))
    raise SystemExit(0)


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
        default = _REQUIRED if item.default is MISSING else f"default: {_show(item.default)}"
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
    needed = " ".join(f"--{flag.name} …" for flag in flags if flag.default == _REQUIRED)
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {needed} [--config FILE] [flags]",
        description=inspect.getdoc(settings_class),
        epilog=_EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_make_formatter,
    )
    _add_own_flags(parser, {flag.name for flag in flags})
    groups: dict[tuple[str, ...], Any] = {}
    for name in dict.fromkeys(flag.name for flag in flags):
        same = [flag for flag in flags if flag.name == name]
        title = " and ".join(dict.fromkeys(flag.path[0] for flag in same if flag.path[1:]))
        group = groups.setdefault((title,), None) or parser.add_argument_group(title or "settings")
        groups[title,] = group
        _add_flag(group, same[0])
    return parser


def _add_own_flags(parser: argparse.ArgumentParser, taken: Container[str]) -> None:
    add = parser.add_argument
    add("--config", action=_Store, metavar="FILE", help="TOML file to read settings from")
    add("--check", action="store_true", help="say whether the settings are sound; start nothing")
    if "json" not in taken:
        text = "print the report as JSON on a terminal too, as it is wherever output is redirected"
        add("--json", action="store_true", help=text)
    shells = ["bash", "zsh", "tcsh"]
    text = "print a script that completes this command's flags in a shell"
    add("--print-completion", dest="print-completion", choices=shells, help=text)
    add("--version", action="version", version=f"image-embedding-pipeline {__version__}")


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


def _check_flags(given: set[str], parser: argparse.ArgumentParser) -> None:
    known = {name for action in parser._actions for name in action.option_strings}
    for flag in sorted(given - known - {"--"}):
        raise SettingsError(f"unknown flag {flag}{suggest(flag, known)}; --help lists them all")


def _check_required(flags: Sequence[Flag], values: Mapping[str, Any]) -> None:
    """Refuse settings that lack what has no default, naming all of it.

    Raises:
        SettingsError: Something is lacking.
    """
    lacking = dict.fromkeys(
        f"--{flag.name}"
        for flag in flags
        if flag.default == _REQUIRED and not _holds(values, flag.path)
    )
    if lacking:
        raise SettingsError(
            f"not given: {', '.join(lacking)}; pass them as flags, or write them into a file for "
            "--config"
        )


def _holds(values: Mapping[str, Any], path: Sequence[str]) -> bool:
    for name in path[:-1]:
        values = values.get(name, {})
    return path[-1] in values


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
