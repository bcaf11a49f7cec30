"""The work that the training benchmarks share: rows as token ids, an adapter to start from, and each side's loop.

`sides.py` runs one of them in a fresh process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter, Origin
from onebase.adapters.injection import inject, new_adapter, trainable
from onebase.config import DataConfig, LoraConfig
from onebase.data.read import read_examples
from onebase.data.template import Encoded, encode
from onebase.models.base import Base, load_base, locate_base
from onebase.models.engine import engine_problem
from onebase.models.scoring import Thrift, Way, loss_tokens, scorer
from onebase.storage.format import load_adapter, save_adapter

BASE = "smollm2-135m"
DATA = "../shared/data/e2e/valid.jsonl"
RANK, ALPHA, LR, CLIP = 8, 16.0, 5e-4, 1.0
WARM_UP = 2  # steps that are not timed
# How far loss and gradients may be from PEFT's, relative; in bfloat16 what rounding makes of them.
EXACT = {"float32": (1e-5, 1e-4), "bfloat16": (3e-2, 3e-1)}


OPTIONS: dict[str, dict[str, Any]] = {
    "base": {"default": BASE, "help": f"base model (default: {BASE})"},
    "data": {"default": DATA, "help": f"rows with prompt and completion (default: {DATA})"},
    "steps": {"type": int, "default": 6, "help": "optimiser steps that are timed (default: 6)"},
    "batch-size": {"type": int, "default": 16, "help": "rows in a batch (default: 16)"},
    "dtype": {"default": "float32", "choices": ("float32", "bfloat16"), "help": "the base's dtype"},
}


def options(made: argparse.ArgumentParser, without: Sequence[str] = ()) -> argparse.ArgumentParser:
    """What the training benchmarks can be told; `without` what this one does not read."""
    for name, told in OPTIONS.items():
        if name not in without:
            made.add_argument(f"--{name}", **told)
    return made


def load_rows(base: Base, data: str, limit: int = 0) -> list[Encoded]:
    """The file's rows as token ids; the answer and the end of text carry loss."""
    config = DataConfig(data=data, holdout=0, limit=limit)
    examples = read_examples(data, config)
    return list(encode(base.tokenizer, examples, config, base.stop_ids, base.context).rows)


def start_adapter(base: Base, folder: Path) -> Adapter:
    """The adapter that every side starts from, saved in PEFT's format: B away from 0, so that all of it works."""
    config = LoraConfig(rank=RANK, alpha=ALPHA)
    adapter = new_adapter(base.model, config, 0, Origin(str(base.name), base.fingerprint))
    draw = torch.Generator().manual_seed(0)
    low = {
        p: one._replace(B=torch.randn(one.B.shape, generator=draw) * 1e-3)
        for p, one in adapter.lowrank.items()
    }
    adapter = Adapter(adapter.config, low, {}, origin=adapter.origin)
    save_adapter(adapter, folder, overwrite=True)
    return adapter


def prompt_length(row: Encoded) -> int:
    """Tokens before the first one that carries loss."""
    return row.loss.index(True) if True in row.loss else len(row.ids)


def shuffled(rows: Sequence[Encoded], batch_size: int, steps: int) -> list[list[Encoded]]:
    """Batches of rows in a seeded order, without regard to length or prompt."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [[rows[i] for i in order[n * batch_size : (n + 1) * batch_size]] for n in range(steps)]


def bucketed(batches: Sequence[Sequence[Encoded]]) -> list[list[Encoded]]:
    """The same rows, batched by length: what a careful user of PEFT does."""
    size = len(batches[0])
    rows = sorted((row for batch in batches for row in batch), key=lambda row: len(row.ids))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def grouped(rows: Sequence[Encoded], batch_size: int, steps: int) -> list[list[Encoded]]:
    """Batches in which the rows of one prompt stand together, prompts in a seeded order."""
    groups: dict[tuple[int, ...], list[Encoded]] = {}
    for row in rows:
        groups.setdefault(tuple(row.ids[: prompt_length(row)]), []).append(row)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    keys = list(groups)
    line = [row for index in order for row in groups[keys[index]]]
    return [line[n * batch_size : (n + 1) * batch_size] for n in range(steps)]


@dataclass(frozen=True)
class Work:
    """One side's share: a loss function of a batch of rows, and what learns."""

    loss: Callable[[Sequence[Encoded]], Tensor]  # mean nats over the batch's targets
    parameters: dict[str, nn.Parameter]  # by our names: path.A, path.B
    base: Base | None = None  # where it is ours

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW with PEFT scripts' settings, fused as transformers' Trainer and onebase take it, the same for all."""
        return torch.optim.AdamW(self.parameters.values(), lr=LR, weight_decay=0.0, fused=True)


def our_work(base: Base, adapter: str | Path, share: bool, checkpoint: bool = False) -> Work:
    """onebase as `onebase train` runs it: the engine where the model proves able."""
    inject(base.model, load_adapter(adapter, base), "bench")
    way = Way("engine")
    text: Any = base.tokenizer
    text = text("Once upon a time there was a small robot in a big house near the sea.")["input_ids"]
    if problem := engine_problem(base.model, "bench", text):
        raise SystemExit(f"the engine does not take this base: {problem}")
    parameters = trainable(base.model, "bench")
    for p in parameters.values():
        p.requires_grad_(True)
    total = scorer(base, way, "bench", Thrift(checkpoint, share)).loss
    return Work(lambda rows: total(rows) / loss_tokens(rows), parameters, base)


def peft_work(folder: str | Path, adapter: str | Path, dtype: str, tuned: bool) -> Work:
    """PEFT on padded batches: full logits, as its users write it; `tuned`: logits only where there is loss."""
    return on_peft(open_plain(folder, dtype), adapter, tuned)


def open_plain(folder: str | Path, dtype: str) -> nn.Module:
    """The base as transformers opens it, and PEFT loaded, so that what its import takes is not the training's."""
    importlib.import_module("peft")
    from transformers import AutoModelForCausalLM

    warnings.simplefilter("ignore")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def on_peft(model: Any, adapter: str | Path, tuned: bool) -> Work:
    """`peft_work` for a model that is open."""
    from peft import PeftModel

    peft = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    named = {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.default.weight", ".A")
        .replace(".lora_B.default.weight", ".B"): p
        for name, p in peft.named_parameters()
        if p.requires_grad
    }
    return Work((_tuned_loss if tuned else _plain_loss)(peft), named)


