"""The model card: `README.md` of an adapter folder, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from onebase.training.record import SHOWN_SAMPLES, RunRecord, Sample
from onebase.training.report import Wording, changes, count, options, plain, size, wording

TAGS = ["lora", "onebase"]
# Options that say nothing about the adapter, only where and how the command ran.
NOT_SHOWN = {"output", "resume", "overwrite", "log"}


def model_card(record: RunRecord) -> str:
    """The README.md of the adapter that `record` tells of.

    The front matter follows the hub's model card specification
    (https://huggingface.co/docs/hub/model-cards).
    """
    parts = [
        _front_matter(record),
        f"# {_inline(record.title)}",
        _summary(record),
        "## How to use",
        _usage(record),
        "## Training data",
        _table(("", ""), record.data.items()),
        _gates(record),
        "## Results",
        _results(record),
        *(_sample(sample, wording(record)) for sample in record.samples[:SHOWN_SAMPLES]),
        "## Settings",
        _settings(record.settings),
        "## Base",
        _base(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(record: RunRecord) -> str:
    facts = {
        "base_model": record.base.name,
        "library_name": "peft",
        "pipeline_tag": _use(record).tag,
        "tags": TAGS,
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---"


class Use(NamedTuple):
    """How a kind of adapter is used: the hub's tag, our command, transformers' loader."""

    tag: str
    verb: str
    loader: str


TEXT = Use("text-generation", "generate", "AutoModelForCausalLM")
LABELS = Use("text-classification", "predict", "AutoModelForSequenceClassification")
VECTORS = Use("sentence-similarity", "embed", "AutoModel")


def _use(record: RunRecord) -> Use:
    return LABELS if record.head else VECTORS if record.embedder else TEXT


def _summary(record: RunRecord) -> str:
    adapter, timing = record.adapter, record.timing
    kind = "rank-stabilised LoRA" if adapter.rslora else "LoRA"
    return (
        f"A {kind} adapter of rank {adapter.rank} (alpha {plain(adapter.alpha)}) for "
        f"{_code(record.base.name)}: {count(adapter.parameters)} trained parameters in {size(adapter.file_bytes)}, "
        f"next to the base's {count(record.base.parameters)} in {size(record.base.stored_bytes)}. "
        f"It sits on {_inline(adapter.targets)}. Trained with onebase for {count(timing.steps)} steps, "
        f"{count(timing.tokens)} tokens; training ended: {_inline(record.finished)}."
    )


def _usage(record: RunRecord) -> str:
    folder, base = Path(record.adapter.path).resolve().name, record.base.name
    verb, loader = _use(record).verb, _use(record).loader
    shell = f"onebase {verb} --adapter {shlex.quote(folder)} --prompt '...'"
    more = "".join(f", {name}={value!r}" for name, value in record.head.items())
    python = (
        "from peft import PeftModel\n"
        f"from transformers import {loader}, AutoTokenizer\n\n"
        f"base = {base!r}  # a hub name or a folder\n"
        "tokenizer = AutoTokenizer.from_pretrained(base)\n"
        f"model = {loader}.from_pretrained(base, dtype={record.base.dtype!r}{more})\n"
        f"model = PeftModel.from_pretrained(model, {folder!r})"
    )
    told = f"With onebase:\n\n{_fenced(shell, 'sh')}\n\nWith PEFT:\n\n{_fenced(python, 'python')}"
    return f"{told}\n\n{_vectors(record)}" if record.embedder else told


def _vectors(record: RunRecord) -> str:
    """How the states that PEFT's model gives become vectors."""
    states = {
        "mean": "mean of its real tokens' last hidden states",
        "max": "elementwise maximum of its real tokens' last hidden states",
        "cls": "last hidden state of its first token",
        "last": "last hidden state of its last real token",
    }
    told, rest = states[record.embedder["pooling"]], ", brought to length 1" * record.embedder["normalize"]
    return f"A text's vector is the {told}{rest}; vectors are compared by their cosine."


def _gates(record: RunRecord) -> str:
    names = ", ".join(_code(name) for name in record.allowed)
    return f"Checks that the run was told to pass over: {names}." if names else ""


def _results(record: RunRecord) -> str:
    words = wording(record)
    rows = [
        (f"{change.label} ({change.unit})" if change.unit else change.label, change.before, change.after)
        for change in changes(record.before, record.after, words)
    ]
    if not rows:
        return "No rows were held out."
    shown = [(label, count(before), count(after)) for label, before, after in rows]
    return "On held-out rows:\n\n" + _table(("", words.before, "with the adapter"), shown)


def _sample(sample: Sample, words: Wording) -> str:
    texts = {
        words.asked: sample.prompt,
        words.wanted: sample.reference,
        words.before.capitalize(): sample.before,
        "With the adapter": sample.after,
    }
    body = "\n\n".join(f"{label}:\n\n{_fenced(text)}" for label, text in texts.items())
    return f"<details><summary>A held-out row</summary>\n\n{body}\n\n</details>"


def _settings(settings: Mapping[str, Any]) -> str:
    parts = options({name: value for name, value in settings.items() if name not in NOT_SHOWN})
    chosen = _table(("chosen", ""), parts["changed"].items())
    return f"{chosen}\n\n{_table(('default', ''), parts['default'].items())}".strip()


def _base(record: RunRecord) -> str:
    proof = "was the same" if record.proof.equal else f"was **different**: {_code(record.proof.after)}"
    return (
        f"Fingerprint: {_code(record.base.fingerprint)}\n\n"
        f"The fingerprint of all {count(record.proof.tensors)} tensors after training {proof}."
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A Markdown table; empty if there are no rows."""
    lines = ["| " + " | ".join(_inline(plain(cell)) for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]) if lines else ""


def _inline(text: str) -> str:
    """`text` on one line, with what Markdown or HTML would take as markup escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _code(text: str) -> str:
    """`text` as inline code, whatever it contains."""
    text = " ".join(text.split())
    ticks = "`" * (_longest_ticks(text) + 1)
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _fenced(text: str, language: str = "") -> str:
    """`text` as a code block that no line of it can close."""
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"
