"""Flags and YAML files to flat options; what a command takes is read from its config dataclass.

Only options that were given come out, whatever their value: a resumed run takes the rest from its folder.
Types are checked where the config is built, alike for flags, YAML and Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, get_args, get_origin

import yaml

from onebase.config import build, flatten
from onebase.errors import ConfigError, MissingFile, nearest
from onebase.grid import Values
from onebase.options import flat_options

METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", str | list[str]: "NAMES", Values: "VALUES"}
SWITCH = {True: "on", False: "off"}


class HasOptions(Protocol):
    """What the parser needs of a command."""

    @property
    def options(self) -> type: ...
    @property
    def help(self) -> str: ...
    @property
    def example(self) -> str: ...
    @property
    def positional(self) -> str: ...


class _Parser(argparse.ArgumentParser):
    """argparse's parser, with our error instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, hint=f"all options: {self.prog} --help")


def parse(name: str, command: HasOptions, arguments: Sequence[str]) -> dict[str, Any] | None:
    """The options that were given, by flag or in a file; None where --help or --print_config was served.

    Flags go over files, a later file over an earlier one. Raises ConfigError for an unknown option or a value of
    the wrong type, MissingFile for a --config that is not there.
    """
    parser = _parser(name, command)
    try:
        given, unknown = parser.parse_known_args([_dashed(argument) for argument in arguments])
    except SystemExit:  # --help
        return None
    if unknown:
        raise _unknown(unknown, name, command)
    flags = vars(given)
    options: dict[str, Any] = {}
    for path in flags.pop("config"):
        options |= _read_yaml(Path(path).expanduser(), command)
    printing = flags.pop("print_config")
    config = build(command.options, options | flags)
    if printing:
        print(yaml.safe_dump(flatten(config), sort_keys=False, allow_unicode=True), end="")
        return None
    return options | flags


def _dashed(argument: str) -> str:
    """`--split_by=x` as `--split-by=x`: either spelling works."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") and " " not in flag else argument


def _unknown(unknown: Sequence[str], name: str, command: HasOptions) -> ConfigError:
    hint = f"all options: onebase {name} --help"
    flag = next((argument for argument in unknown if argument.startswith("-")), None)
    if flag is None:
        return ConfigError(f"unexpected {unknown[0]!r}", "it belongs to no option", hint=hint)
    flag = flag.partition("=")[0]
    near = nearest(flag.lstrip("-").replace("-", "_"), [*flat_options(command.options), "config"])
    return ConfigError(
        f"unknown option {flag}", "no such option", ["--" + n.replace("_", "-") for n in near], hint
    )


def _read_yaml(path: Path, command: HasOptions) -> dict[str, Any]:
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise MissingFile(f"config {path}", "no such file", nearest(path.name, beside))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"config {path}", f"not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}", "must hold lines such as `rank: 8`")
    options = {str(key).replace("-", "_"): value for key, value in values.items()}
    for name in options.keys() - flat_options(command.options).keys():
        near = nearest(name, flat_options(command.options))
        raise ConfigError(f"unknown option {name} in {path}", "no such option", near)
    return options


def _parser(name: str, command: HasOptions) -> _Parser:
    positional = command.positional
    parser = _Parser(
        prog=f"onebase {name}",
        usage=" ".join(filter(None, ["onebase", name, positional.upper(), "[options]"])),
        description=f"{command.help[0].upper()}{command.help[1:]}.",
        epilog=f"example: {command.example}",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    known = flat_options(command.options)
    if positional:
        many = known[positional][0] == str | list[str]
        parser.add_argument(positional, nargs="*" if many else "?", help=known[positional][2])
    for title, names in _groups(command.options):
        group = parser.add_argument_group(title)
        for option in names:
            if option != positional:
                _add(group, option, *known[option])
    files = parser.add_argument_group("options from a file")
    text = "YAML file of options, named as the flags with _ for -; flags go over it"
    files.add_argument("--config", action="append", default=[], metavar="FILE", help=text)
    text = "print all options as YAML that --config reads, and stop"
    files.add_argument("--print-config", action="store_true", default=False, help=text)
    return parser


def _groups(options: type) -> Iterator[tuple[str, list[str]]]:
    """(title, option names): the command's own options, then those of each config inside it."""
    fields = {item.name: getattr(options(), item.name) for item in dataclasses.fields(options)}
    yield "the command", [name for name, value in fields.items() if not dataclasses.is_dataclass(value)]
    for value in fields.values():
        if dataclasses.is_dataclass(value):
            title = (type(value).__doc__ or "").partition(".")[0]
            yield title[0].lower() + title[1:], list(flat_options(type(value)))


def _add(group: Any, option: str, hint: Any, default: Any, text: str) -> None:
    flag, shown = f"--{option.replace('_', '-')}", text.replace("%", "%%")
    if hint is bool:
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, help=f"{shown} (default: {SWITCH[default]})")
    else:
        metavar = (
            "|".join(get_args(hint)) if get_origin(hint) is Literal else METAVARS.get(hint, "NAME=VALUE")
        )
        group.add_argument(flag, metavar=metavar, help=f"{shown} (default: {_shown(default)})")


def _shown(default: Any) -> str:
    if default in ("", [], {}):
        return "none"
    return json.dumps(default) if isinstance(default, str) and not default.strip() else str(default)
