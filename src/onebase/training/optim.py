"""AdamW over an adapter's factors, the usual and LoRA+'s learning rates, and the schedule as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from onebase.config import OptimConfig
from onebase.errors import ConfigError, FormatError

FUSED = ("cpu", "cuda")  # the devices where torch has AdamW as one kernel
STATE = ("exp_avg", "exp_avg_sq", "step")
USUAL_LR, MEASURED_WIDTH = 1e-3, 576  # docs/evidence.md, 4


def usual_lr(width: int | None) -> float:
    """The learning rate for a base of this width where none is named; `width`: None where a base has no single one.

    What was measured, and on wider bases its root's law. From 1,024 to 4,096 that lies between, or within a tenth of,
    what Schulman et al. 2025 fit to Llamas and to Qwens, 5e-4 · (2000 / width)^p with p of 0.78 and 0.08.
    """
    return USUAL_LR * min(1.0, MEASURED_WIDTH / (width or MEASURED_WIDTH)) ** 0.5


def learned(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> dict[str, nn.Parameter]:
    """The parameters that learn: all, or with freeze_a all but A (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303)."""
    return {n: p for n, p in parameters.items() if not (config.freeze_a and n.endswith(".A"))}


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """PyTorch's AdamW; with lora_plus the B factors learn that many times faster (Hayou et al. 2024).

    Raises ConfigError where the learning rate is the 0 that stands for a base's usual one.
    """
    if not config.lr:
        raise ConfigError(
            "option lr", "is 0: nothing would be learnt", hint="usual_lr gives that of a base's width"
        )
    groups = [
        {"params": [p for n, p in parameters.items() if not n.endswith(".B")], "peak": config.lr},
        {
            "params": [p for n, p in parameters.items() if n.endswith(".B")],
            "peak": config.lr * config.lora_plus,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        # One pass over each parameter's state.
        fused=all(p.device.type in FUSED for p in parameters.values()),
    )


SHAPES: dict[
    str, Callable[[float], float]
] = {  # share of the way from warm-up's end to the last step -> factor
    "linear": lambda way: 1.0 - way,
    "cosine": lambda way: 0.5 * (1.0 + math.cos(math.pi * way)),
    "constant": lambda way: 1.0,
}


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """The learning rate of 0-based `step` as a part of its peak. The first step already learns."""
    warm = round(config.warmup * total) if config.warmup < 1 else int(config.warmup)
    if step < warm:
        return (step + 1) / (warm + 1)
    return SHAPES[config.schedule]((step - warm) / max(total - warm, 1))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to its peak times the factor; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return float(optimizer.param_groups[0]["lr"])


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: `path.A/exp_avg` and so on."""
    return {
        f"{name}/{key}": tensor
        for name, parameter in parameters.items()
        for key, tensor in (optimizer.state.get(parameter) or _start(parameter)).items()
    }


def _start(parameter: nn.Parameter) -> dict[str, Tensor]:
    """What AdamW starts from, for a parameter that never had a gradient."""
    zeros = torch.zeros_like(parameter)
    return dict(zip(STATE, (zeros, zeros.clone(), torch.tensor(0.0)), strict=True))


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, bit for bit. Raises FormatError where a tensor is missing."""
    missing = [f"{n}/{key}" for n in parameters for key in STATE if f"{n}/{key}" not in tensors]
    if missing:
        raise FormatError("optimizer state of the checkpoint", f"lacks {', '.join(missing[:5])}")
    for name, parameter in parameters.items():
        moments = {key: tensors[f"{name}/{key}"].to(parameter.device, copy=True) for key in STATE[:2]}
        optimizer.state[parameter] = moments | {"step": tensors[f"{name}/step"].clone()}
