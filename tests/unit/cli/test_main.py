"""The command table's loading: quick where nothing heavy is needed, and the collector as it was afterwards."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from onebase.cli.main import SPINS, load, settle_threads

QUICK = (["--help"], ["--version"], ["train", "--help"], ["inspect", "--help"], ["serve", "--help"])


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_what_needs_no_torch_loads_none(arguments):
    code = f"""
import os
import sys
from onebase.cli.main import main
assert main({arguments}) == 0
assert {{"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}} & os.environ.keys()
print(sorted({{"torch", "transformers", "numpy"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that makes an object with a cycle, and tells whether the collector ran while it was loaded."""
    monkeypatch.syspath_prepend(tmp_path)
    text = "import gc\nCOLLECTED = gc.isenabled()\nCYCLE = []\nCYCLE.append(CYCLE)\n"
    (tmp_path / "onebase_loading_probe.py").write_text(text, encoding="utf-8")
    yield "onebase_loading_probe"
    sys.modules.pop("onebase_loading_probe", None)
    gc.unfreeze()


def test_the_collector_rests_while_a_module_loads_and_passes_over_it_later(module):
    found = load(module)
    assert not found.COLLECTED
    assert gc.isenabled()
    assert not any(one is found.CYCLE for one in gc.get_objects())  # frozen: no pass goes through it
    frozen = gc.get_freeze_count()
    assert load(module) is found
    assert gc.get_freeze_count() == frozen  # a second load freezes nothing of what was made since


def test_a_collector_that_is_off_stays_off(module):
    gc.disable()
    try:
        load(module)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_module_that_fails_leaves_the_collector_on():
    with pytest.raises(ModuleNotFoundError):
        load("onebase.cli.no_such_command")
    assert gc.isenabled()
    gc.unfreeze()


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing set", "the user's count", "the user's policy"],
)
def test_threads_sleep_early_unless_the_user_says_how_they_wait(given, spins, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    settle_threads()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
