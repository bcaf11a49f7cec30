"""Combining two rank-16 adapters: ours against PEFT's add_weighted_adapter, for each method that both have.

The adapters are for all linear layers of SmolLM2-135M; `--layers N` takes a random model of its shapes with N layers.
Ours takes two adapters and no base; the peer combines them on a model, whose loading is not counted. The gate: the
updates of both are the same. DARE draws at random, each its own way, so its updates are compared in runs of their own
where it drops nothing. Methods that choose among the values of a whole update (TIES, pruning, before an SVD) meet some
that are equal up to rounding, of which the sides' products keep one or the other: their gate is wider, and the table
tells of how many updates that is so. Most of the time is the peer's: six of its methods decompose every update in full.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import (
    SIDES,
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
from onebase.models.merging import open_skeleton
from onebase.ops.lowrank import update
from onebase.storage.format import read_adapter, save_adapter
from onebase.transforms.arithmetic import combine
from onebase.transforms.combining import METHODS

WEIGHTS = (0.7, 0.3)
DENSITY = 0.4
SAME, CHOSEN = 1e-4, 1e-2  # how far updates may be apart, relative to their norms; where values are chosen
CHOOSING = ("ties_svd", "dare_ties_svd", "magnitude_prune_svd")
TARGET = {"seconds": 1.0, "memory": 1.0}
UNIT = {"seconds": "s, all methods together", "memory": "MB of peak resident memory, the largest of them"}


def recipe_of(method: str, density: float) -> Recipe:
    return Recipe(method, density=density) if "density" in METHODS[method].reads else Recipe(method)


def make(folder: Path, layers: int) -> Path:
    """Two adapters for the base, or for a random model of its shapes; returns the model's folder."""
    base = locate_base("smollm2-135m")
    if layers:
        config = AutoConfig.from_pretrained(base)
        config.num_hidden_layers = layers
        torch.manual_seed(0)
        base = folder / "model"
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    first = random_update(open_skeleton(base).model)
    save_adapter(first, folder / "0")
    draw = torch.Generator().manual_seed(1)
    low = {
        path: one._replace(A=torch.randn(one.A.shape, generator=draw) * 0.02, B=one.B.flip(0))
        for path, one in first.lowrank.items()
    }
    save_adapter(replace(first, lowrank=low), folder / "1")
    return base


class Job(NamedTuple):
    """What one process does: combine the folder's two adapters, and write the result into it."""

    base: Path
    folder: Path
    method: str
    density: float
    name: str  # of the result

    def result(self, side: str) -> Path:
        return self.folder / f"{self.name}-{side}"

    def run(self, side: str) -> Numbers:
        return in_fresh_process(__file__, side, "--work", *map(str, self))

    def differences(self) -> list[float]:
        """Of the two sides, update by update."""
        return differences(read_adapter(self.result("ours")), read_adapter(self.result("peer") / "both"))


def ours(job: Job) -> Numbers:
    folder, method, density = job.folder, job.method, job.density
    pair = [read_adapter(folder / name) for name in ("0", "1")]
    with measured() as found:
        both = combine(pair, WEIGHTS, recipe_of(method, density), allow_base_mismatch=True)
    save_adapter(both, job.result("ours"), overwrite=True)
    return found


def peer(job: Job) -> Numbers:
    folder, method, density = job.folder, job.method, job.density
    warnings.simplefilter("ignore")
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "0", adapter_name="first")
    model.load_adapter(folder / "1", adapter_name="second")
    with measured() as found:
        model.add_weighted_adapter(
            ["first", "second"], list(WEIGHTS), "both", combination_type=method, density=density
        )
    model.save_pretrained(job.result("peer"), selected_adapters=["both"])
    return found


def differences(one: Adapter, other: Adapter) -> list[float]:
    """The norm of each update's difference, relative to the update's."""
    if one.lowrank.keys() != other.lowrank.keys():
        return [float("inf")]
    pairs = [(update(low.factors), update(other.lowrank[path].factors)) for path, low in one.lowrank.items()]
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def compare(job: Job, runs: int) -> tuple[dict[str, dict[str, float]], list[float]]:
    """The medians of each side, and how far each of their updates is apart."""
    found = alternate(runs, job.run)
    if "dare" in job.method:
        job = job._replace(density=1.0, name=f"{job.name}-whole")
        for side in SIDES:
            job.run(side)
    return {side: medians(numbers) for side, numbers in found.items()}, job.differences()


def main(options: argparse.Namespace) -> None:
    methods = options.methods.split(",") if options.methods else list(METHODS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = make(folder, options.layers)
        both = {m: compare(Job(base, folder, m, DENSITY, m), options.runs) for m in methods}
    found, apart = {m: b[0] for m, b in both.items()}, {m: b[1] for m, b in both.items()}
    rows = [
        (
            method,
            f"{both['ours']['seconds']:.3f}",
            f"{both['peer']['seconds']:.3f}",
            f"{both['ours']['seconds'] / both['peer']['seconds']:.3f}",
            f"{max(apart[method]):.1e}",
            f"{sum(one > SAME for one in apart[method])} of {len(apart[method])}",
        )
        for method, both in found.items()
    ]
    head = ("method", "onebase (s)", "PEFT (s)", "ratio", "largest difference", f"above {SAME:g}")
    show(f"combine two adapters, {options.layers or 'all'} layers, median of {options.runs}", head, rows)
    mine, theirs = (
        {
            "seconds": sum(both[side]["seconds"] for both in found.values()),
            "memory": max(both[side]["memory"] for both in found.values()),
        }
        for side in ("ours", "peer")
    )
    gates = tuple(
        Gate(f"largest relative difference of an update, {what}", max(max(apart[m]) for m in some), limit)
        for what, limit, some in (
            ("methods of factors", SAME, [m for m in methods if m not in CHOOSING]),
            ("methods that choose among values", CHOSEN, [m for m in methods if m in CHOOSING]),
        )
        if some
    )
    print(Result("combine", mine, theirs, UNIT, TARGET, gates, options.runs).line())


if __name__ == "__main__":
    arguments = parser(__doc__, runs=1)
    arguments.add_argument(
        "--layers", type=int, default=0, help="layers of a random model (default: the base's)"
    )
    arguments.add_argument(
        "--methods", default="", help="some methods, with commas between them (default: all)"
    )
    arguments.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.side:
        base, place, method, density, name = given.work
        job = Job(Path(base), Path(place), method, float(density), name)
        print(json.dumps({"ours": ours, "peer": peer}[given.side](job)))
    else:
        main(given)
