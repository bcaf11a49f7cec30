"""Weights that are no longer the base's after merging and unmerging in memory, ours against PEFT's.

The first layers of the built-in base in three dtypes; the adapted layers' weights are compared bit by bit.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.common import Gate, Result, parser, random_update, show
from onebase.models.base import locate_base
from onebase.storage.format import save_adapter
from onebase.transforms.merge import merge_in_memory, unmerge

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CYCLES = (1, 10, 100)


Weights = Callable[[], dict[str, Tensor]]


def shares(weights: Weights, cycle: Callable[[], object]) -> dict[int, float]:
    """Cycles -> share of the weights that are no longer what they were, of a side's own cycle."""
    before = {name: weight.clone() for name, weight in weights().items()}
    total = sum(weight.numel() for weight in before.values())
    found: dict[int, float] = {}
    for count in range(1, max(CYCLES) + 1):
        cycle()
        if count in CYCLES:
            found[count] = sum(int((w != before[name]).sum()) for name, w in weights().items()) / total
    return found


def both(dtype: torch.dtype, layers: int, folder: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Ours and the peer's shares, from the same weights and the same adapter."""
    model = AutoModelForCausalLM.from_pretrained(
        locate_base("smollm2-135m"), num_hidden_layers=layers, dtype=dtype
    ).requires_grad_(False)
    adapter = random_update(model)
    save_adapter(adapter, folder / "adapter")

    def own() -> dict[str, Tensor]:
        return {path: model.get_submodule(path).weight for path in adapter.lowrank}

    ours = shares(own, lambda: unmerge(merge_in_memory(model, adapter)))
    with warnings.catch_warnings(action="ignore"):
        peer = PeftModel.from_pretrained(model, folder / "adapter")

    def theirs() -> dict[str, Tensor]:
        return {path: peer.base_model.model.get_submodule(path).base_layer.weight for path in adapter.lowrank}

    def cycle() -> None:
        peer.merge_adapter()
        peer.unmerge_adapter()

    return ours, shares(theirs, cycle)


def main(options: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ours: dict[str, float] = {}
    peer: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        with tempfile.TemporaryDirectory() as folder:
            mine, theirs = both(dtype, options.layers, Path(folder))
        ours |= {f"{name} after {count}": share for count, share in mine.items()}
        peer |= {f"{name} after {count}": share for count, share in theirs.items()}
    rows = [(key, f"{ours[key]:.2%}", f"{peer[key]:.2%}") for key in ours]
    show("share of weights changed by merging and unmerging", ("cycles", "onebase", "PEFT"), rows)
    gate = Gate("largest share of ours", max(ours.values()), 0.0)
    target = dict.fromkeys(ours, 0.0)
    print(Result("unmerge_drift", ours, peer, dict.fromkeys(ours, "share"), target, gate, 1).line())


if __name__ == "__main__":
    arguments = parser(__doc__, runs=1)
    arguments.add_argument("--layers", type=int, default=2, help="layers of the base (default: 2)")
    main(arguments.parse_args())
