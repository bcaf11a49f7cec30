"""A tiny base on disk and one run trained on it by the command line, shared by the tests here."""

from __future__ import annotations

from pathlib import Path

import pytest
from place import TRAINING, Place

from onebase.cli.main import main
from texts import QUESTIONS, save_base, write_rows


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    base, rows = save_base(folder / "base"), write_rows(folder / "rows.jsonl", QUESTIONS)
    made = Place(str(base), rows, str(folder / "run"))
    split = ["--split-by", "prompt", "--holdout", "0.2", "--seed", "5"]
    assert main(["train", "--base", made.base, "--data", rows, "--output", made.run, *TRAINING, *split]) == 0
    return made


@pytest.fixture
def copied_run(place: Place, tmp_path: Path) -> Path:
    """The run's adapter files alone, to be broken."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in Path(place.run).glob("*"):
        if path.suffix in (".json", ".safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder
