"""`onebase export`: an adapter as other engines read it, compared with its source after it was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from onebase.adapters.adapter import Adapter
from onebase.cli import merge
from onebase.cli.configs import ExportConfig
from onebase.cli.console import console, say, table
from onebase.cli.using import base_name, require_given
from onebase.config import build
from onebase.data.modelfile import modelfile
from onebase.data.template import PromptFormat
from onebase.errors import ConfigError, OutputExists
from onebase.files import atomic_folder, require_writable
from onebase.models.base import locate_base, open_tokenizer
from onebase.models.gguf_adapter import save_gguf_adapter
from onebase.models.merging import LogitCheck, check_adapters, open_pair
from onebase.storage.format import load_adapter, read_adapter
from onebase.storage.shards import read_tensor
from onebase.transforms.export import Difference, portable, save_exact, save_portable, without_norms
from onebase.transforms.merge import Skeleton

WORST = 5
GGUF, MODELFILE = "adapter.gguf", "Modelfile"


class Job(NamedTuple):
    """An adapter and what it becomes. `plain` is the adapter itself, but for DoRA updates that were fitted."""

    config: ExportConfig
    adapter: Adapter
    plain: Adapter
    base: Skeleton | None

    @property
    def known(self) -> Skeleton:
        """The base, where the target cannot do without; `NEED_BASE` names those."""
        assert self.base is not None
        return self.base


def run(options: dict[str, Any]) -> int:
    """Write the adapter for the target, then say how far it is from its source."""
    config = build(ExportConfig, options)
    require_given(config, ("adapter", "output"), "onebase export ADAPTER --to gguf --output adapter.gguf")
    if config.to == "merged":
        names = ("adapter", "output", "base", "allow_base_mismatch")
        return merge.run({name: getattr(config, name) for name in names})
    if Path(config.output).exists():
        raise OutputExists(f"export to {config.output}", "it exists already", hint="choose another name")
    require_writable(config.output)
    base, adapter = _opened(config)
    plain, fits = adapter, dict[str, float]()
    if config.fit:
        plain, fits = without_norms(adapter, lambda path: _weight(base, path), config.fit)
    job = Job(config, adapter, plain, base)
    difference = TARGETS[config.to](job)
    console.print(table(f"{config.to} adapter {config.output}", _written(job, difference)))
    if fits:
        console.print(table(f"DoRA updates as plain ones of rank {config.fit}, error", _fits(fits)))
    if base is not None and (fits or (config.base and config.to not in NEED_BASE)):
        check = check_adapters(base.folder, adapter, _result(job))
        console.print(table("logits against the source adapter's", _logits(check)))
    if config.to == "ollama":
        say(f"next: cd {config.output} && ollama create NAME -f {MODELFILE}")
    return 0


def _opened(config: ExportConfig) -> tuple[Skeleton | None, Adapter]:
    """The base's modules where one is needed or was given, and the adapter, proven to fit it."""
    if not (config.base or config.fit or config.to in NEED_BASE):
        return None, read_adapter(config.adapter)
    folder = locate_base(base_name(config.base, config.adapter))
    return open_pair(folder, config.adapter, config.allow_base_mismatch)


def _weight(base: Skeleton | None, path: str) -> Tensor:
    assert base is not None
    name = f"{path}.weight"
    stored = base.stored.get(name) or base.stored.get(base.ties.get(name, ""))
    if stored is None:
        raise ConfigError(f"fit {path}", "the base stores its weight in pieces", hint="use --to merged")
    return read_tensor(next(info for info in base.tensors if info.name == stored))


def _peft(job: Job) -> Difference:
    save_exact(job.adapter, job.config.output)
    return Difference(0.0, 0.0)


def _portable(job: Job) -> Difference:
    return save_portable(portable(job.plain), job.plain, job.config.output)


def _gguf(job: Job) -> Difference:
    return save_gguf_adapter(job.config.output, portable(job.plain), job.plain, job.known, job.config.dtype)


def _ollama(job: Job) -> Difference:
    with atomic_folder(job.config.output) as folder:
        plain = portable(job.plain)
        found = save_gguf_adapter(folder / GGUF, plain, job.plain, job.known, job.config.dtype)
        (folder / MODELFILE).write_text(_modelfile(job), encoding="utf-8")
    return found


TARGETS: dict[str, Callable[[Job], Difference]] = {
    "peft": _peft,
    "portable": _portable,
    "gguf": _gguf,
    "ollama": _ollama,
}
NEED_BASE = ("gguf", "ollama")


def _modelfile(job: Job) -> str:
    tokenizer, prompt = open_tokenizer(job.known.folder), job.adapter.origin.prompt
    chat = bool(getattr(tokenizer, "chat_template", None))
    form = PromptFormat.from_dict(prompt) if prompt else PromptFormat(chat=chat)
    name = job.config.model or base_name(job.config.base, job.config.adapter)
    return modelfile(name, f"./{GGUF}", form, tokenizer, _stops(job.known.folder, tokenizer))


def _stops(folder: Path, tokenizer: Any) -> list[str]:
    """The texts of the tokens that end an answer: the tokenizer's, and those of the generation settings."""
    if tokenizer is None:
        return []
    path = folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    listed: Any = settings.get("eos_token_id")
    ids = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    return [str(tokenizer.convert_ids_to_tokens(one)) for one in dict.fromkeys(ids) if one is not None]


def _result(job: Job) -> Adapter:
    """What was written, as far as it can be run here: read back from a folder of PEFT's, else what went into it."""
    if job.config.to in ("peft", "portable"):
        return load_adapter(job.config.output, job.known, job.config.allow_base_mismatch)
    return portable(job.plain)


def _written(job: Job, difference: Difference) -> list[tuple[str, str]]:
    low = job.adapter.lowrank
    ranks = sorted({one.rank for one in low.values()})
    far = f"{difference.absolute:.2g} ({difference.relative:.2g} of the largest value of an update)"
    rows = [
        ("source", f"{job.config.adapter}: {len(low)} updates of rank {', '.join(map(str, ranks))}"),
        ("read back, largest difference", far if difference.absolute else "none, every value is the same"),
    ]
    if job.config.to != "peft":
        rows.append(
            ("scale", f"folded into B: r = lora_alpha = {max(job.plain.lowrank[p].rank for p in low)}")
        )
    return rows


def _fits(fits: Mapping[str, float]) -> list[tuple[str, str]]:
    """The worst first: |W' - W - B·A| / |W' - W|."""
    worst = sorted(fits, key=fits.__getitem__, reverse=True)
    rows = [(path, f"{fits[path]:.2g}") for path in worst[:WORST]]
    return [*rows, ("all, on average", f"{sum(fits.values()) / len(fits):.2g}")]


def _logits(check: LogitCheck) -> list[tuple[str, str]]:
    return [
        ("largest difference", f"{check.difference:.3g} (the largest value is {check.largest:.3g})"),
        ("same likeliest token", f"{check.same_choice:.1%} of {check.tokens} tokens"),
    ]
