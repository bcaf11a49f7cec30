"""Names and patterns: PEFT's rules exactly, for very many keys too, and an end to what would never end."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.adapters.patterns import MOST, ends, first_key, keys_of, matches, named
from onebase.adapters.targets import name_matches, pattern_value
from onebase.errors import ConfigError
from onebase.options import LONGEST, require_pattern

PATHS = st.lists(st.sampled_from(["a", "b", "ab", "1", "11", "q_proj"]), min_size=1, max_size=4).map(".".join)
KEYS = st.one_of(
    PATHS,
    PATHS.map(lambda path: "^" + re.escape(path)),
    PATHS.map(re.escape),
    PATHS.map(lambda path: "^" + path),
    PATHS.map(lambda path: path.replace("1", r"\d+")),
    st.sampled_from(["a.", ".", "(a|b)", "q.proj", ".*b", "a-b", "", r"(.)\.\3", "a+$"]),
)


def peft_first(keys, path):
    """The rule as PEFT writes it (get_pattern_key)."""
    return next((n for n, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", path)), None)


@settings(max_examples=300)
@given(st.lists(KEYS, max_size=6), PATHS)
def test_the_first_key_is_the_one_that_peft_finds(keys, path):
    assert first_key(keys_of(tuple(keys)), path) == peft_first(keys, path)


@settings(max_examples=100)
@given(st.lists(PATHS, max_size=5), PATHS)
def test_names_are_ends_of_paths(names, path):
    assert named(names, path) == any(name_matches(name, path) for name in names)


def test_ends():
    assert ends("a.b.c") == ["a.b.c", "b.c", "c"]


def test_a_value_goes_with_its_key_under_any_spelling():
    assert pattern_value({"x": 1, "a.q": 2, "q": 3}, ["m.a.q", "m.a.q.weight"], 9) == 2
    assert pattern_value({"weight": 4, "q": 3}, ["m.q", "m.q.weight"], 9) == 4
    assert pattern_value({"v": 4}, ["m.q"], 9) == 9
    assert pattern_value({}, ["m.q"], 9) == 9


PATH = "model." + "ab" * 10 + "a" * 60 + "!"


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r".*(a+)+$", r"(.*a){30}", r"([ab]*[bc]*)*\1d", r".*(\w+\w+)+c"]
)
def test_what_python_would_never_finish_does_not_match(pattern):
    assert not any(matches(pattern, f"{PATH}{number}!") for number in range(50))
    assert first_key(keys_of((pattern, "x")), PATH) is None


def test_a_pattern_that_does_not_end_is_refused_for_all_paths_together(monkeypatch):
    monkeypatch.setattr("onebase.adapters.patterns.SECONDS", 0.2)
    pattern = r".*(a|a)+$"
    for number in range(100):  # were each given its time, this would take 20 seconds
        with pytest.raises(ConfigError, match=r"(?s)more than 0.2 s on 'model.*repetitions inside"):
            matches(pattern, f"{PATH}{number}!")
    with pytest.raises(ConfigError, match="more than"):
        first_key(keys_of((pattern, "x")), PATH)


def test_what_only_fails_inside_the_whole_expression():
    with pytest.raises(ConfigError, match="no regular expression"):
        keys_of((r"(a\2)",))


def test_very_many_keys_are_quick_and_very_many_expressions_refused():
    keys = [f"^model\\.layers\\.{n}\\.q_proj" for n in range(20_000)]
    keys += [f"model.layers.{n}.v_proj" for n in range(20_000)]
    known = keys_of(tuple(keys))
    assert known.others == []
    assert first_key(known, "model.layers.19999.q_proj") == 19_999
    assert first_key(known, "x.model.layers.7.v_proj") == 20_007
    assert first_key(known, "x.model.layers.7.q_proj") is None
    with pytest.raises(ConfigError, match=f"at most {MOST}"):
        keys_of(tuple(f"x{{{n}}}" for n in range(MOST + 1)))


def test_a_pattern_has_a_length():
    with pytest.raises(ConfigError, match=f"{LONGEST + 1} characters"):
        require_pattern("x" * (LONGEST + 1))
