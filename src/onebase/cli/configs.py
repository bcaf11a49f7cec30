"""The options of the commands that only gather what the library does; `train` has its own in config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onebase.config import ALL_LINEAR, DataConfig, Recipe, Sampling, TrainConfig
from onebase.errors import ConfigError
from onebase.grid import swept_options
from onebase.options import assign, names, opt, require
from onebase.serve.request import Limits
from onebase.tasks import PoolingName
from onebase.web.settings import KEY_VARIABLE, Settings


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
class WithAdapters(WithAdapter):
    """Which base a command uses, and which adapters."""

    adapter: str = opt("", "adapter folders, with commas between them (empty: the plain base)")


@dataclass(frozen=True)
class PreviewConfig:
    """`onebase preview`."""

    base: str = opt("smollm2-135m", "base model, for its tokenizer and chat template")
    rows: int = opt(3, "rows to show token by token")
    seed: int = opt(0, "seed of the split")
    trainable_tokens: str | list[str] = opt(list, "tokens whose rows the training will train, as in `train`")
    data: DataConfig = opt(DataConfig, "")

    def __post_init__(self) -> None:
        assign(self, trainable_tokens=names(self.trainable_tokens))


def _one_source(prompt: str, file: str) -> None:
    """Raise ConfigError where a command was given a text and a file of texts."""
    if prompt and file:
        raise ConfigError("options prompt and input", "contradict each other", hint="give one of them")


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
        _one_source(self.prompt, self.input)


@dataclass(frozen=True)
class PredictConfig:
    """`onebase predict`."""

    prompt: str = opt("", "one text")
    input: str = opt("", "file of texts: any data file with a text column, and text_pair for pairs")
    output: str = opt("", "write JSONL here instead of to the screen")
    map: dict[str, str] | str = opt(dict, "rename the input's columns, for example text=review")
    max_length: int = opt(0, "longest text in tokens (0: as in the adapter's training)")
    overlong: Literal["", "error", "truncate"] = opt(
        "", "texts that are longer: refuse them, or cut their end (empty: as in the adapter's training)"
    )
    batch_size: int = opt(16, "texts in one batch")
    using: WithAdapter = opt(WithAdapter, "")

    def __post_init__(self) -> None:
        require("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        _one_source(self.prompt, self.input)


@dataclass(frozen=True)
class EmbedConfig:
    """`onebase embed`."""

    prompt: str = opt("", "one text")
    input: str = opt("", "file of texts: a .txt with one a line, or any data file with a text column")
    output: str = opt(
        "",
        "write the vectors here, a row each: .npy (float32) or .jsonl (with the texts) (empty: the screen)",
    )
    map: dict[str, str] | str = opt(dict, "rename the input's columns, for example text=sentence")
    pooling: PoolingName = opt(
        "",
        "without an adapter: mean, cls, last or max of the tokens' states (empty: as the base says, else mean)",
    )
    max_length: int = opt(0, "longest text in tokens (0: as in the adapter's training)")
    overlong: Literal["", "error", "truncate"] = opt(
        "", "texts that are longer: refuse them, or cut their end (empty: as in the adapter's training)"
    )
    batch_size: int = opt(16, "texts in one batch")
    using: WithAdapter = opt(WithAdapter, "")

    def __post_init__(self) -> None:
        require("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        known = not self.output or self.output.endswith((".npy", ".jsonl"))
        require("output", self.output, known, "a file that ends in .npy or .jsonl")
        _one_source(self.prompt, self.input)


@dataclass(frozen=True)
class ChatConfig:
    """`onebase chat`."""

    system: str = opt("", "system message (empty: the one the adapter was trained with, if any)")
    context: int = opt(
        Limits.context, "longest conversation in tokens, the answer included (0: what the base takes)"
    )
    using: WithAdapters = opt(WithAdapters, "")
    sampling: Sampling = opt(Sampling, "")

    def __post_init__(self) -> None:
        require("context", self.context, self.context >= 0, "0 or more")


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
class DoctorConfig:
    """`onebase doctor`."""

    adapter: str = opt("", "adapter folder, broken or not")
    base: str = opt(
        "", "base model (empty: the one that the adapter was made for; off: look at the adapter alone)"
    )
    prompts: str = opt("", "text file with a prompt a line to try the adapter on (empty: three short ones)")
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "the base's dtype")
    json: bool = opt(False, "print JSON instead of tables")


@dataclass(frozen=True)
class CompareConfig:
    """`onebase compare`."""

    adapters: str | list[str] = opt(list, "two adapter folders")
    base: str = opt("", "base model (empty: the one that they were made for; off: compare the updates alone)")
    prompts: str = opt("", "text file with a prompt a line to try the adapters on (empty: three short ones)")
    answers: int = opt(3, "prompts whose answers are shown side by side (0: none)")
    max_new_tokens: int = opt(48, "longest of these answers in tokens")
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "the base's dtype")
    allow_base_mismatch: bool = opt(
        False, "accept adapters that were made for a base with another fingerprint"
    )
    json: bool = opt(False, "print JSON instead of tables")

    def __post_init__(self) -> None:
        given = self.adapters if isinstance(self.adapters, str) else ",".join(self.adapters)
        assign(self, adapters=names(given))
        require("answers", self.answers, self.answers >= 0, "0 or more")
        require("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")


@dataclass(frozen=True)
class ServeConfig:
    """`onebase serve`."""

    base: str = opt("smollm2-135m", "base model")
    adapters: str = opt("", "folder of adapter folders; what appears in it is served (empty: the base alone)")
    host: str = opt(Settings.host, "address to listen at; one that other machines reach needs an API key")
    port: int = opt(Settings.port, "port (0: any that is free)")
    api_key: str = opt("", f"key that every request must bring (empty: what {KEY_VARIABLE} says, or none)")
    allow_runtime_loading: bool = opt(
        Settings.allow_runtime_loading, "let requests load and unload adapters of the folder"
    )
    slots: int = opt(Limits.slots, "requests that run at once")
    context: int = opt(Limits.context, "tokens of prompt and answer (0: what the base takes)")
    memory: float = opt(0.0, "GB for cached keys and values and for adapters (0: no limit)")
    queue: int = opt(Limits.queue, "requests that may wait; more are answered 429")
    max_body: int = opt(Settings.max_body, "largest request in bytes")
    refresh: float = opt(Settings.refresh, "seconds between two looks at the adapters folder")
    drain: float = opt(Settings.drain, "seconds that running answers have after SIGTERM")
    weights: str = opt(
        "auto", "how the base is held: auto (fastest without loss), plain, native, packed, int8, int4"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "the base's dtype")

    def __post_init__(self) -> None:
        require("memory", self.memory, self.memory >= 0, "0 or more")


# `onebase sweep`: the options of `train`, those that may vary as text.
SweepConfig = swept_options(
    TrainConfig(),
    together=opt(0, "runs that train at once (0: as many as the plan's estimate of memory allows)"),
)


@dataclass(frozen=True)
class BenchConfig:
    """`onebase bench`."""

    base: str = opt("smollm2-135m", "base model")
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "the base's dtype")
    batch_size: int = opt(16, "rows in a step")
    rank: int = opt(16, "rank of the adapter, on all linear layers")
    steps: int = opt(5, "steps that are timed, after one to warm up")
    json: bool = opt(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        for name in ("batch_size", "rank", "steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


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
class ExtractConfig:
    """`onebase extract`."""

    base: str = opt("", "base model: hub name, folder, .gguf file, or the built-in smollm2-135m")
    tuned: str = opt("", "model that was trained from the base: hub name, folder or .gguf file")
    output: str = opt("", "folder for the adapter; it must not exist yet")
    rank: int = opt(16, "rank of each update")
    target_modules: str | list[str] = opt(
        ALL_LINEAR,
        "'all-linear', module names such as q_proj,v_proj, or re:<regular expression on the full path>",
    )
    exclude_modules: str | list[str] = opt(list, "module names to leave out, or re:<regular expression>")
    target_parameters: str | list[str] = opt(
        list, "parameters that modules use directly, such as mlp.experts.down_proj"
    )
    lora_bias: bool = opt(False, "take the targets' biases too")
    modules_to_save: str | list[str] = opt(
        list, "modules whose tuned weights the adapter takes whole, such as norm or lm_head"
    )
    allow: str | list[str] = opt(
        list, "tensors, modules or settings (config.NAME) whose difference the adapter may leave out"
    )
    prompts: str = opt("", "text file with a prompt a line for the comparison (empty: three short ones)")
    check: bool = opt(True, "compare base and adapter with the tuned model; this loads both, one at a time")

    def __post_init__(self) -> None:
        assign(self, allow=names(self.allow))


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


ExportTarget = Literal["peft", "portable", "gguf", "ollama", "merged"]

# What only some targets read.
EXPORT_OPTIONS: dict[str, tuple[ExportTarget, ...]] = {
    "fit": ("portable", "gguf", "ollama"),
    "dtype": ("gguf", "ollama"),
    "model": ("ollama",),
}


@dataclass(frozen=True)
class ExportConfig:
    """`onebase export`."""

    adapter: str = opt("", "adapter folder")
    to: ExportTarget = opt(
        "portable",
        "what reads the result. peft: the adapter's own files alone, for PEFT and onebase; portable: a plain LoRA of "
        "one rank and scale 1, for vLLM, old PEFT and converters; gguf: an adapter file for llama.cpp; ollama: that "
        "file and a Modelfile; merged: a plain model without adapter, for everything else (see onebase merge)",
    )
    output: str = opt("", "folder to write, for gguf a file; it must not exist")
    base: str = opt(
        "",
        "base model (empty: the one that the adapter was made for; peft and portable do without, with it they also "
        "compare logits)",
    )
    fit: int = opt(
        0, "portable, gguf, ollama: rank of the plain update put for each DoRA update (0: DoRA is refused)"
    )
    dtype: Literal["f32", "f16"] = opt("f32", "gguf, ollama: dtype in the file")
    model: str = opt(
        "", "ollama: the base as Ollama knows it, a model's name or a .gguf file (empty: the base's name)"
    )
    allow_base_mismatch: bool = opt(
        False, "accept an adapter that was made for a base with another fingerprint"
    )

    def __post_init__(self) -> None:
        require("fit", self.fit, self.fit >= 0, "0 or more")
        for name, readers in EXPORT_OPTIONS.items():
            given = getattr(self, name)
            if given != getattr(type(self), name) and self.to not in readers:
                hint = f"used by --to {', '.join(readers)}"
                raise ConfigError(f"option {name}={given}", f"--to {self.to} does not use it", hint=hint)
