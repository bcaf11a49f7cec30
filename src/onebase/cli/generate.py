"""`onebase generate`: answers to one prompt or to a file of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onebase.adapters.injection import injected
from onebase.cli.configs import GenerateConfig
from onebase.cli.using import open_pair, require_text
from onebase.config import DataConfig, build
from onebase.data.read import Example, read_examples
from onebase.errors import ConfigError, DataError, MissingFile, nearest
from onebase.files import require_writable, write_text
from onebase.models.generation import answers, format_of
from onebase.models.vocabulary import for_adapter


def run(options: dict[str, Any]) -> int:
    """Print the answers, or write them as JSONL."""
    config = build(GenerateConfig, options)
    if not config.prompt and not config.input:
        raise ConfigError("options prompt and input", "neither is given", hint="give one of them")
    prompts = [_example(0, config.prompt)] if config.prompt else _read_prompts(config)
    if config.output:
        require_writable(config.output)
    base, adapter = open_pair(config.using)
    require_text(adapter)
    with injected(base.model, adapter, "generate"):
        given = answers(for_adapter(base, adapter), prompts, format_of(base, adapter), config.sampling)
    rows = [_row(example, answer) for example, answer in zip(prompts, given, strict=True)]
    if config.output:
        write_text(config.output, "".join(row + "\n" for row in rows))
    else:
        # Not through rich, which would take `:name:` in an answer for an emoji.
        print("\n".join(given if config.prompt else rows))
    return 0


def _example(row: int, prompt: str) -> Example:
    return Example(row, prompt=prompt, completion="")


def _row(example: Example, answer: str) -> str:
    asked = {"messages": example.messages} if example.messages else {"prompt": example.prompt}
    return json.dumps({**asked, "answer": answer}, ensure_ascii=False)


def _read_prompts(config: GenerateConfig) -> list[Example]:
    """The prompts of a .txt file, one a line, or the prompt column (or the chats) of a data file."""
    path = Path(config.input).expanduser()
    prompts = _read_lines(path) if path.suffix == ".txt" else _read_rows(config)
    if not prompts:
        raise DataError(f"input {path}", "it holds no prompt")
    return prompts


def _read_lines(path: Path) -> list[Example]:
    if not path.is_file():
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise MissingFile(f"input {path}", "no such file", nearest(path.name, beside))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"input {path}", f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    return [_example(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_rows(config: GenerateConfig) -> list[Example]:
    """Rows as training reads them, else rows with a prompt alone, whose column then stands for the answer too."""
    given = build(DataConfig, {"map": config.map})
    alone = {"completion": given.map_columns.get("prompt", "prompt"), **given.map_columns}
    try:
        return read_examples(config.input, given)
    except DataError as error:
        try:
            return read_examples(config.input, build(DataConfig, {"map": alone}))
        except DataError:
            raise error from None
