"""What a start can learn from data: watch a model's layers while it runs, and gather their inputs or gradients."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.injection import eval_mode, use
from onebase.adapters.kinds import Target
from onebase.adapters.layers import base_modules
from onebase.adapters.variants import INITS
from onebase.errors import TargetError


class _Scatter:
    """The scatter of a layer's inputs about their mean, (i, i) float32, batch by batch.

    Chan et al. 1983, "Algorithms for Computing the Sample Variance": sums about a running mean do not cancel.
    """

    def __init__(self) -> None:
        self.count, self.mean_i, self.result = 0, torch.zeros(()), None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x_ni = inputs[0].detach().flatten(0, -2).float()
        count, mean_i = x_ni.shape[0], x_ni.mean(0)
        if not count:
            return
        step_i = mean_i - self.mean_i.to(mean_i)
        off_ni = x_ni - mean_i
        added = off_ni.T @ off_ni + torch.outer(step_i, step_i) * (self.count * count / (self.count + count))
        self.result = added if self.result is None else self.result.add_(added)
        self.mean_i = self.mean_i.to(mean_i) + step_i * (count / (self.count + count))
        self.count += count


class _Gradient:
    """The gradient of the loss at W, dYᵀ X (o, i) in float32, summed over backward passes. W itself gets none."""

    def __init__(self) -> None:
        self.result: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        # Nothing of a frozen base asks for a gradient: this zero makes every output from here on carry one.
        output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        x_ni = inputs[0].detach().flatten(0, -2)

        def add(grad: Tensor) -> None:
            found = grad.detach().flatten(0, -2).float().T @ x_ni.float()
            self.result = found if self.result is None else self.result.add_(found)

        output.register_hook(add)
        return output


WATCHES: dict[str, Callable[[], _Scatter | _Gradient]] = {"inputs": _Scatter, "gradients": _Gradient}


@contextmanager
def observed(model: nn.Module, targets: Iterable[Target], init: str) -> Generator[dict[str, Tensor]]:
    """Gather what a start needs while the model runs inside; the dict is filled, by target path, at the end.

    eva: forward passes, and gives the scatter of each layer's inputs about their mean, (in, in). lora_ga: forward
    and backward passes of a mean loss, and gives the gradient at each weight, (out, in); more passes add up. Other
    starts need nothing and get nothing. Every row of an input counts: leave padding out. The base runs in eval
    mode, without adapters, and is not written to; the hooks are gone afterwards, also after an error. Raises
    TargetError where a target took no part.

        targets = match(model, config).targets
        with observed(model, targets, "eva") as seen:
            model(**batch)
        adapter = new_adapter(model, config, seen=seen)
    """
    row, modules = INITS[init], dict(base_modules(model))
    make = WATCHES.get(row.needs)
    watches = {t.path: make() for t in targets if t.site.kind in row.kinds} if make else {}
    found: dict[str, Tensor] = {}
    handles = [modules[path].register_forward_hook(watch) for path, watch in watches.items()]
    try:
        with eval_mode(model), use(model, None):
            yield found
    finally:
        for handle in handles:
            handle.remove()
    unseen = [path for path, watch in watches.items() if watch.result is None]
    if unseen:
        said = f"{len(unseen)} targets took no part in the pass over data: {', '.join(unseen[:5])}"
        raise TargetError(f"init {init}", said, hint="leave them out with --exclude-modules")
    found |= {path: watch.result.cpu() for path, watch in watches.items() if watch.result is not None}
