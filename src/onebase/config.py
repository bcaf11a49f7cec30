"""Every option, once: frozen dataclasses whose fields are the Python keywords, the YAML keys and the flags.

An option's help, and where its default comes from, stand in the field's metadata. Options are flat: the
dataclasses group them, a user never writes the group's name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from onebase.errors import ConfigError, nearest
from onebase.options import assign, build, flatten, names, opt, pairs, require, require_pattern
from onebase.tasks import POOLINGS, PoolingName, TaskName, require_read, require_task

__all__ = ["build", "flatten"]

ALL_LINEAR = "all-linear"
REGEX_PREFIX = "re:"
SEEDS = 1 << 63
MAX_RANK = 1 << 20  # more rows than any weight has
LOGGERS = ("tensorboard", "wandb", "trackio")

Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga"]
_OnFactors = Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
_OnUpdates = Literal["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
CombineMethod = Literal[_OnFactors, _OnUpdates]

# Checks that stop a run before its first step; `--allow NAME` lets a run pass one of them.
GATES: dict[str, str] = {
    "no-loss": "a row without a single token that carries loss",
    "no-eos": "an end-of-text token never carries loss, so the model would not learn to stop",
    "double-bos": "a row starts with two beginning-of-text tokens",
    "unmarked-turns": "the chat template does not let assistant turns be told from the rest",
    "rare-class": "a class that has fewer than two training rows",
    "empty-text": "a text of a pair has no token of its own",
    "same-text": "two texts of a row are the same, so that it says nothing or contradicts itself",
    "untrained-special": "the loss covers added special tokens whose embedding is frozen and untrained",
    "uneven-targets": "a target matches in some layers and not in others",
    "base-mismatch": "the adapter to start from was made for a base with another fingerprint",
    "unused-adapter": "an adapted module took no part in the first step",
}


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is: where it goes and how large it is. Names follow PEFT's `LoraConfig`."""

    rank: int = opt(
        16, "rank r of the update B·A (16: Unsloth's and QLoRA-style default; E2E in the LoRA paper used 4)"
    )
    alpha: float = opt(
        32.0,
        "scale numerator: the update is multiplied by alpha/rank "
        "(2x rank: 'LoRA Learns Less', Biderman et al. 2024)",
    )
    dropout: float = opt(0.0, "dropout on the adapter's input while training (0: Unsloth, torchtune)")
    target_modules: str | list[str] = opt(
        ALL_LINEAR,
        "'all-linear' (every linear layer but the output head: QLoRA, 'LoRA Without Regret'), "
        "module names such as q_proj,v_proj, or re:<regular expression on the full path>",
    )
    exclude_modules: str | list[str] = opt(list, "module names to leave out, or re:<regular expression>")
    layers: str = opt("", "only these layers, for example 0-5,8 (empty: all)")
    rank_pattern: dict[str, int] | str = opt(dict, "rank of some modules, for example q_proj=4,down_proj=32")
    alpha_pattern: dict[str, float] | str = opt(dict, "alpha of some modules, for example q_proj=8")
    rslora: bool = opt(False, "scale by alpha/sqrt(rank) (rsLoRA, Kalajdzievski 2023)")
    dora: bool = opt(
        False, "learn the norms of the weight's rows apart from their direction (DoRA, Liu et al. 2024)"
    )
    lora_bias: bool = opt(False, "also learn a bias for each adapted layer that has one")
    init: Init = opt(
        "default",
        "where A and B start: default (Kaiming-uniform A, B = 0), gaussian, orthogonal; from the weight: pissa, "
        "olora; from a pass over data: eva, lora_ga",
    )
    target_parameters: str | list[str] = opt(
        list, "parameters that modules use directly, such as mlp.experts.down_proj (PEFT's target_parameters)"
    )
    trainable_tokens: str | list[str] = opt(
        list, "tokens whose embedding rows are trained too: texts of special tokens, or id:N"
    )
    modules_to_save: str | list[str] = opt(
        list, "extra modules to train in full and keep in the adapter, for example lm_head"
    )

    def __post_init__(self) -> None:
        require("rank", self.rank, self.rank >= 1, "at least 1")
        require("rank", self.rank, self.rank <= MAX_RANK, f"at most {MAX_RANK}")
        require(
            "alpha", self.alpha, math.isfinite(self.alpha) and self.alpha != 0, "a finite number other than 0"
        )
        require("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        require("init", self.init, self.init in get_args(Init), "one of " + ", ".join(get_args(Init)))
        require(
            "lora_bias", self.lora_bias, not (self.lora_bias and self.dora), "false with dora, as in PEFT"
        )
        assign(
            self,
            alpha=float(self.alpha),
            target_modules=_targets(self.target_modules),
            exclude_modules=_targets(self.exclude_modules),
            rank_pattern=pairs("rank_pattern", self.rank_pattern, int),
            alpha_pattern=pairs("alpha_pattern", self.alpha_pattern, float),
            modules_to_save=names(self.modules_to_save),
            target_parameters=names(self.target_parameters),
            trainable_tokens=names(self.trainable_tokens),
        )
        some = (self.target_modules, self.modules_to_save, self.target_parameters, self.trainable_tokens)
        require("target_modules", "", any(some), "at least one name")
        for name, rank in self.ranks.items():
            require(
                "rank_pattern", f"{name}={rank}", 1 <= rank <= MAX_RANK, f"at least 1, at most {MAX_RANK}"
            )
        for name, alpha in self.alphas.items():
            finite = math.isfinite(alpha) and alpha != 0
            require("alpha_pattern", f"{name}={alpha}", finite, "a finite number other than 0")
        for pattern in (*self.ranks, *self.alphas):
            require_pattern(f"({pattern})")
        parse_layers(self.layers)

    # The fields accept what a user types; these give what __post_init__ made of it.
    @property
    def ranks(self) -> dict[str, int]:
        """`rank_pattern` as a dict."""
        assert isinstance(self.rank_pattern, dict)
        return self.rank_pattern

    @property
    def alphas(self) -> dict[str, float]:
        """`alpha_pattern` as a dict."""
        assert isinstance(self.alpha_pattern, dict)
        return self.alpha_pattern


def _targets(value: str | list[str] | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(value, str) and (value == ALL_LINEAR or value.startswith(REGEX_PREFIX)):
        require_pattern(value.removeprefix(REGEX_PREFIX))
        return value
    return names(value)


def parse_layers(text: str) -> frozenset[int]:
    """`0-5,8` -> {0,1,2,3,4,5,8}; an empty text gives the empty set, which means all layers."""
    layers: set[int] = set()
    for part in text.split(",") if text else []:
        first, dash, last = part.strip().partition("-")
        numbers = first.isdigit() and (last.isdigit() if dash else True)
        require("layers", text, numbers, "layer numbers and ranges such as 0-5,8")
        end = int(last) if dash else int(first)
        require("layers", text, int(first) <= end, "ranges that go up, such as 0-5")
        layers.update(range(int(first), end + 1))
    return frozenset(layers)


@dataclass(frozen=True)
class DataConfig:
    """Which rows to learn from and how a row becomes tokens."""

    task: TaskName = opt(
        "causal",
        "what rows teach: causal (their text, token by token), classify (a label for a text), regress (a number), "
        "embed (vectors that are near where texts belong together)",
    )
    data: str = opt("", "file (.jsonl .json .csv .parquet) or hub dataset name to train on")
    split: str = opt("train", "split of a hub dataset")
    validation: str = opt("", "file or hub dataset with validation rows (instead of --holdout)")
    holdout: float = opt(
        0.1, "validation rows to split off: a fraction below 1, or a number of rows or groups; 0 for none"
    )
    split_by: str = opt("", "column whose equal values stay on one side of the split, for example prompt")
    limit: int = opt(0, "use only the first N rows (0: all)")
    map: dict[str, str] | str = opt(dict, "rename columns, for example prompt=question,completion=answer")
    chat: bool = opt(False, "render prompt/completion rows through the model's chat template")
    system: str = opt(
        "", "system message put before every chat (with --chat or messages rows that have none)"
    )
    separator: str = opt("\n", "text between prompt and completion where no chat template is used")
    loss_on: Literal["completion", "all"] = opt(
        "completion", "tokens that carry loss: completions and assistant turns, or everything"
    )
    teach_eos: bool = opt(
        True, "end every row with the end-of-text token, with loss on it, so that the model learns to stop"
    )
    max_length: int = opt(0, "longest row in tokens (0: the base's context length)")
    overlong: Literal["error", "truncate", "drop"] = opt(
        "error", "rows longer than max_length: refuse to start, cut their end, or leave them out"
    )
    allow: str | list[str] = opt(list, "gates to override by name: " + ", ".join(GATES))
    pooling: PoolingName = opt(
        "",
        "embed: how token states become a vector: mean, cls, last, max (empty: as the base says, else mean)",
    )
    similarity_scale: float = opt(
        20.0,
        "embed: cosine similarities times this, 1/temperature (20: sentence-transformers; SimCSE's 0.05)",
    )

    def __post_init__(self) -> None:
        require_task(self.task)
        require_read(self.task, self)
        require("pooling", self.pooling, self.pooling in ("", *POOLINGS), "one of " + ", ".join(POOLINGS))
        positive = math.isfinite(self.similarity_scale) and self.similarity_scale > 0
        require("similarity_scale", self.similarity_scale, positive, "a finite number above 0")
        require("holdout", self.holdout, self.holdout >= 0, "0 or more")
        require("limit", self.limit, self.limit >= 0, "0 or more")
        require(
            "max_length", self.max_length, self.max_length == 0 or self.max_length >= 2, "0 or at least 2"
        )
        require("loss_on", self.loss_on, self.loss_on in ("completion", "all"), "completion or all")
        require(
            "overlong",
            self.overlong,
            self.overlong in ("error", "truncate", "drop"),
            "error, truncate or drop",
        )
        assign(self, map=pairs("map", self.map, str), allow=names(self.allow))
        for name in self.allow:
            if name not in GATES:
                raise ConfigError(f"option allow={name}", "no gate of that name", nearest(name, GATES))
        if self.validation and self.split_by:
            raise ConfigError(
                "options validation and split_by", "contradict each other: a validation file needs no split"
            )

    @property
    def map_columns(self) -> dict[str, str]:
        """`map` as a dict: our column name -> the file's."""
        assert isinstance(self.map, dict)
        return self.map

    @property
    def allowed(self) -> frozenset[str]:
        """Names of the gates that are overridden."""
        return frozenset(self.allow)


@dataclass(frozen=True)
class OptimConfig:
    """How the adapter learns."""

    epochs: float = opt(3.0, "passes over the training rows")
    max_steps: int = opt(0, "stop after this many optimiser steps (0: epochs decide)")
    batch_size: int = opt(16, "rows in one forward pass (small batches suit LoRA: 'LoRA Without Regret')")
    accumulate: int = opt(1, "forward passes per optimiser step, weighted by their loss tokens")
    lr: float = opt(
        0.0,
        "peak learning rate of A and B (0: by the base's width, 1e-3 up to 576, by docs/evidence.md, 4, and less on "
        "wider ones, 5e-4 at 2,304: docs/training.md)",
    )
    lora_plus: float = opt(
        1.0, "learning rate of B as a multiple of A's (LoRA+, Hayou et al. 2024, suggests 16)"
    )
    freeze_a: bool = opt(False, "train B alone and keep A as it starts (LoRA-FA, Zhang et al. 2023)")
    schedule: Literal["linear", "cosine", "constant"] = opt(
        "linear", "learning rate after warm-up (linear: the LoRA paper)"
    )
    warmup: float = opt(0.03, "warm-up: a fraction of all steps below 1, or a number of steps (0.03: QLoRA)")
    weight_decay: float = opt(0.0, "AdamW's decoupled weight decay (0: PEFT's and QLoRA's scripts)")
    beta1: float = opt(0.9, "AdamW's first beta")
    beta2: float = opt(0.999, "AdamW's second beta")
    eps: float = opt(1e-8, "AdamW's epsilon")
    clip: float = opt(1.0, "largest gradient norm (0: no clipping)")
    eval_every: int = opt(0, "steps between evaluations (0: once an epoch)")
    patience: int = opt(0, "stop after this many evaluations without improvement (0: never)")
    save_every: int = opt(0, "steps between checkpoints (0: at every evaluation)")
    keep: int = opt(2, "newest checkpoints to keep, besides the best")
    engine: Literal["auto", "engine", "packed", "padded"] = opt(
        "auto",
        "how rows are scored: engine (fused layers, written for speed and memory), packed (the model's own layers, "
        "no padding), padded; auto takes the first that the model proves exact",
    )
    recompute: bool = opt(
        False, "the engine keeps each layer's input alone and computes the rest twice: less memory, more time"
    )
    cache_activations: bool = opt(
        False,
        "what lies below the adapter's first layer is computed once, into a file, and read back in later epochs "
        "(for adapters on the top layers only: --layers)",
    )
    group_prompts: bool = opt(
        False, "rows that share their prompt meet in a batch, where the engine computes the prompt once"
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "lora_plus", "eps"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        for name in "lr max_steps warmup weight_decay clip eval_every patience save_every".split():
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        require("keep", self.keep, self.keep >= 1, "at least 1")
        for name in ("beta1", "beta2"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        require(
            "schedule",
            self.schedule,
            self.schedule in ("linear", "cosine", "constant"),
            "linear, cosine or constant",
        )
        require(
            "engine",
            self.engine,
            self.engine in ("auto", "engine", "packed", "padded"),
            "auto, engine, packed or padded",
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    base: str = opt("smollm2-135m", "base model: hub name, folder, .gguf file, or the built-in smollm2-135m")
    output: str = opt("", "folder for the adapter, checkpoints, metrics and report")
    start: str = opt(
        "", "adapter folder to go on from: its values, rank, targets and variant instead of a fresh adapter's"
    )
    resume: bool = opt(False, "go on from the output folder's last checkpoint")
    overwrite: bool = opt(False, "delete the run that the output folder holds and start anew")
    seed: int = opt(0, "seed of the adapter's start, the order of rows, dropout and the split")
    dtype: Literal["auto", "float32", "bfloat16"] = opt(
        "auto", "the base's dtype; auto measures which is faster here"
    )
    shard_base: bool = opt(
        False,
        "under torchrun: each process keeps a part of the base's weights (FSDP2) instead of all of them",
    )
    plan: bool = opt(False, "print what the run would do, its time and its memory on this machine, and stop")
    samples: int = opt(4, "held-out rows whose answers before and after go into the report")
    log: str | list[str] = opt(list, "extra loggers: " + ", ".join(LOGGERS))
    lora: LoraConfig = opt(LoraConfig, "")
    data: DataConfig = opt(DataConfig, "")
    optim: OptimConfig = opt(OptimConfig, "")

    def __post_init__(self) -> None:
        require("seed", self.seed, 0 <= self.seed < SEEDS, "0 or more, and below 2^63")
        require("samples", self.samples, self.samples >= 0, "0 or more")
        require_read(self.data.task, self.lora, self.optim)
        require(
            "dtype", self.dtype, self.dtype in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"
        )
        assign(self, log=names(self.log))
        for name in self.log:
            if name not in LOGGERS:
                raise ConfigError(f"option log={name}", "no logger of that name", nearest(name, LOGGERS))
        if self.resume and self.overwrite:
            raise ConfigError(
                "options resume and overwrite", "contradict each other: one keeps the run, one deletes it"
            )


@dataclass(frozen=True)
class Sampling:
    """How answers are chosen."""

    max_new_tokens: int = opt(256, "longest answer in tokens")
    temperature: float = opt(0.0, "0 for the likeliest token each time (greedy), above 0 to sample")
    top_p: float = opt(1.0, "sample from the likeliest tokens that together have this probability")
    top_k: int = opt(0, "sample from this many likeliest tokens (0: all)")
    seed: int = opt(0, "seed of the sampling; the same prompts in the same batches give the same answers")
    batch_size: int = opt(16, "prompts in one batch")

    def __post_init__(self) -> None:
        require("seed", self.seed, 0 <= self.seed < SEEDS, "0 or more, and below 2^63")
        require("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        require("temperature", self.temperature, self.temperature >= 0, "0 or more")
        require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        require("top_k", self.top_k, self.top_k >= 0, "0 or more")
        require("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")


@dataclass(frozen=True)
class Recipe:
    """How adapters become one."""

    method: CombineMethod = opt(
        "cat",
        "cat: the exact weighted sum, ranks add up; svd: its best fit of one rank; linear, ties, dare, "
        "magnitude_prune: on A and B apart, as in PEFT; *_svd: on the full updates",
    )
    rank: int = opt(0, "rank of the result of svd and *_svd (0: the largest rank that goes in, as in PEFT)")
    density: float = opt(1.0, "share of values that ties, dare and magnitude_prune keep, in (0, 1]")
    sign: Literal["total", "frequency"] = opt(
        "total", "how ties elects a sign: by the sum of the values (the TIES paper), or a vote an adapter"
    )
    seed: int = opt(0, "seed of the choice of values that dare drops")

    def __post_init__(self) -> None:
        methods = get_args(CombineMethod)
        if self.method not in methods:
            near = nearest(str(self.method), methods)
            raise ConfigError(f"option method={self.method}", "no method of that name", near)
        require("rank", self.rank, self.rank >= 0, "0 or more")
        require("density", self.density, 0 < self.density <= 1, "in (0, 1]")
        require("sign", self.sign, self.sign in ("total", "frequency"), "total or frequency")
