"""The shape of an error message, and which standard error each one is."""

from __future__ import annotations

import pytest

from onebase import errors
from onebase.errors import OnebaseError, nearest


def test_message_is_asked_found_nearest_hint():
    error = OnebaseError("module q_prj", "matches nothing", ["q_proj", "o_proj"], "see `onebase inspect`")
    assert str(error).splitlines() == [
        "module q_prj: matches nothing",
        "  nearest valid: q_proj, o_proj",
        "  see `onebase inspect`",
    ]
    assert (error.asked, error.found, error.valid) == (
        "module q_prj",
        "matches nothing",
        ["q_proj", "o_proj"],
    )
    assert str(OnebaseError("disk full")) == "disk full"


@pytest.mark.parametrize(
    ("name", "standard", "code"),
    [
        ("ConfigError", ValueError, 2),
        ("MissingFile", FileNotFoundError, 2),
        ("GateError", errors.DataError, 2),
        ("FormatError", ValueError, 2),
        ("TargetError", LookupError, 2),
        ("BaseError", RuntimeError, 2),
        ("BaseMismatch", ValueError, 2),
        ("AdapterNameError", LookupError, 2),
        ("OutputExists", FileExistsError, 2),
        ("OutputError", OSError, 2),
        ("Diverged", ArithmeticError, 3),
    ],
)
def test_each_error_is_also_the_standard_one(name: str, standard: type, code: int):
    kind = getattr(errors, name)
    assert issubclass(kind, OnebaseError)
    assert issubclass(kind, standard)
    assert kind.exit_code == code
    assert str(kind("a", "b")) == "a: b"


def test_nearest_puts_the_closest_first():
    assert nearest("q_prj", ["v_proj", "q_proj", "lm_head"])[0] == "q_proj"


def test_nearest_lists_a_short_table_where_nothing_is_close_but_not_a_long_one():
    assert nearest("zzz", ["b", "a", "b"]) == ["a", "b"]
    assert nearest("zzz", [f"name{n}" for n in range(13)]) == []
