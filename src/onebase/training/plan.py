"""What a run is going to be: sizes, tokens, steps and an estimate of its memory, before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from onebase.adapters.kinds import KINDS, kind_of
from onebase.adapters.layers import base_modules
from onebase.adapters.targets import CoverageRow, output_head
from onebase.adapters.tokens import token_targets
from onebase.adapters.variants import sizes
from onebase.config import TrainConfig
from onebase.data.pack import prompt_groups, step_rows, steps_per_epoch
from onebase.data.template import Encoded
from onebase.models.base import Base
from onebase.training.loop import total_steps
from onebase.training.prepare import Prepared

_RUNTIME = 400 << 20  # Python, PyTorch and transformers themselves, as measured at start-up


@dataclass(frozen=True)
class Plan:
    """The numbers that are shown before training. Sizes in bytes."""

    trainable: int
    total: int
    base_bytes: int
    memory: int
    rows: int
    valid_rows: int
    tokens: int  # in one pass
    loss_tokens: int
    steps: int
    dtype: str
    way: str  # how rows are scored
    coverage: list[CoverageRow]
    token_rows: list[str]  # a line for each token whose rows are trained
    labels: Mapping[str, float]  # as in data.preview.DataSummary
    kind: str  # likewise

    @property
    def share(self) -> float:
        """Trainable parameters as a part of all."""
        return self.trainable / self.total


def make_plan(base: Base, config: TrainConfig, ready: Prepared) -> Plan:
    """Count what the run will train and take."""
    rows = ready.data.train_rows.rows
    modules = dict(base_modules(base.model))
    low, fixed = _update_sizes(config, ready, modules)
    full = sum(p.numel() for path in ready.coverage.full for p in modules[path].parameters())
    full += _row_values(base, config, ready)
    return Plan(
        trainable=low + full,
        total=base.parameters + low + full + fixed,
        base_bytes=base.stored_bytes,
        memory=4 * fixed
        + _memory(base, low + full, _largest_batch(rows, config, ready.way.name != "padded")),
        rows=len(rows),
        valid_rows=len(ready.data.valid_rows.rows),
        tokens=sum(len(row.ids) for row in rows),
        loss_tokens=sum(row.targets for row in rows),
        steps=total_steps(len(rows), config.optim),
        dtype=f"{base.dtype} ({base.dtype_reason})",
        way=ready.way.shown,
        coverage=ready.coverage.rows(),
        token_rows=ready.words.lines,
        labels=ready.data.summary.labels,
        kind=ready.data.summary.kind,
    )


def _update_sizes(config: TrainConfig, ready: Prepared, modules: Mapping[str, nn.Module]) -> tuple[int, int]:
    """How many values of the updates are trained, and how many are fixed: A with freeze_a, what a start holds."""
    found = [sizes(t, config.lora, modules[t.site.owner]) for t in ready.coverage.targets]
    fixed = sum(one.held + (one.A if config.optim.freeze_a else 0) for one in found)
    return sum(sum(one) for one in found) - fixed, fixed


def _row_values(base: Base, config: TrainConfig, ready: Prepared) -> int:
    """The values of trained token rows."""
    lora = replace(config.lora, trainable_tokens=ready.words.names)
    rows = token_targets(base.model, lora)
    return sum(len(ids) * base.model.get_parameter(f"{path}.weight").shape[1] for path, ids in rows.items())


def _memory(base: Base, trainable: int, batch: tuple[int, int]) -> int:
    """An estimate of the peak: weights, 16 bytes a trained value (itself, gradient, two moments), activations.

    Autograd keeps about the input and output of every linear layer for each token of the largest batch, in the
    base's dtype and for A in float32, and three float32 copies of the logits where there is loss. What the
    allocator and oneDNN's cache of shapes keep on top in a long run is not counted (docs/LOG.md).
    """
    size = next(base.model.parameters()).element_size()
    kept = sum(sum(KINDS["linear"].shape(m)) for m in _linears(base.model))
    tokens, losses = batch
    head = output_head(base.model)
    vocabulary = KINDS[kind].shape(head)[1] if head is not None and (kind := kind_of(head)) else 0
    activations = tokens * kept * (size + 4) + losses * vocabulary * (size + 12)
    return shared_memory(base) + 16 * trainable + activations


def shared_memory(base: Base) -> int:
    """The part of a plan's memory that runs on the same base, in one process, have in common."""
    return _RUNTIME + sum(parameter.nbytes for parameter in base.model.parameters())


def memory_together(base: Base, plans: Sequence[Plan]) -> int:
    """The plans' memory in one process, at the same time."""
    shared = shared_memory(base)
    return shared + sum(plan.memory - shared for plan in plans)


def _linears(model: nn.Module) -> list[nn.Module]:
    head = output_head(model)
    return [m for _, m in base_modules(model) if isinstance(m, nn.Linear) and m is not head]


def _largest_batch(rows: list[Encoded], config: TrainConfig, packed: bool) -> tuple[int, int]:
    """Tokens and loss tokens of the largest batch of the first epoch, padding included."""
    optim, largest = config.optim, (0, 0)
    groups = prompt_groups(rows) if optim.group_prompts else ()
    one_pass = steps_per_epoch(len(rows), optim.batch_size, optim.accumulate)
    for step in range(min(one_pass, total_steps(len(rows), optim))):
        for batch in step_rows(len(rows), optim.batch_size, optim.accumulate, config.seed, step, groups):
            lengths = [len(rows[index].ids) for index in batch]
            tokens = sum(lengths) if packed else max(lengths) * len(lengths)
            largest = max(largest, (tokens, sum(rows[index].targets for index in batch)))
    return largest
