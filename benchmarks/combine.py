"""Combining two rank-16 adapters: ours against PEFT's add_weighted_adapter, for each method that both have.

The modules have SmolLM2-135M's shapes, in as many layers as `--layers` says (the work is the same in each). Ours
takes two adapters and no base; the peer combines them on a model, whose loading is not counted. The gate: the updates
of both are the same. DARE draws at random, each its own way, so its updates are compared where it drops nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import (
    Gate,
    Numbers,
    Result,
    alternate,
    in_fresh_process,
    measured,
    medians,
    parser,
    random_update,
    show,
)
from onebase.adapters.adapter import Adapter
from onebase.config import Recipe
from onebase.models.base import locate_base
from onebase.ops.lowrank import update
from onebase.storage.format import read_adapter, save_adapter
from onebase.transforms.arithmetic import combine
from onebase.transforms.combining import METHODS

WEIGHTS = (0.7, 0.3)
DENSITY = 0.4
TARGET = {"seconds": 1.0, "memory": 1.0}
UNIT = {"seconds": "s, all methods together", "memory": "MB of peak resident memory, the largest of them"}


def recipe_of(method: str, density: float) -> Recipe:
    return Recipe(method, density=density) if "density" in METHODS[method].reads else Recipe(method)


def make(folder: Path, layers: int) -> None:
    """A model folder of the base's shapes, and two adapters for it."""
    config = AutoConfig.from_pretrained(locate_base("smollm2-135m"))
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    first = random_update(model)
    save_adapter(first, folder / "0")
    draw = torch.Generator().manual_seed(1)
    low = {
        path: one._replace(A=torch.randn(one.A.shape, generator=draw) * 0.02, B=one.B.flip(0))
        for path, one in first.lowrank.items()
    }
    save_adapter(replace(first, lowrank=low), folder / "1")


def ours(folder: Path, method: str, density: float, result: Path) -> Numbers:
    pair = [read_adapter(folder / name) for name in ("0", "1")]
    with measured() as found:
        both = combine(pair, WEIGHTS, recipe_of(method, density))
    save_adapter(both, result)
    return found


def peer(folder: Path, method: str, density: float, result: Path) -> Numbers:
    warnings.simplefilter("ignore")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "0", adapter_name="first")
    model.load_adapter(folder / "1", adapter_name="second")
    with measured() as found:
        model.add_weighted_adapter(
            ["first", "second"], list(WEIGHTS), "both", combination_type=method, density=density
        )
    model.save_pretrained(result, selected_adapters=["both"])
    return found


def largest_difference(one: Adapter, other: Adapter) -> float:
    """Of the updates' values, relative to each update's largest."""
    if one.lowrank.keys() != other.lowrank.keys():
        return float("inf")
    pairs = [(update(low.factors), update(other.lowrank[path].factors)) for path, low in one.lowrank.items()]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, options.layers)

        def run(side: str, method: str, density: float, name: str) -> Numbers:
            return in_fresh_process(__file__, side, "--work", str(folder), method, str(density), name)

        def difference(method: str) -> float:
            density, exact = DENSITY, f"exact-{method}"
            if "dare" in method:
                density = 1.0
            for side in ("ours", "peer"):
                run(side, method, density, f"{exact}-{side}")
            read = [
                read_adapter(folder / f"{exact}-ours"),
                read_adapter(folder / f"{exact}-peer" / "both"),
            ]
            return largest_difference(*read)

        methods = options.methods.split(",") if options.methods else list(METHODS)
        differences = {method: difference(method) for method in methods}
        found = {}
        for method in methods:
            counter = iter(range(2 * options.runs))
            runs = alternate(
                options.runs,
                lambda side, m=method, c=counter: run(side, m, DENSITY, f"{m}-{side}-{next(c)}"),
            )
            found[method] = {side: medians(numbers) for side, numbers in runs.items()}
    rows = [
        (
            method,
            f"{both['ours']['seconds']:.3f}",
            f"{both['peer']['seconds']:.3f}",
            f"{both['ours']['seconds'] / both['peer']['seconds']:.3f}",
            f"{differences[method]:.1e}",
        )
        for method, both in found.items()
    ]
    head = ("method", "onebase (s)", "PEFT (s)", "ratio", "largest difference")
    show(f"combine two adapters, {options.layers} layers, median of {options.runs}", head, rows)
    mine, theirs = (
        {
            "seconds": sum(both[side]["seconds"] for both in found.values()),
            "memory": max(both[side]["memory"] for both in found.values()),
        }
        for side in ("ours", "peer")
    )
    gate = Gate("largest relative difference of an update", max(differences.values()), 1e-4)
    print(Result("combine", mine, theirs, UNIT, TARGET, gate, options.runs).line())


if __name__ == "__main__":
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--layers", type=int, default=2, help="layers of the model (default: 2)")
    arguments.add_argument(
        "--methods", default="", help="some methods, with commas between them (default: all)"
    )
    arguments.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.side:
        place, method, density, name = given.work
        done = {"ours": ours, "peer": peer}[given.side](
            Path(place), method, float(density), Path(place) / name
        )
        print(json.dumps(done))
    else:
        main(given)
