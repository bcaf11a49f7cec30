"""Merging a rank-16 adapter into the built-in base: file to file, against PEFT's merge_and_unload().save_pretrained().

Ours is timed from opening the base to the finished folder; of the peer only merging and saving count, its loading
is shown beside. Both write into memory (/dev/shm) where there is room, for a disk's speed is not theirs, and ours
waits until the disk has everything, which the peer does not: `--folder` takes another place.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

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
from onebase.models.base import locate_base
from onebase.models.merging import open_skeleton, plan_merge
from onebase.storage.format import save_adapter
from onebase.storage.shards import list_tensors, read_tensor
from onebase.transforms.merge_files import merge_files

TARGET = {"seconds": 0.3, "memory": 0.3}
UNIT = {"seconds": "s", "memory": "MB of peak resident memory above the libraries'"}
ROOM = 4e9  # bytes: two merged models and their making


def ours(base: Path, adapter: Path, output: Path) -> Numbers:
    with measured() as found:
        merge_files(plan_merge(base, adapter), output)
    return found


def peer(base: Path, adapter: Path, output: Path) -> Numbers:
    warnings.simplefilter("ignore")
    with measured() as found:
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter)
        loaded = time.perf_counter()
        model.merge_and_unload().save_pretrained(output)
    return {**found, "seconds": found["seconds"] - (loaded - start), "loading": loaded - start}


def largest_difference(one: Path, other: Path) -> float:
    """Over all weights; infinite where the tensors' names or shapes differ."""
    first, second = list_tensors(one), list_tensors(other)
    if [(i.name, i.shape) for i in first] != [(i.name, i.shape) for i in second]:
        return float("inf")
    pairs = zip(first, second, strict=True)
    return max(float((read_tensor(a) - read_tensor(b)).abs().max()) for a, b in pairs)


def place() -> Path | None:
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > ROOM else None


def main(options: argparse.Namespace) -> None:
    base = locate_base("smollm2-135m")
    with tempfile.TemporaryDirectory(dir=options.folder or place()) as temporary:
        folder = Path(temporary)
        save_adapter(random_update(open_skeleton(base).model), folder / "adapter")
        plan_merge(base, folder / "adapter")  # the base's fingerprint is remembered from here on

        def one_run(side: str) -> Numbers:
            shutil.rmtree(folder / side, ignore_errors=True)
            return in_fresh_process(
                __file__, side, "--paths", *map(str, (base, folder / "adapter", folder / side))
            )

        found = alternate(options.runs, one_run)
        difference = largest_difference(folder / "ours", folder / "peer")
    mine, theirs = medians(found["ours"]), medians(found["peer"])
    rows = [
        (
            f"{name} ({UNIT[name]})",
            f"{mine[name]:.2f}",
            f"{theirs[name]:.2f}",
            f"{mine[name] / theirs[name]:.2f}",
        )
        for name in TARGET
    ]
    whole = theirs["seconds"] + theirs["loading"]
    rows.append(
        (
            "with the peer's loading (s)",
            f"{mine['seconds']:.2f}",
            f"{whole:.2f}",
            f"{mine['seconds'] / whole:.2f}",
        )
    )
    rows.append(("largest difference of a weight", f"{difference:.1e}", "", ""))
    show(f"merge and save SmolLM2-135M, median of {options.runs}", ("", "onebase", "PEFT", "ratio"), rows)
    gate = Gate("largest difference of a weight", difference, 1e-6)
    print(Result("merge", mine, theirs, UNIT, TARGET, gate, options.runs).line())


if __name__ == "__main__":
    arguments = parser(__doc__, runs=5)
    arguments.add_argument("--folder", help="where both write (default: memory, else the temporary folder)")
    arguments.add_argument("--paths", nargs=3, type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.side:
        print(json.dumps({"ours": ours, "peer": peer}[given.side](*given.paths)))
    else:
        main(given)
