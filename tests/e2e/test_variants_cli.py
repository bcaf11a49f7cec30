"""`onebase train --dora --init pissa`: the folder is a plain adapter that every command and a fresh base understand."""

from pathlib import Path

import pytest
from place import TRAINING, Place

from onebase.cli.main import main
from onebase.evaluation import evaluate
from onebase.models.base import load_base
from onebase.storage.format import load_adapter


def test_train_and_use_a_variant(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    flags = [*TRAINING, "--dora", "--init", "pissa", "--rslora", "--holdout", "0.2", "--seed", "5"]
    assert main(["train", "--base", place.base, "--data", place.rows, "--output", str(run), *flags]) == 0
    base = load_base(place.base, "float32")
    adapter = load_adapter(run, base)
    assert (adapter.config.rank, adapter.config.init, adapter.config.dora) == (8, "pissa", True)
    assert all(low.rank == 8 and low.magnitude is not None for low in adapter.lowrank.values())
    before = evaluate(base, place.rows).loss
    after = evaluate(base, place.rows, adapter).loss
    assert after < before

    assert main(["inspect", str(run)]) == 0
    assert main(["merge", "--adapter", str(run), "--base", place.base, "--output", str(merged)]) == 0
    plain = load_base(str(merged), "float32")
    assert evaluate(plain, place.rows).loss == pytest.approx(after, rel=1e-5)
    capsys.readouterr()


def test_a_variant_that_cannot_be(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--init", "pissa", "--dropout", "0.1"]
    command = ["train", "--base", place.base, "--data", place.rows, "--output", str(tmp_path / "run")]
    assert main([*command, *TRAINING, *flags]) == 2
    assert "use dropout 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
