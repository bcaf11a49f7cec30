"""`onebase predict`: the label, or the number, that an adapter's head gives to a text or to a file of them."""

from __future__ import annotations

import json
from typing import Any

from onebase.cli.configs import PredictConfig
from onebase.cli.using import open_pair
from onebase.config import DataConfig, build
from onebase.data.read import UNLABELLED, Example, read_examples
from onebase.errors import ConfigError
from onebase.files import require_writable, write_text
from onebase.prediction import Prediction, predict_rows


def run(options: dict[str, Any]) -> int:
    """Print a line for each text, or write them as JSONL."""
    config = build(PredictConfig, options)
    if not config.prompt and not config.input:
        raise ConfigError("options prompt and input", "neither is given", hint="give one of them")
    if not config.using.adapter:
        raise ConfigError(
            "option adapter", "is empty", hint="name an adapter that was trained with --task classify"
        )
    given = build(DataConfig, {"map": config.map})
    rows = (
        [Example(1, text=config.prompt)] if config.prompt else read_examples(config.input, given, UNLABELLED)
    )
    if config.output:
        require_writable(config.output)
    cutting = {
        name: value
        for name, value in {"max_length": config.max_length, "overlong": config.overlong}.items()
        if value
    }
    base, adapter = open_pair(config.using)
    assert adapter is not None
    said = predict_rows(base, rows, adapter, config.batch_size, **cutting)
    lines = [_line(row, one) for row, one in zip(rows, said, strict=True)]
    if config.output:
        write_text(config.output, "".join(line + "\n" for line in lines))
    else:
        print(_shown(said[0]) if config.prompt else "\n".join(lines))
    return 0


def _line(row: Example, said: Prediction) -> str:
    pair = {"text_pair": row.text_pair} if row.text_pair is not None else {}
    chances = {"probabilities": dict(said.probabilities)} if said.probabilities else {}
    return json.dumps({"text": row.text, **pair, "label": said.label, **chances}, ensure_ascii=False)


def _shown(said: Prediction) -> str:
    """The label, and below it the classes with their probabilities, the likeliest first."""
    ranked = sorted(said.probabilities.items(), key=lambda one: -one[1])
    label = said.label if isinstance(said.label, str) else f"{said.label:.6g}"
    return "\n".join([label, *(f"  {chance:7.2%}  {name}" for name, chance in ranked)])
