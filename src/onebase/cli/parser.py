"""Flags and YAML files to flat options, made from a command's config dataclass by jsonargparse."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

from jsonargparse import ActionYesNo, ArgumentParser

from onebase.errors import ConfigError, nearest
from onebase.options import flat_options


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


class _Parser(ArgumentParser):
    """jsonargparse's parser, with our errors instead of a usage dump."""

    known: tuple[str, ...] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = str(message).strip()
        unknown = re.search(
            r"(?:Option '|unrecognized arguments?: *(?:--)?|Key ')([\w-]+)", text, re.IGNORECASE
        )
        hint = f"all options: {self.prog} --help"
        if unknown:
            name = unknown[1].replace("-", "_")
            near = [option.replace("_", "-") for option in nearest(name, self.known)]
            raise ConfigError(f"unknown option {unknown[1]}", "no such option", near, hint) from ex
        raise ConfigError(self.prog, re.sub(r"\s*\n\s*", " ", text), hint=hint) from ex


def parse(name: str, command: HasOptions, arguments: Sequence[str]) -> dict[str, Any] | None:
    """The options that were given, by flag or in a file; None where --help or --print_config was served.

    Flags go over the file, the file over the defaults. Raises ConfigError for an unknown or unusable option.
    """
    parser = _parser(name, command)
    try:
        given = parser.parse_args([_dashed(argument) for argument in arguments])
    except SystemExit:
        return None
    return _without_defaults(given.as_dict(), command)


def _without_defaults(values: Mapping[str, Any], command: HasOptions) -> dict[str, Any]:
    """Only what differs from the defaults, so that a resumed run may take the rest from its folder."""
    known = flat_options(command.options)
    return {name: values[name] for name in known if values[name] != known[name][1]}


def _dashed(argument: str) -> str:
    """`--split_by=x` as `--split-by=x`: either spelling works."""
    flag, equals, value = argument.partition("=")
    if not flag.startswith("--"):
        return argument
    dashed = "--" + flag[2:].replace("_", "-")
    return ("--print_config" if dashed == "--print-config" else dashed) + equals + value


def _parser(name: str, command: HasOptions) -> _Parser:
    parser = _Parser(
        prog=f"onebase {name}",
        description=f"{command.help[0].upper()}{command.help[1:]}. Example: {command.example}",
        usage=f"onebase {name} [{command.positional.upper()}] [options]" if command.positional else None,
    )
    parser.usage = f"onebase {name} {command.positional.upper() + ' ' if command.positional else ''}[options]"
    parser.known = tuple(flat_options(command.options))
    parser.add_argument(
        "--config", action="config", help="YAML file of options, named as the flags with _ for -"
    )
    for option, (hint, default, text) in flat_options(command.options).items():
        if option == command.positional:
            parser.add_argument(option, type=hint, help=text)
        elif hint is bool:
            flag = f"--{option.replace('_', '-')}"
            parser.add_argument(flag, action=ActionYesNo(no_prefix="no-"), default=default, help=text)
        else:
            parser.add_argument(f"--{option.replace('_', '-')}", type=hint, default=default, help=text)
    return parser
