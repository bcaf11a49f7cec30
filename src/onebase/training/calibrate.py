"""A pass over the first training rows, for starts that look at data."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from onebase.adapters.calibration import WATCHES, observed
from onebase.adapters.variants import INITS
from onebase.config import TrainConfig
from onebase.data.pack import step_rows, steps_per_epoch
from onebase.data.template import Encoded
from onebase.models.base import Base
from onebase.models.scoring import loss_tokens, whole_loss
from onebase.training.prepare import Prepared

BATCHES = 8  # 128 rows with the default batch size


def calibrate(base: Base, config: TrainConfig, ready: Prepared) -> dict[str, Tensor]:
    """What the run's start needs from data, by target path; empty, and no pass, where it needs nothing.

    The rows are those of the run's first BATCHES batches, or of one epoch if it has fewer; one at a time, so that
    padding counts nowhere. The loss is the mean over all their loss tokens, as a step's is.
    """
    init = config.lora.init
    if INITS[init].needs not in WATCHES:
        return {}
    rows = [row for batch in _first_batches(ready, config) for row in batch]
    backward = INITS[init].needs == "gradients"
    with (
        observed(base.model, ready.coverage.targets, init) as seen,
        nullcontext() if backward else torch.no_grad(),
    ):
        for row in rows:
            loss = whole_loss(base)([row])
            if backward:
                (loss / max(loss_tokens(rows), 1)).backward()
    return seen


def _first_batches(ready: Prepared, config: TrainConfig) -> list[list[Encoded]]:
    rows, optim = ready.data.train_rows.rows, config.optim
    steps = min(BATCHES, steps_per_epoch(len(rows), optim.batch_size, optim.accumulate))
    indices = [
        batch
        for step in range(steps)
        for batch in step_rows(len(rows), optim.batch_size, optim.accumulate, config.seed, step)
    ]
    return [[rows[index] for index in batch] for batch in indices[:BATCHES]]
