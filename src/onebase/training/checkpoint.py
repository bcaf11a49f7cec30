"""Checkpoints from which a run goes on as if it had never stopped: weights, optimiser, random state, position.

A checkpoint is an adapter folder (any reader can use it) plus `state.json` and `state/`, written under a
temporary name and renamed: a kill or a full disk leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onebase.adapters.adapter import Adapter
from onebase.errors import FormatError
from onebase.files import atomic_folder
from onebase.storage.format import read_adapter, write_adapter
from onebase.storage.shards import list_tensors, read_tensor, write_shards

FOLDER, STATE = "checkpoints", "state.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` optimiser steps. The step number is the position in the data."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = -1  # -1: nothing evaluated yet
    best_loss: float = float("inf")
    worse: int = 0  # evaluations in a row without improvement

    def after_eval(self, loss: float) -> Progress:
        """The progress after an evaluation gave `loss`."""
        if loss < self.best_loss:
            return replace(self, best_step=self.step, best_loss=loss, worse=0)
        return replace(self, worse=self.worse + 1)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds. `facts` are what must be the same when the run goes on."""

    adapter: Adapter
    progress: Progress
    tensors: Mapping[str, Tensor]  # the optimiser's and the random generators'
    facts: Mapping[str, Any]


def random_tensors() -> dict[str, Tensor]:
    """The state of every random generator that training draws from."""
    states = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"rng/cuda{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random(tensors: Mapping[str, Tensor]) -> None:
    """Put back what `random_tensors` gave."""
    torch.set_rng_state(tensors["rng/cpu"])
    for name, state in tensors.items():
        if name.startswith("rng/cuda"):
            torch.cuda.set_rng_state(state, int(name.removeprefix("rng/cuda")))


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / FOLDER / f"step-{step:08d}"


def save(run: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a checkpoint, then delete the older ones beyond `keep`, never the best. Raises OutputError."""
    target = folder_of(run, snapshot.progress.step)
    with atomic_folder(target) as temporary:
        write_adapter(snapshot.adapter, temporary)
        (temporary / "state").mkdir()
        write_shards(temporary / "state", ((n, t.contiguous().cpu()) for n, t in snapshot.tensors.items()))
        state = {"progress": dataclasses.asdict(snapshot.progress), "facts": dict(snapshot.facts)}
        (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
    best = folder_of(run, snapshot.progress.best_step)
    for old in checkpoints(run)[:-keep]:
        if old != best:
            shutil.rmtree(old)
    return target


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def load(folder: Path) -> Snapshot:
    """Read a checkpoint. Raises FormatError where it is broken."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        progress, facts = Progress(**state["progress"]), state["facts"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"checkpoint {folder}", f"its {STATE} is broken: {error}") from error
    tensors = {info.name: read_tensor(info) for info in list_tensors(folder / "state")}
    return Snapshot(read_adapter(folder), progress, tensors, facts)
