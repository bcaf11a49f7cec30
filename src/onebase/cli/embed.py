"""`onebase embed`: the vector of a text, or of each text of a file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from onebase.cli.configs import EmbedConfig
from onebase.cli.using import open_pair, read_prompts
from onebase.config import DataConfig, build
from onebase.data.read import read_examples
from onebase.embedding import embed
from onebase.errors import ConfigError
from onebase.files import atomic_file, require_writable, write_text


def run(options: dict[str, Any]) -> int:
    """Write a vector for each text: .npy (texts, width), or a JSON object a line."""
    config = build(EmbedConfig, options)
    if not config.prompt and not config.input:
        raise ConfigError("options prompt and input", "neither is given", hint="give one of them")
    texts = _texts(config)
    if config.output:
        require_writable(config.output)
    asked = {name: getattr(config, name) for name in ("max_length", "overlong", "pooling")}
    base, adapter = open_pair(config.using)
    given = {name: value for name, value in asked.items() if value}
    vectors = embed(base, texts, adapter, config.batch_size, **given)
    if config.output.endswith(".npy"):
        _write_npy(Path(config.output), vectors)
        return 0
    rows = zip(texts, vectors.tolist(), strict=True)
    lines = "".join(json.dumps({"text": t, "vector": v}, ensure_ascii=False) + "\n" for t, v in rows)
    if config.output:
        write_text(config.output, lines)
    else:
        print(lines, end="")
    return 0


def _texts(config: EmbedConfig) -> list[str]:
    if config.prompt:
        return [config.prompt]
    if Path(config.input).suffix == ".txt":
        return list(read_prompts(config.input))
    rows = read_examples(config.input, build(DataConfig, {"map": config.map}), ("text",))
    return [str(row.text) for row in rows]


def _write_npy(path: Path, vectors: Tensor) -> None:
    stream = io.BytesIO()
    np.save(stream, vectors.numpy(), allow_pickle=False)
    with atomic_file(path) as temporary:
        temporary.write_bytes(stream.getvalue())
