"""What a run is going to be: sizes, tokens, steps and an estimate of its memory, before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from onebase.adapters.layers import base_modules
from onebase.adapters.targets import CoverageRow, first_layer
from onebase.adapters.tokens import token_targets
from onebase.adapters.variants import sizes
from onebase.config import TrainConfig
from onebase.data.pack import prompt_groups, step_rows, steps_per_epoch
from onebase.data.template import Encoded
from onebase.data.trie import filled_length
from onebase.models.base import Base
from onebase.models.scoring import loss_tokens
from onebase.training.loop import total_steps
from onebase.training.memory import IMPORTED, LENGTH, ROW_TOKEN, RUNTIME, TRAINED, WAYS, Batch
from onebase.training.prepare import Prepared
from onebase.training.work import Load, load_of, padded_load

SHARED_AMONG = 8  # of so many batches with the most tokens in their rows is counted what they share


@dataclass(frozen=True)
class Plan:
    """The numbers that are shown before training. Sizes in bytes."""

    trainable: int
    total: int
    base_bytes: int
    running: int  # the most memory while it trains
    opening: int  # the most memory while the base is opened
    rows: int
    valid_rows: int
    tokens: int  # in one pass
    loss_tokens: int
    steps: int
    lr: float  # the peak
    dtype: str
    way: str  # how rows are scored
    coverage: list[CoverageRow]
    token_rows: list[str]  # a line for each token whose rows are trained
    labels: Mapping[str, float]  # as in data.preview.DataSummary
    kind: str  # likewise

    @property
    def memory(self) -> int:
        """The most that the process holds at any time."""
        return max(self.running, self.opening)

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
        running=_running(base, config, ready, (low + full, fixed)),
        opening=_opening(base),
        rows=len(rows),
        valid_rows=len(ready.data.valid_rows.rows),
        tokens=sum(len(row.ids) for row in rows),
        loss_tokens=sum(row.targets for row in rows),
        steps=total_steps(len(rows), config.optim),
        lr=config.optim.lr,
        dtype=f"{base.dtype} ({base.dtype_reason})",
        way=ready.way.shown + _kept(base, config, ready),
        coverage=ready.coverage.rows(),
        token_rows=ready.words.lines,
        labels=ready.data.summary.labels,
        kind=ready.data.summary.kind,
    )


def _kept(base: Base, config: TrainConfig, ready: Prepared) -> str:
    """What --cache-activations keeps, for the plan's line on how rows are scored."""
    if not config.optim.cache_activations:
        return ""
    rows = {tuple(row.ids) for part in (ready.data.train_rows, ready.data.valid_rows) for row in part.rows}
    states = base.model.get_input_embeddings().weight[0].nbytes  # pyright: ignore[reportCallIssue]
    size = sum(map(len, rows)) * states / 1e6
    return f"; layers 0-{first_layer(ready.coverage.targets) - 1} computed once, {size:,.0f} MB on disk while it runs"


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


def _running(base: Base, config: TrainConfig, ready: Prepared, values: tuple[int, int]) -> int:
    """The peak while the run trains, by `memory`'s count; `values`: how many are trained, and how many are fixed."""
    batch = _largest_batch(config, ready)
    trained, fixed = values
    data = ready.data
    rows = ROW_TOKEN * sum(len(row.ids) for part in (data.train_rows, data.valid_rows) for row in part.rows)
    activations = WAYS[ready.way.name](base.model, ready.coverage.targets, batch, config.optim.recompute)
    kept = LENGTH * batch.lengths + rows + activations
    return shared_memory(base) + TRAINED * trained + 4 * fixed + kept


def _opening(base: Base) -> int:
    """The peak while the base is opened: where it is stored in another dtype, as it is stored and as it is used."""
    held = _held(base)
    converted = abs(base.stored_bytes - held) > held // 4
    return IMPORTED + held + (base.stored_bytes if converted else 0)


def _held(base: Base) -> int:
    return sum(parameter.nbytes for parameter in base.model.parameters())


def shared_memory(base: Base) -> int:
    """The part of a plan's memory that runs on the same base, in one process, have in common."""
    return RUNTIME + _held(base)


def memory_together(base: Base, plans: Sequence[Plan]) -> int:
    """The plans' memory in one process, at the same time."""
    shared = shared_memory(base)
    return max(_opening(base), shared + sum(plan.running - shared for plan in plans))


def _largest_batch(config: TrainConfig, ready: Prepared) -> Batch:
    """The largest batch of the first epoch: padding counts where rows are padded, a shared prefix once where it is."""
    rows, optim, way = ready.data.train_rows.rows, config.optim, ready.way.name
    groups = prompt_groups(rows) if optim.group_prompts else ()
    one_pass = steps_per_epoch(len(rows), optim.batch_size, optim.accumulate)
    batches = [
        [rows[index] for index in batch]
        for step in range(min(one_pass, total_steps(len(rows), optim)))
        for batch in step_rows(len(rows), optim.batch_size, optim.accumulate, config.seed, step, groups)
    ]
    whole = [_load(batch, way) for batch in batches]
    tokens, losses, lengths = max(one.tokens for one in whole), max(one.losses for one in whole), 1
    if way == "engine":
        largest = sorted(range(len(batches)), key=lambda index: whole[index].tokens)[-SHARED_AMONG:]
        tokens = filled_length(max(load_of(batches[index], True).tokens for index in largest))
        lengths = len({filled_length(one.tokens) for one in whole})
    return Batch(tokens, losses, max(len(row.ids) for row in rows), lengths)


def _load(batch: list[Encoded], way: str) -> Load:
    """As if no prefix were shared: quick to count for many batches."""
    return (
        padded_load(batch)
        if way == "padded"
        else Load(sum(len(row.ids) for row in batch), loss_tokens(batch), 0)
    )
