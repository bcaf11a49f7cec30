"""Training runs in processes of their own: start them, wait for them, read what they wrote."""

import json
import os
import subprocess
import time
from pathlib import Path

from onebase.training.run import train

PATIENCE = 120  # seconds until a process that does not move fails the test


def environment(folder: Path) -> dict[str, str]:
    """A process's environment: its cache in this folder, one thread, no hub."""
    return os.environ | {"ONEBASE_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(command: list[str], folder: Path) -> subprocess.Popen:
    """A command in this folder, its output kept."""
    return subprocess.Popen(
        command,
        env=environment(folder),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process, patience: int = PATIENCE):
    """(exit code, output, errors) once it has ended."""
    out, err = process.communicate(timeout=patience)
    return process.returncode, out, err


def metrics(run: Path):
    """The lines of metrics.jsonl without what the clock decides."""
    clock = ("seconds", "tokens_per_second")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in found]


def assert_resumed_is_whole(base, folder: Path, **options):
    """A run that is stopped and resumed writes what one that never stopped writes; `base()` makes it anew each time."""
    options |= {"max_steps": 6, "save_every": 2, "dropout": 0.1}
    whole = train(base(), output=str(folder / "whole"), **options)
    seen = []
    stopped = train(base(), seen.append, lambda: len(seen) > 5, output=str(folder / "parts"), **options)
    assert stopped.reason == "interrupted"
    again = train(base(), output=str(folder / "parts"), resume=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "whole" / name).read_bytes() == (folder / "parts" / name).read_bytes()
    assert again.adapter.tensors().keys() == whole.adapter.tensors().keys()
    assert metrics(folder / "whole") == metrics(folder / "parts")


def wait_for(process, run: Path, count: int, patience: int = PATIENCE):
    """Return once metrics.jsonl has this many lines, while the process is still running."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AssertionError(f"it ended too soon: {process.communicate()}")
        path = run / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError("it does not move")
