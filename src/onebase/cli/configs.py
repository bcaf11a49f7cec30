"""The options of the commands that only gather what the library does; `train` has its own in config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onebase.config import DataConfig, Recipe, Sampling
from onebase.errors import ConfigError
from onebase.options import assign, names, opt, require


@dataclass(frozen=True)
class WithAdapter:
    """Which base and adapter a command uses."""

    base: str = opt("", "base model (empty: the one that the adapter was made for, else smollm2-135m)")
    adapter: str = opt("", "adapter folder (empty: the plain base)")
    allow_base_mismatch: bool = opt(
        False, "accept an adapter that was made for a base with another fingerprint"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "the base's dtype")


@dataclass(frozen=True)
class PreviewConfig:
    """`onebase preview`."""

    base: str = opt("smollm2-135m", "base model, for its tokenizer and chat template")
    rows: int = opt(3, "rows to show token by token")
    seed: int = opt(0, "seed of the split")
    data: DataConfig = opt(DataConfig, "")


@dataclass(frozen=True)
class GenerateConfig:
    """`onebase generate`."""

    prompt: str = opt("", "one prompt")
    input: str = opt("", "file of prompts: a .txt with one a line, or any data file with a prompt column")
    output: str = opt("", "write JSONL with prompt and answer here instead of to the screen")
    map: dict[str, str] | str = opt(dict, "rename the input's columns, for example prompt=question")
    using: WithAdapter = opt(WithAdapter, "")
    sampling: Sampling = opt(Sampling, "")

    def __post_init__(self) -> None:
        if self.prompt and self.input:
            raise ConfigError("options prompt and input", "contradict each other", hint="give one of them")


@dataclass(frozen=True)
class ChatConfig:
    """`onebase chat`."""

    system: str = opt("", "system message (empty: the one the adapter was trained with, if any)")
    using: WithAdapter = opt(WithAdapter, "")
    sampling: Sampling = opt(Sampling, "")


@dataclass(frozen=True)
class EvalConfig:
    """`onebase eval`."""

    generate: bool = opt(True, "also generate answers, for exact match, BLEU and chrF")
    output: str = opt("", "write the scores to this JSON file too")
    using: WithAdapter = opt(WithAdapter, "")
    sampling: Sampling = opt(Sampling, "")
    data: DataConfig = opt(lambda: DataConfig(holdout=0), "")  # with holdout: the rows that training held out


@dataclass(frozen=True)
class InspectConfig:
    """`onebase inspect`."""

    adapter: str = opt("", "adapter folder")
    json: bool = opt(False, "print JSON instead of tables")


@dataclass(frozen=True)
class DemoConfig:
    """`onebase demo`."""

    output: str = opt("runs/demo", "folder for the demo's run; it is replaced")


@dataclass(frozen=True)
class CombineConfig:
    """`onebase combine`."""

    adapters: str | list[str] = opt(list, "adapter folders, with commas between them")
    weights: str = opt(
        "", "a number for each adapter, such as --weights=0.7,-0.3 (empty: equal ones that sum to 1)"
    )
    output: str = opt("", "folder for the new adapter; it must not exist yet")
    negate: bool = opt(False, "turn the sign of one adapter's update, exactly, instead of combining")
    prompt_from: str = opt(
        "", "the one of the adapters whose prompt format the result takes (empty: all must have the same)"
    )
    allow_base_mismatch: bool = opt(
        False, "accept adapters that name different bases; shapes must fit all the same"
    )
    recipe: Recipe = opt(Recipe, "")

    def __post_init__(self) -> None:
        given = self.adapters if isinstance(self.adapters, str) else ",".join(self.adapters)
        assign(self, adapters=names(given))
        if self.negate and (len(self.adapters) > 1 or self.weights or self.recipe != Recipe()):
            hint = "leave the others out, or give a negative weight instead"
            raise ConfigError("option negate", "it takes one adapter, no weights and no method", hint=hint)


@dataclass(frozen=True)
class MergeConfig:
    """`onebase merge`."""

    base: str = opt("", "base model (empty: the one that the adapter was made for)")
    adapter: str = opt("", "adapter folder")
    output: str = opt("", "folder for the merged model; it must not exist")
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = opt(
        "stored", "dtype of the merged weights ('stored': each tensor's own)"
    )
    shard_size: float = opt(5.0, "largest weight file in GB (5: the size that hub uploads use)")
    prompts: str = opt("", "text file with a prompt a line for the comparison (empty: three short ones)")
    check: bool = opt(True, "compare the merged model with base and adapter; this loads the model")
    allow_base_mismatch: bool = opt(
        False, "accept an adapter that was made for a base with another fingerprint"
    )

    def __post_init__(self) -> None:
        require("shard_size", self.shard_size, self.shard_size > 0, "above 0")
