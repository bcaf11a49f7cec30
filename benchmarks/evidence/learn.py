"""The two ways to train, an adapter on a frozen base and every weight of it, by one loop: onebase's own step.

Full fine-tuning exists here only. Both see the same rows in the same order and take the same loss, schedule, clipping
and AdamW. In a bfloat16 setting the adapter learns in float32 on the base in bfloat16; full fine-tuning learns float32
weights, which autocast rounds to bfloat16 for each product, as mixed precision does everywhere. In float32 both are
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.evidence.plan import METHODS, Method
from benchmarks.evidence.settings import Setting
from benchmarks.evidence.tiny import tiny_base
from onebase.adapters.adapter import Adapter, Origin
from onebase.adapters.injection import (
    base_tensors,
    eject,
    eval_mode,
    extract,
    inject,
    new_adapter,
    trainable,
    use,
)
from onebase.config import LoraConfig, OptimConfig
from onebase.data.pack import by_length, mixed, step_rows
from onebase.data.template import Encoded
from onebase.evaluation import mean_loss
from onebase.models.base import Base, load_base
from onebase.models.fingerprint import tensor_digests
from onebase.models.scoring import Loss, Scorer, Way, choose, loss_tokens, packed_loss, scorer, whole_loss
from onebase.training.optim import learned, lr_factor, make_optimizer, set_lr
from onebase.training.step import train_step

NAME = "evidence"
AGREE = {"float32": 1e-4, "bfloat16": 3e-2}  # how far a first loss may be from the plain base's, relative


def open_base(setting: Setting, dtype: str = "", name: str = "") -> Base:
    """The setting's base, or one of another name."""
    dtype, name = dtype or setting.dtype, name or setting.base
    return tiny_base(dtype) if name == "tiny" else load_base(name, dtype)


def own_weights(base: Base) -> Base:
    """The base with weights that may be changed, where others are mapped from a file."""
    for parameter in base.model.parameters():
        parameter.data = parameter.data.clone()
    return base


@dataclass
class Learner:
    """What trains: its loss, its parameters, the adapter that it has become (None: the base itself has changed)."""

    base: Base
    loss: Loss
    parameters: Mapping[str, nn.Parameter]
    score: Scorer  # of what it is now
    way: Way
    adapter: Callable[[], Adapter | None]
    proof: dict[str, Any] = field(default_factory=dict)  # what was found of the base once it ended

    def loss_of(self, rows: Sequence[Encoded]) -> float:
        """The mean loss over the rows' targets, as it is now."""
        return mean_loss(self.score, rows, 16)[0]


def lora_config(method: Method) -> LoraConfig:
    """The adapter's options."""
    return LoraConfig(**dict(method.lora or {}))


def optim_config(method: Method, lr: float, steps: int, batch_size: int) -> OptimConfig:
    """The optimiser's options: onebase's defaults but for the rate, the steps and the batch."""
    return OptimConfig(lr=lr, max_steps=steps, batch_size=batch_size, **dict(method.optim))


class Course(NamedTuple):
    """What a run learns from, and on what: `base` for an adapter; for all weights what `own` opens, in float32."""

    base: Base
    own: Callable[[], Base]
    rows: Sequence[Encoded]
    probe: Sequence[Encoded]  # held-out rows, to prove things by
    config: OptimConfig


@contextmanager
def learner(name: str, seed: int, course: Course) -> Generator[Learner]:
    """A method at its start. What it has to say of the base, `proof`, is whole afterwards."""
    method = METHODS[name]
    if method.lora is None:
        with _every_weight(own_weights(course.own()), course.base.dtype) as made:
            yield made
        return
    with _adapter(course.base, method, seed, course.probe) as made:
        yield made


