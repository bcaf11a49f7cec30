"""The errors that a user can cause: what was asked, what was found, and the nearest valid names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """The valid names closest to `name`, best first; all of them if there are few and none is close."""
    names = list(dict.fromkeys(valid))
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    return close or (sorted(names) if len(names) <= 12 else [])


LONGEST = 20_000  # characters of a part of a message; what a broken file holds may be any length


def _bounded(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} ... and {len(text) - LONGEST} more characters"


class OnebaseError(Exception):
    """Base of every error that onebase raises on purpose.

    `asked` says what was asked for, `found` what was found instead, `valid` lists names that would have
    worked, `hint` says what to try. The command line prints the message alone and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, asked: str, found: str = "", valid: Iterable[str] = (), hint: str = "") -> None:
        asked, found, hint = _bounded(asked), _bounded(found), _bounded(hint)
        self.asked, self.found, self.valid, self.hint = asked, found, list(valid), hint
        parts = [asked if not found else f"{asked}: {found}"]
        if self.valid:
            parts.append("  nearest valid: " + ", ".join(self.valid))
        if hint:
            parts.append("  " + hint)
        super().__init__("\n".join(parts))


class ConfigError(OnebaseError, ValueError):
    """An option is unknown, out of range, or contradicts another."""


class MissingFile(OnebaseError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class DataError(OnebaseError, ValueError):
    """The training data cannot be read, mapped or used as it is."""


class GateError(DataError):
    """A check on the encoded data failed; `--allow NAME` overrides it by name."""


class FormatError(OnebaseError, ValueError):
    """An adapter or checkpoint file is broken, incomplete, or not what it says."""


class TargetError(OnebaseError, LookupError):
    """A target module or pattern matches nothing, or does not fit the model."""


class BaseError(OnebaseError, RuntimeError):
    """The base model cannot be found, fetched, converted or used."""


class BaseMismatch(OnebaseError, ValueError):
    """An adapter was made for another base."""


class AdapterNameError(OnebaseError, LookupError):
    """No adapter of that name is injected, or none was chosen."""


class OutputExists(OnebaseError, FileExistsError):
    """The output folder already holds a run; it is never overwritten in silence."""


class OutputError(OnebaseError, OSError):
    """The output cannot be written (read-only, disk full)."""


class Diverged(OnebaseError, ArithmeticError):
    """The loss became NaN or infinite."""

    exit_code = 3
