"""What the benchmarks share: runs that alternate in fresh processes, peak memory, and the result as one JSON line.

Each is run from the repository's root, `python -m benchmarks.NAME`; `make bench` runs all. `pip install '.[bench]'`
brings the peers that the tests do without.
"""

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

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import new_adapter
from onebase.config import LoraConfig

PACKAGES = ("onebase", "torch", "transformers", "peft", "trl", "safetensors")
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
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _status(field_name: str) -> float:
    """A memory figure of this process from Linux's /proc, in MB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) / 1e3
    raise OSError(f"no {field_name} in /proc/self/status")


def peak_resident() -> float:
    """The most that this process held at once, in MB, its libraries and mapped weights included."""
    try:
        return _status("VmHWM")  # getrusage would count what the parent held when it forked
    except OSError:
        unit = 1e6 if sys.platform == "darwin" else 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Measured(dict[str, float]):
    """`seconds`, and `memory`: the peak resident MB above what was resident at the start."""


@contextlib.contextmanager
def measured() -> Generator[Measured]:
    """Fill in time and peak memory of the block; import what it needs before, for that is counted out."""
    found = Measured()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts from here
        before = _status("VmRSS")
    except OSError:
        before = peak_resident()
    start = time.perf_counter()
    yield found
    found["seconds"] = time.perf_counter() - start
    found["memory"] = peak_resident() - before


def in_fresh_process(script: str, side: str, *arguments: str) -> dict[str, float]:
    """Run `--side SIDE ARGUMENTS` of a benchmark's file alone; its last line is a JSON object of numbers."""
    command = [sys.executable, "-m", f"{__package__}.{Path(script).stem}", "--side", side, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def alternate(
    runs: int, one_run: Callable[[str], Numbers], sides: Sequence[str] = SIDES
) -> dict[str, list[Numbers]]:
    """`one_run(side)` for ours and the peers in turns, so that a slow minute of the machine hits all."""
    found: dict[str, list[Numbers]] = {side: [] for side in sides}
    for number in range(runs):
        for side in sides if number % 2 == 0 else reversed(sides):
            found[side].append(one_run(side))
            print(f"run {number + 1} of {runs}, {side}: {shown(found[side][-1])}", file=sys.stderr)
    return found


def shown(numbers: Numbers) -> str:
    """The first few of them, which are those that count."""
    return ", ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:4])


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
    """A benchmark's claims: `ratio` is ours over the peer's, name by name.

    The names say what is compared (seconds, memory) or with whom (a peer, a peer under other settings). A ratio is to
    be at most its `target`, or with `more` at least. A name without a target is a figure beside the claims. Where the
    gate failed there is no ratio.
    """

    name: str
    ours: Numbers
    peer: Numbers
    unit: Mapping[str, str]
    target: Numbers
    gate: Gate | tuple[Gate, ...]
    runs: int
    more: bool = False

    @property
    def gates(self) -> tuple[Gate, ...]:
        return self.gate if isinstance(self.gate, tuple) else (self.gate,)

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def ratio(self) -> dict[str, float | None]:
        compared = [name for name in self.peer if name in self.ours]
        known = {name: self.peer[name] != 0 and self.passed for name in compared}
        return {name: self.ours[name] / self.peer[name] if known[name] else None for name in compared}

    @property
    def met(self) -> dict[str, bool]:
        """Whether each target is met; one without a ratio is not."""
        found = {name: self.ratio.get(name) for name in self.target}
        return {
            name: ratio is not None
            and (ratio >= self.target[name] if self.more else ratio <= self.target[name])
            for name, ratio in found.items()
        }

    def line(self) -> str:
        """The JSON object that a benchmark prints last."""
        told = {
            "name": self.name,
            "ours": self.ours,
            "peer": self.peer,
            "unit": self.unit,
            "ratio": self.ratio,
            "target": self.target,
            "better": "more" if self.more else "less",
            "met": self.met,
            "gate": "passed" if self.passed else "failed",
            "gates": [asdict(gate) for gate in self.gates],
            "runs": self.runs,
            "machine": machine(),
        }
        return json.dumps(told)

    def claims(self) -> list[tuple[str, str, str, str, str, str]]:
        """Rows for a table under `CLAIMS`: each comparison, the ratio, its target and whether that is met."""
        sign = "≥" if self.more else "≤"
        return [
            (
                name,
                f"{self.ours[name]:.4g} {self.unit[name]}",
                f"{self.peer[name]:.4g} {self.unit[name]}",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{sign} {self.target[name]:g}" if name in self.target else "",
                {True: "met", False: "not met", None: ""}[self.met.get(name)],
            )
            for name, ratio in self.ratio.items()
        ]


CLAIMS = ("against", "onebase", "the other", "ratio", "target", "")


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


def checked(name: str, *gates: Gate) -> tuple[Gate, ...]:
    """Print the gates. Where one fails the benchmark ends here: exit code 1, and a last line without a ratio."""
    for gate in gates:
        told = f"{gate.value:.3g}, at most {gate.limit:g}: {'passed' if gate.passed else 'FAILED'}"
        print(f"gate: {gate.what}: {told}", flush=True)
    if not all(gate.passed for gate in gates):
        print(Result(name, {}, {}, {}, {}, gates, 0).line())
        raise SystemExit(1)
    return gates


def conclude(title: str, result: Result) -> None:
    """Print a result's claims as a table, and its line."""
    show(title, CLAIMS, result.claims())
    print(result.line())


def parser(text: str | None, runs: int, sides: Sequence[str] = SIDES) -> argparse.ArgumentParser:
    """The options that benchmarks have in common; `--side` is how a benchmark calls itself."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--runs", type=int, default=runs, help=f"runs of each side (default: {runs})")
    made.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    return made