def _padded(rows: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and labels (-100: no loss), each (rows, longest)."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
    labels = [[t if on else -100 for t, on in zip(row.ids, row.loss, strict=True)] for row in rows]
    return ids, mask, torch.tensor([one + [-100] * (width - len(one)) for one in labels])


def _plain_loss(model: Any) -> Callable[[Sequence[Encoded]], Tensor]:
    def loss(rows: Sequence[Encoded]) -> Tensor:
        ids, mask, labels = _padded(rows)
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    return loss


def _tuned_loss(model: Any) -> Callable[[Sequence[Encoded]], Tensor]:
    causal = model.get_base_model()

    def loss(rows: Sequence[Encoded]) -> Tensor:
        ids, mask, labels = _padded(rows)
        hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        wanted = labels[:, 1:] != -100
        return F.cross_entropy(causal.lm_head(hidden[:, :-1][wanted]).float(), labels[:, 1:][wanted])

    return loss


def train(work: Work, batches: Sequence[Sequence[Encoded]]) -> Iterator[tuple[float, float]]:
    """(loss, seconds) of each step: forward, backward, clipping, AdamW."""
    optimizer = work.optimizer()
    for batch in batches:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = work.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(work.parameters.values(), CLIP)
        optimizer.step()
        yield float(loss.detach()), time.perf_counter() - start


def gradients(work: Work, batch: Sequence[Encoded]) -> dict[str, Tensor]:
    """The gradient of one batch's loss, by parameter."""
    work.loss(batch).backward()
    found = {name: p.grad.clone() for name, p in work.parameters.items() if p.grad is not None}
    for p in work.parameters.values():
        p.grad = None
    return found


def tokens(batches: Sequence[Sequence[Encoded]]) -> int:
    """Tokens of the rows; padding does not count."""
    return sum(len(row.ids) for batch in batches for row in batch)


def keep_pages() -> None:
    """glibc: take large tensors from a heap that is not given back, so that each step does not fault it in anew."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for what, value in (
            (-3, 1 << 30),
            (-1, -1 & 0x7FFFFFFF),
            (-4, 0),
        ):  # mmap threshold, trim, mmap count
            libc.mallopt(what, value)


def open_base(name: str, dtype: str) -> Base:
    """The base as a training run opens it."""
    return load_base(name, dtype)


# -- Where a side in a fresh process finds its work.


class Place(NamedTuple):
    """What a side needs to begin: the base's folder, one with the start adapter and the batches, the base's dtype."""

    base: str
    folder: str
    dtype: str

    @property
    def adapter(self) -> str:
        return str(Path(self.folder) / "adapter")

    @property
    def batches(self) -> Path:
        return Path(self.folder) / "batches.json"


Order = Callable[[Sequence[Encoded], int, int], list[list[Encoded]]]


def prepare(given: argparse.Namespace, folder: str, order: Order) -> Place:
    """Write the batches, the same for all sides, and the adapter that they start from."""
    place = Place(str(locate_base(given.base)), folder, given.dtype)
    base = open_base(given.base, given.dtype)
    batches = order(load_rows(base, given.data), given.batch_size, WARM_UP + given.steps)
    if any(len(batch) < given.batch_size for batch in batches):
        raise SystemExit(f"{given.data} has too few rows for {len(batches)} batches of {given.batch_size}")
    start_adapter(base, Path(place.adapter))
    place.batches.write_text(json.dumps(batches))
    return place


def read_batches(place: Place) -> list[list[Encoded]]:
    return [[Encoded(*row) for row in batch] for batch in json.loads(place.batches.read_text())]
