"""The examples run as they stand, on a tiny base."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from place import Place

from onebase.cli.main import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run_script(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        "train.yaml",
        "reviews.jsonl",
        "five_lines.py",
        "swap_adapters.py",
    }


def test_the_rows_are_balanced_and_distinct():
    rows = [json.loads(line) for line in (EXAMPLES / "reviews.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 24
    assert [row["completion"] for row in rows].count("positive") == 12


def test_train_yaml(place: Place, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)  # its paths start at the folder that holds `examples`
    flags = ["--base", place.base, "--output", str(tmp_path / "run"), "--epochs", "1", "--dtype", "float32"]
    assert main(["train", "--config", "examples/train.yaml", *flags]) == 0
    facts = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (facts["r"], facts["lora_alpha"]) == (8, 16)
    file = yaml.safe_load((EXAMPLES / "train.yaml").read_text())
    used = json.loads((tmp_path / "run" / "onebase.json").read_text())["training"]["settings"]
    assert {name for name in file if used[name] != (float(file[name]) if name == "lr" else file[name])} == {
        "base",
        "output",
        "epochs",
    }


def test_five_lines(place: Place, tmp_path: Path, monkeypatch, capsys):
    run_script(monkeypatch, "five_lines.py", place.base, str(tmp_path / "run"))
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out.endswith("\n")


def test_swap_adapters(place: Place, monkeypatch, capsys):
    run_script(monkeypatch, "swap_adapters.py", place.base)
    moved = [line for line in capsys.readouterr().out.splitlines() if "moves the logits" in line]
    assert len(moved) == 2
    assert all(float(line.rsplit(" ", 1)[1]) > 0.01 for line in moved)


@pytest.mark.parametrize("name", ["five_lines.py", "swap_adapters.py"])
def test_examples_default_to_the_built_in_base(name: str):
    assert '"smollm2-135m"' in (EXAMPLES / name).read_text()