@contextmanager
def _adapter(base: Base, method: Method, seed: int, rows: Sequence[Encoded]) -> Generator[Learner]:
    model: Any = base.model
    before, logits = tensor_digests(base_tensors(model)), _logits(model, rows)
    # A head that was drawn is trained in full; what makes no vector is left out.
    unused = "re:" + "|".join(rf"{name}\..*" for name in base.unused) if base.unused else ()
    config = replace(lora_config(method), modules_to_save=base.drawn, exclude_modules=unused)
    adapter = new_adapter(model, config, seed, Origin(base.name, base.fingerprint))
    way = choose(base, "auto", adapter, rows[:4])
    inject(model, adapter, NAME)
    try:
        with eval_mode(model), use(model, NAME):
            parameters = trainable(model, NAME)
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            score = scorer(base, way, NAME)
            made = Learner(base, score.loss, parameters, score, way, lambda: extract(model, NAME))
            yield made
            with use(model, None):
                made.proof["off_equal"] = bool(torch.equal(_logits(model, rows), logits))
    finally:
        eject(model, [NAME])
    made.proof |= _changed(before, tensor_digests(base_tensors(model)))
    made.proof["ejected_equal"] = bool(torch.equal(_logits(model, rows), logits))


@contextmanager
def _every_weight(base: Base, dtype: str) -> Generator[Learner]:
    model: Any = base.model
    before = tensor_digests(base_tensors(model))
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    plain = plain_loss(base)
    rounds = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    def loss(rows: Sequence[Encoded]) -> Tensor:
        with rounds:
            return plain(rows)

    way = Way("packed" if base.reader is None else "padded")
    made = Learner(
        base, loss, parameters, Scorer(loss, by_length if base.embedder is None else mixed), way, lambda: None
    )
    with eval_mode(model):
        yield made
    made.proof |= _changed(before, tensor_digests(base_tensors(model)))
    for parameter in parameters.values():
        parameter.grad = None


def _logits(model: Any, rows: Sequence[Encoded]) -> Tensor:
    """The plain base's logits of the first row; its states where it makes vectors."""
    with torch.no_grad(), use(model, None):
        return model(input_ids=torch.tensor([rows[0].ids]))[0]


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, int]:
    return {"tensors": len(before), "changed": sum(before[name] != after.get(name) for name in before)}


def plain_loss(base: Base) -> Loss:
    """Through transformers' own layers: packed rows, or, where a label or vector belongs to a row, padded ones."""
    model: Any = base.model
    return packed_loss(model) if base.reader is None else whole_loss(base)


class Fitted(NamedTuple):
    """What training gave: each step's mean loss, and how many tokens its rows had."""

    losses: list[float]
    tokens: int


def batches(rows: Sequence[Encoded], config: OptimConfig, seed: int, step: int) -> list[list[Encoded]]:
    """The step's rows, as `onebase train` would take them."""
    parts = step_rows(len(rows), config.batch_size, config.accumulate, seed, step)
    return [[rows[index] for index in part] for part in parts]


def fused_adamw(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """onebase's optimiser by torch's fused update, without which full fine-tuning would wait for memory most."""
    made = make_optimizer(learned(parameters, config), config)
    for group in made.param_groups:
        group["fused"] = True
    return made


def fit(
    made: Learner,
    rows: Sequence[Encoded],
    config: OptimConfig,
    seed: int,
    look: Callable[[int], None] = lambda step: None,
) -> Fitted:
    """Train for `config.max_steps`; `look` is called with the number of steps done, before the first and after each.

    Raises Diverged where a loss is not finite.
    """
    optimizer = fused_adamw(made.parameters, config)
    losses: list[float] = []
    tokens = 0
    look(0)
    for step in range(config.max_steps):
        set_lr(optimizer, lr_factor(step, config.max_steps, config))
        result = train_step(
            made.loss, made.parameters, optimizer, batches(rows, config, seed, step), config.clip
        )
        losses.append(result.loss)
        tokens += result.tokens
        look(step + 1)
    return Fitted(losses, tokens)


def require_same_start(losses: Sequence[float], base: Base, first: Sequence[Encoded]) -> float:
    """How far a run's first loss is from the plain base's on the same rows, relative; too far ends the program.

    So both methods start from one function, with the same batches, packing and loss.
    """
    with torch.no_grad(), eval_mode(base.model), use(base.model, None):
        plain = float(plain_loss(base)(first)) / loss_tokens(first)
    off = abs(losses[0] / plain - 1)
    if off > AGREE[base.dtype]:
        raise SystemExit(f"the first loss is {losses[0]:.5f}, the plain base's {plain:.5f}: no comparison")
    return off
