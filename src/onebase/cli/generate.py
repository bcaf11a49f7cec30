"""`onebase generate`: answers to one prompt or to a file of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onebase.cli.screen import console
from onebase.cli.using import open_pair
from onebase.config import DataConfig, GenerateConfig, build
from onebase.data.read import Example, read_examples
from onebase.errors import ConfigError, DataError, MissingFile
from onebase.files import write_text
from onebase.injection import injected
from onebase.models.generation import answers, format_of


def run(options: dict[str, Any]) -> int:
    """Print the answers, or write them as JSONL."""
    config = build(GenerateConfig, options)
    if not config.prompt and not config.input:
        raise ConfigError("options prompt and input", "neither is given", hint="give one of them")
    prompts = [_example(0, config.prompt)] if config.prompt else _read_prompts(config)
    base, adapter = open_pair(config.using)
    with injected(base.model, adapter, "generate"):
        given = answers(base, prompts, format_of(base, adapter), config.sampling)
    rows = [
        {"prompt": example.prompt or "", "answer": answer}
        for example, answer in zip(prompts, given, strict=True)
    ]
    if config.output:
        write_text(config.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return 0
    for row in rows:
        shown = row["answer"] if config.prompt else json.dumps(row, ensure_ascii=False)
        console.print(shown, markup=False, highlight=False, soft_wrap=True)
    return 0


def _example(row: int, prompt: str) -> Example:
    return Example(row, prompt=prompt, completion="")


def _read_prompts(config: GenerateConfig) -> list[Example]:
    """The prompts of a .txt file, one a line, or the prompt column (or the chats) of a data file."""
    path = Path(config.input)
    if path.suffix == ".txt":
        if not path.is_file():
            raise MissingFile(f"input {path}", "no such file")
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [_example(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        given = build(DataConfig, {"map": config.map})
        mapping = {"completion": given.map_columns.get("prompt", "prompt"), **given.map_columns}
        prompts = read_examples(config.input, build(DataConfig, {"map": mapping}))
    if not prompts:
        raise DataError(f"input {path}", "it holds no prompt")
    return prompts
