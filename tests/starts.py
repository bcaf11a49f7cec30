"""Starts for tests: what each needs from data, and the half of an update that is trained."""

import torch

from onebase.adapters.adapter import LowRank, parted
from onebase.adapters.calibration import observed
from onebase.adapters.targets import match
from onebase.config import LoraConfig
from tiny import some_ids


def seen_by(model, config: LoraConfig, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """What a start needs from data; the loss of lora_ga is any scalar."""
    with observed(model, match(model, config).targets, config.init) as seen:
        logits = model(input_ids=some_ids(8, 12) if ids is None else ids).logits
        if config.init == "lora_ga":
            logits.square().mean().backward()
    return seen


def first_half(low: LowRank) -> LowRank:
    """What a held start trains."""
    return parted(low, low.rank // 2)[0]
