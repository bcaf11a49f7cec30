"""Device and dtype choice, memory and machine facts."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from onebase.device import available_memory, machine, pick_device, pick_dtype
from onebase.errors import ConfigError


def test_auto_device_is_the_best_present():
    wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == wanted
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cpu:7", "cuda:99", ""])
def test_absent_device_is_an_error(name: str):
    with pytest.raises(ConfigError, match=f"device={name}"):
        pick_device(name)


def test_asked_dtype_is_taken_as_it_is():
    assert pick_dtype("bfloat16", "cpu").dtype == "bfloat16"
    assert pick_dtype("float32", "cpu") == ("float32", "float32: asked for")


def test_auto_dtype_states_its_measurement_and_follows_it():
    choice = pick_dtype("auto", "cpu")
    found = re.fullmatch(
        r"(\w+): ([\d.]+)x (\w+)'s speed here \((\d+) against (\d+) GFLOP/s\)", choice.reason
    )
    assert found, choice.reason
    chosen, ratio, other = found.group(1), float(found.group(2)), found.group(3)
    assert chosen == choice.dtype
    assert {chosen, other} == {"float32", "bfloat16"}
    # bfloat16 only where clearly faster; one decimal is printed, so 1.15 may read 1.2.
    assert ratio >= 1.2 if chosen == "bfloat16" else ratio > 1 / 1.2 - 0.05


def test_unknown_dtype_names_the_nearest():
    with pytest.raises(ConfigError, match="nearest valid: bfloat16"):
        pick_dtype("bfloat", "cpu")


GROW = """
import torch
from onebase.device import peak_memory
before = peak_memory()  # Linux hands a parent's peak down, so it may be the whole test run's
held = torch.ones(before // 4 + 50_000_000)
print(before, held.nbytes, peak_memory())
"""


def test_peak_memory_is_in_bytes_and_grows_with_use():
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True)
    before, held, after = map(int, done.stdout.split())
    assert before > 50_000_000, "an interpreter with torch in it holds more"
    assert held < after < before + held + 100_000_000


def test_available_memory_is_a_part_of_the_machines():
    assert 2**20 < available_memory() < machine()["ram_bytes"]


def test_machine_facts_are_json_ready():
    facts = json.loads(json.dumps(machine()))
    assert facts["torch"] == torch.__version__
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["ram_bytes"] > 100_000_000
    assert facts["cpu"]
