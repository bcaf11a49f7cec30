"""Options: unknown ones, wrong ones, contradictions, and the way there and back."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.config import (
    GATES,
    DataConfig,
    LoraConfig,
    OptimConfig,
    TrainConfig,
    build,
    flatten,
    parse_layers,
)
from onebase.errors import ConfigError
from onebase.options import flat_options

NAMES = st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=3, unique=True)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.integers(1, 512),
        "alpha": st.floats(0.25, 512),
        "dropout": st.floats(0, 0.99),
        "target_modules": NAMES | st.just("all-linear") | st.just(r"re:.*\.(q|v)_proj"),
        "exclude_modules": NAMES,
        "layers": st.sampled_from(["", "0", "0-5,8"]),
        "rank_pattern": st.dictionaries(st.sampled_from(["q_proj", "down_proj"]), st.integers(1, 64)),
        "alpha_pattern": st.dictionaries(st.sampled_from(["q_proj", "down_proj"]), st.floats(1, 64)),
        "rslora": st.booleans(),
        "allow": st.lists(st.sampled_from(sorted(GATES)), unique=True),
        "map": st.dictionaries(st.sampled_from(["prompt", "completion"]), st.just("column")),
        "epochs": st.floats(0.1, 100),
        "lr": st.floats(1e-8, 1),
        "log": st.lists(st.sampled_from(["tensorboard", "wandb"]), unique=True),
        "schedule": st.sampled_from(["linear", "cosine", "constant"]),
        "seed": st.integers(0, 2**31),
    },
)


@given(OPTIONS)
def test_flatten_and_build_are_inverse_even_through_json(options: dict):
    config = build(TrainConfig, options)
    assert build(TrainConfig, flatten(config)) == config
    assert build(TrainConfig, json.loads(json.dumps(flatten(config)))) == config
    flat = flatten(config)
    for name, value in options.items():
        assert flat[name] == value


def test_defaults_round_trip_and_cover_every_option():
    assert build(TrainConfig, {}) == TrainConfig()
    assert flatten(TrainConfig()).keys() == flat_options(TrainConfig).keys()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("rnak", "rank"), ("learning_rate", "lr"), ("lora_r", "lora_plus"), ("epoch", "epochs")],
)
def test_unknown_option_gives_nearest_names(typed: str, meant: str):
    with pytest.raises(ConfigError, match=f"unknown option {typed}") as caught:
        build(TrainConfig, {typed: 1})
    if meant != "lr":  # a synonym, not a misspelling: no string distance finds it
        assert meant in caught.value.valid


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TrainConfig, {"resume": True, "overwrite": True}),
        (DataConfig, {"validation": "v.jsonl", "split_by": "prompt"}),
    ],
)
def test_contradictions_name_both_options(kind: type, options: dict):
    with pytest.raises(ConfigError, match="contradict") as caught:
        kind(**options)
    assert all(name in str(caught.value) for name in options)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (LoraConfig, "rank", 0),
        (LoraConfig, "alpha", 0.0),
        (LoraConfig, "alpha", float("nan")),
        (LoraConfig, "dropout", 1.0),
        (LoraConfig, "init", "zeros"),
        (LoraConfig, "target_modules", ""),
        (LoraConfig, "rank_pattern", "q_proj"),
        (LoraConfig, "rank_pattern", "q_proj=two"),
        (LoraConfig, "rank_pattern", {"q_proj": 0}),
        (LoraConfig, "layers", "5-2"),
        (LoraConfig, "layers", "a"),
        (DataConfig, "holdout", -0.1),
        (DataConfig, "max_length", 1),
        (DataConfig, "loss_on", "prompt"),
        (DataConfig, "overlong", "cut"),
        (DataConfig, "allow", "no-such-gate"),
        (OptimConfig, "lr", -1e-3),
        (OptimConfig, "clip", -1),
        (OptimConfig, "keep", 0),
        (OptimConfig, "beta2", 1.0),
        (OptimConfig, "schedule", "cos"),
        (TrainConfig, "dtype", "float16"),
        (TrainConfig, "samples", -1),
    ],
)
def test_a_value_out_of_range_is_named(kind: type, name: str, value: object):
    with pytest.raises(ConfigError, match=name):
        kind(**{name: value})


def test_strings_as_typed_equal_the_structured_values():
    typed = LoraConfig(
        target_modules="q_proj, v_proj", rank_pattern="q_proj=4,down_proj=32", alpha_pattern="a=8"
    )
    assert typed == LoraConfig(
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 4, "down_proj": 32},
        alpha_pattern={"a": 8},
    )
    assert typed.ranks == {"q_proj": 4, "down_proj": 32}
    assert typed.alphas == {"a": 8.0}
    assert DataConfig(map="prompt=question,completion=answer").map_columns == {
        "prompt": "question",
        "completion": "answer",
    }
    assert DataConfig(allow="no-eos,double-bos").allowed == {"no-eos", "double-bos"}


def test_a_regular_expression_is_not_split_at_commas():
    assert LoraConfig(target_modules="re:layers.{1,2}.q_proj").target_modules == "re:layers.{1,2}.q_proj"


@pytest.mark.parametrize(
    ("text", "layers"), [("", set()), ("3", {3}), ("0-2,5", {0, 1, 2, 5}), (" 1 , 4-4", {1, 4})]
)
def test_parse_layers(text: str, layers: set[int]):
    assert parse_layers(text) == layers


@given(st.sets(st.integers(0, 200), min_size=1))
def test_parse_layers_of_a_plain_list(layers: set[int]):
    assert parse_layers(",".join(map(str, sorted(layers)))) == layers


def test_every_option_has_help():
    for name, (_, _, text) in flat_options(TrainConfig).items():
        assert len(text) > 10, name


def test_configs_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().rank = 3  # type: ignore[misc]
