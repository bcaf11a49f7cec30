"""`onebase eval`: base and adapter on the same rows, side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from onebase.adapters.adapter import Adapter
from onebase.cli.configs import EvalConfig
from onebase.cli.console import console
from onebase.cli.using import open_pair
from onebase.config import build, flatten
from onebase.data.read import Example, read_examples
from onebase.data.split import split_examples
from onebase.errors import ConfigError
from onebase.evaluation import Scores, evaluate, evaluate_labels, evaluate_pairs
from onebase.files import require_writable, write_text
from onebase.models.base import Base
from onebase.models.heads import head_of
from onebase.storage.format import read_adapter
from onebase.tasks import CAUSAL, EMBED
from onebase.training.report import WORDINGS

METRICS = {  # name -> (how it is written, is a larger value better)
    "loss": "{:.4f}",
    "perplexity": "{:.3f}",
    "exact_match": "{:.1%}",
    "bleu": "{:.2f}",
    "chrf": "{:.2f}",
}
OF_TEXT, OF_LABELS = ("exact_match", "bleu", "chrf"), ("accuracy", "macro_f1", "pearson", "r2")
OF_PAIRS = ("accuracy_at_1", "mrr_at_10")
CUTTING = ("max_length", "overlong")
SPLITTING = ("data", "holdout", "split_by")
# Taken from the adapter's training unless given: other values would score what it was not taught.
LIKE_TRAINING = ("chat", "system", "separator", "loss_on", "teach_eos", "seed")


def run(options: dict[str, Any]) -> int:
    """Print the scores as a table; with --output write them as JSON too.

    An adapter is scored on rows rendered as in its training, and --holdout takes the rows that it held out.
    """
    config = build(EvalConfig, {**_trained_with(options), **options})
    rows = _rows(config)
    if config.output:
        require_writable(config.output)
    base, adapter = open_pair(config.using)
    cutting = {name: options[name] for name in CUTTING if name in options}
    if config.data.task == EMBED:
        return _pairs(config, base, adapter, rows, cutting)
    if config.data.task != CAUSAL:
        return _labels(config, base, adapter, rows, cutting)
    sampling = config.sampling if config.generate and rows[0].kind != "text" else None
    data = {name: value for name, value in flatten(config.data).items() if name not in SPLITTING}
    scores = {"base": evaluate(base, rows, None, sampling, **data)}
    if adapter is not None:
        scores["adapter"] = evaluate(base, rows, adapter, sampling, **data)
    _tell(config, scores, len(rows))
    return 0


def _labels(
    config: EvalConfig, base: Base, adapter: Adapter | None, rows: list[Example], cutting: Mapping[str, Any]
) -> int:
    """The scores of an adapter with a head, beside those of a constant answer."""
    if adapter is None:
        raise ConfigError(
            f"option task={config.data.task}", "the plain base has no head", hint="give --adapter"
        )
    found, constant = evaluate_labels(base, rows, adapter, **cutting)
    _tell(config, {WORDINGS[config.data.task].before: constant, "adapter": found}, len(rows))
    return 0


def _pairs(
    config: EvalConfig, base: Base, adapter: Adapter | None, rows: list[Example], cutting: Mapping[str, Any]
) -> int:
    """How well vectors find what belongs together, by the plain base and by the adapter."""
    pooling = adapter.origin.head.get("pooling", "") if adapter is not None else config.data.pooling
    scores = {"base": evaluate_pairs(base, rows, None, pooling=pooling, **cutting)}
    if adapter is not None:
        scores["adapter"] = evaluate_pairs(base, rows, adapter, **cutting)
    _tell(config, scores, len(rows))
    return 0


def _tell(config: EvalConfig, scores: dict[str, Scores], rows: int) -> None:
    if config.output:
        write_text(config.output, json.dumps({n: _as_json(s) for n, s in scores.items()}, indent=2) + "\n")
    _print(scores, rows, config.data.task)


def _trained_with(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the adapter's own training that decide how rows are split, rendered and scored."""
    if not options.get("adapter"):
        return {}
    adapter = read_adapter(options["adapter"])
    settings = adapter.origin.training.get("settings", {})
    task = {"task": head_of(adapter).task} if adapter.origin.has_head else {}
    task |= {"task": EMBED} if adapter.origin.embeds else {}
    return {name: settings[name] for name in LIKE_TRAINING if name in settings} | task


def _rows(config: EvalConfig) -> list[Example]:
    """All rows of the file or, with --holdout, those that training with the same options held out."""
    rows = read_examples(config.data.data, config.data)
    if not config.data.holdout:
        return rows
    return split_examples(rows, config.data.holdout, bool(config.data.split_by), config.sampling.seed)[1]


def _as_json(scores: Scores) -> dict[str, Any]:
    values = dataclasses.asdict(scores)
    kinds = [OF_LABELS, OF_PAIRS]
    own = next((one for one in kinds if any(values[name] is not None for name in one)), OF_TEXT)
    values |= {"perplexity": scores.perplexity} if own is OF_TEXT else {}
    unused = {"answers", *(name for one in (*kinds, OF_TEXT) if one is not own for name in one)}
    return {name: value for name, value in values.items() if name not in unused}


def _print(scores: dict[str, Scores], rows: int, task: str) -> None:
    if task != "causal":
        kind = "pairs" if task == EMBED else "rows with a label"
        table = Table("", *scores, title=f"{rows:,} {kind}", title_justify="left")
        for field, label, unit, _ in WORDINGS[task].measures:
            values = [getattr(score, field) for score in scores.values()]
            forms = "{:.1%}" if unit == "%" else "{:.4f}"
            table.add_row(label, *("–" if value is None else forms.format(value) for value in values))
        console.print(table)
        return
    tokens = next(iter(scores.values())).tokens
    table = Table("", *scores, title=f"{rows:,} rows, {tokens:,} tokens with loss", title_justify="left")
    if any(score.tokens != tokens for score in scores.values()):  # the adapter added some to the tokenizer
        table.add_row("tokens with loss", *(f"{score.tokens:,}" for score in scores.values()))
    for name, form in METRICS.items():
        values = [getattr(score, name) for score in scores.values()]
        if None not in values:
            table.add_row(name.replace("_", " "), *(form.format(value) for value in values))
    console.print(table)
