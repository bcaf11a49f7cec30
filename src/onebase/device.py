"""The one place that asks about hardware, by calls: device, dtype by measured speed, memory, machine facts."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from onebase.errors import ConfigError, nearest

DTYPES = ("float32", "bfloat16")
_PROBE = (512, 576, 1536)  # rows, inputs, outputs: a batch through the small base's widest layer
_PROBE_SECONDS = 0.06
_WORTH_IT = 1.2  # how much faster bfloat16 must be before its coarser rounding is worth it


class DtypeChoice(NamedTuple):
    """A dtype by its torch name, and why it was chosen, for the report."""

    dtype: str
    reason: str


def pick_device(name: str = "auto") -> torch.device:
    """The torch device of that name; `auto` takes cuda, else mps, else cpu.

    Raises ConfigError for a device that this machine does not have.
    """
    present = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "auto":
        own = f":{os.environ['LOCAL_RANK']}" if present[0] == "cuda" and "LOCAL_RANK" in os.environ else ""
        return torch.device(present[0] + own)  # torchrun numbers its processes: a GPU for each
    kind, _, index = name.partition(":")
    if kind not in present:
        raise ConfigError(f"option device={name}", "not on this machine", nearest(name, ["auto", *present]))
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if ":" in name and not (index.isdigit() and int(index) < count):
        raise ConfigError(f"option device={name}", f"this machine has {count} device(s) of kind {kind}")
    return torch.device(name)


def pick_dtype(name: str = "auto", device: str | torch.device = "cpu") -> DtypeChoice:
    """`float32` or `bfloat16` as asked; `auto` times a small matrix product in both (about 0.2 s).

    Many CPUs run bfloat16 slower than float32, so neither fashion nor the checkpoint decides: the clock does.
    Raises ConfigError for another name.
    """
    if name in DTYPES:
        return DtypeChoice(name, f"{name}: asked for")
    if name != "auto":
        raise ConfigError(f"option dtype={name}", "no such dtype", nearest(name, ["auto", *DTYPES]))
    rows, inputs, outputs = _PROBE
    flop = 2 * rows * inputs * outputs
    full, half = (flop / _best_seconds(getattr(torch, dtype), device) / 1e9 for dtype in DTYPES)
    chosen = "bfloat16" if half >= _WORTH_IT * full else "float32"
    mine, other = (half, full) if chosen == "bfloat16" else (full, half)
    loser = DTYPES[chosen == "float32"]
    speed = f"{mine / other:.1f}x {loser}'s speed here ({mine:.0f} against {other:.0f} GFLOP/s)"
    return DtypeChoice(chosen, f"{chosen}: {speed}")


def _best_seconds(dtype: torch.dtype, device: str | torch.device) -> float:
    """The shortest of a few timings of the probe product, after one run to warm up."""
    rows, inputs, outputs = _PROBE
    x_TI = torch.ones(rows, inputs, dtype=dtype, device=device)
    weight_OI = torch.ones(outputs, inputs, dtype=dtype, device=device)
    best, spent = float("inf"), 0.0
    torch.nn.functional.linear(x_TI, weight_OI)
    _synchronize(x_TI.device)
    while spent < _PROBE_SECONDS:
        start = time.perf_counter()
        torch.nn.functional.linear(x_TI, weight_OI)
        _synchronize(x_TI.device)
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
    return best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_memory(device: str | torch.device = "cpu") -> int:
    """Most bytes held so far: by this process, or on a cuda device by torch's allocator."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def available_memory() -> int:
    """Bytes that this process may still take: Linux's own estimate, within a container's limit; else half of all."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return total // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (group / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current")
        )
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free


def machine() -> dict[str, Any]:
    """Facts about this machine for reports: what a reader needs to compare two runs' speed."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    text = listing.read_text(encoding="utf-8", errors="replace") if listing.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()
