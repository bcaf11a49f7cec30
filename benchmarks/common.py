"""What the benchmarks share: runs that alternate in fresh processes, peak memory, and the result as one JSON line."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from onebase.adapter import Adapter
from onebase.config import LoraConfig
from onebase.injection import new_adapter

PACKAGES = ("onebase", "torch", "transformers", "peft", "safetensors")
SIDES = ("ours", "peer")
Numbers = Mapping[str, float]


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GB, threads, and the versions of the packages."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory, 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load": round(os.getloadavg()[0], 1),  # others' work at the same time makes times worthless
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _status(field_name: str) -> float:
    """A memory figure of this process from Linux's /proc, in MB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) / 1e3
    raise OSError(f"no {field_name} in /proc/self/status")


class Measured(dict[str, float]):
    """`seconds`, and `memory`: the peak resident MB above what was resident at the start."""


@contextlib.contextmanager
def measured() -> Generator[Measured]:
    """Fill in time and peak memory of the block; import what it needs before, for that is counted out."""
    found = Measured()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts from here
        before, peak = _status("VmRSS"), lambda: _status("VmHWM")
    except OSError:
        unit = 1e6 if sys.platform == "darwin" else 1e3
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit  # noqa: E731
        before = peak()
    start = time.perf_counter()
    yield found
    found["seconds"] = time.perf_counter() - start
    found["memory"] = peak() - before


def in_fresh_process(script: str, side: str, *arguments: str) -> dict[str, float]:
    """Run `script --side SIDE ARGUMENTS` alone; its last line is a JSON object of numbers."""
    command = [sys.executable, script, "--side", side, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def alternate(runs: int, one_run: Callable[[str], Numbers]) -> dict[str, list[Numbers]]:
    """`one_run(side)` for ours and the peer in turns, so that a slow minute of the machine hits both."""
    found: dict[str, list[Numbers]] = {side: [] for side in SIDES}
    for number in range(runs):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            found[side].append(one_run(side))
            print(f"run {number + 1} of {runs}, {side}: {shown(found[side][-1])}", file=sys.stderr)
    return found


def shown(numbers: Numbers) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())


def medians(runs: Sequence[Numbers]) -> dict[str, float]:
    return {name: median(run[name] for run in runs) for name in runs[0]}


@dataclass(frozen=True)
class Gate:
    """What must hold for the numbers to count: `value` is at most `limit`."""

    what: str
    value: float
    limit: float
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passed", self.value <= self.limit)


@dataclass(frozen=True)
class Result:
    """One claim: `ratio` is ours over the peer's, to be at most `target`, name by name."""

    name: str
    ours: Numbers
    peer: Numbers
    unit: Mapping[str, str]
    target: Numbers
    gate: Gate
    runs: int

    def line(self) -> str:
        """The JSON object that a benchmark prints last."""
        ratio = {name: self.ours[name] / self.peer[name] if self.peer[name] else None for name in self.target}
        return json.dumps(asdict(self) | {"ratio": ratio, "machine": machine()})


def random_update(model: nn.Module) -> Adapter:
    """An adapter of rank 16 on all linear layers, its B drawn at random as if it were trained."""
    adapter = new_adapter(model, LoraConfig(rank=16, alpha=32))
    draw = torch.Generator().manual_seed(0)
    low = {
        path: one._replace(B=torch.randn(one.B.shape, generator=draw) * 0.01)
        for path, one in adapter.lowrank.items()
    }
    return replace(adapter, lowrank=low)


def show(title: str, head: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def parser(text: str | None, runs: int) -> argparse.ArgumentParser:
    """The options that benchmarks have in common; `--side` is how a benchmark calls itself."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--runs", type=int, default=runs, help=f"runs of each side (default: {runs})")
    made.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return made
