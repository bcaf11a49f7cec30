"""`onebase preview`: the data as the model will see it, and the gates; exits with 2 where one fails."""

from __future__ import annotations

from typing import Any

from onebase.cli.configs import PreviewConfig
from onebase.cli.console import console
from onebase.config import build
from onebase.data.checks import enforce
from onebase.data.preview import print_preview
from onebase.models.base import load_base
from onebase.models.vocabulary import resolve_tokens
from onebase.training.prepare import read_data


def run(options: dict[str, Any]) -> int:
    """Print the preview. Raises GateError, after printing, where a gate fails that is not allowed."""
    config = build(PreviewConfig, options)
    base = load_base(config.base, "float32")  # float32 is mapped from disk; nothing is computed here
    words = resolve_tokens(base, config.trainable_tokens)  # pyright: ignore[reportArgumentType]
    data = read_data(words.base, config.data, config.seed, tokens=words.ids)
    if words.ids:
        console.print("token rows to train: " + "; ".join(words.lines), markup=False, highlight=False)
    tokenizer: Any = words.base.tokenizer  # read_data raises where there is none
    print_preview(console, tokenizer, data.train_rows, data.summary, config.rows)
    enforce(data.summary.findings, config.data.allowed)
    return 0
