"""`onebase sweep` as users call it: the plan, the folders, the table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

from place import Place

from onebase.cli.main import main
from onebase.storage.format import read_adapter

SHORT = ["--dtype", "float32", "--max-steps", "2", "--batch-size", "4", "--samples", "0", "--holdout", "4"]


def flags(place: Place, folder: Path, *more: str) -> list[str]:
    return ["sweep", "--base", place.base, "--data", place.rows, "--output", str(folder), *SHORT, *more]


def test_a_sweep_from_plan_to_table(place: Place, tmp_path: Path, capsys):
    grid = ["--rank", "2,3", "--lr", "1e-2,1e30", "--clip", "0"]
    assert main(flags(place, tmp_path / "sweep", *grid, "--plan")) == 0
    shown = capsys.readouterr().out
    assert "rank-2_lr-1e-2" in shown
    assert "4, up to 4 at once" in shown
    assert not (tmp_path / "sweep").exists()
    assert main(flags(place, tmp_path / "sweep", *grid, "--max-steps", "3")) == 0
    shown = capsys.readouterr().out
    assert "rank-2_lr-1e30 failed: step 2: loss" in shown
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["ended"] for row in rows] == ["completed", "completed", "failed", "failed"]
    assert rows[0]["loss"] <= rows[1]["loss"]
    assert f"{rows[0]['loss']:.4f}" in shown
    assert read_adapter(tmp_path / "sweep" / "rank-3_lr-1e-2").config.rank == 3


def test_a_sweep_from_a_file_resumes(place: Place, tmp_path: Path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text("rank: 2\nseed: 1,2\nrslora: true\ntarget_modules: q_proj,v_proj\ntogether: 1\n")
    given = flags(place, tmp_path / "sweep", "--config", str(file))
    assert main(given) == 0
    assert main(given) == 2
    assert "already holds a run" in capsys.readouterr().err
    first = (tmp_path / "sweep" / "sweep.json").read_text()
    assert main([*given, "--resume"]) == 0
    assert (tmp_path / "sweep" / "sweep.json").read_text() == first
    config = read_adapter(tmp_path / "sweep" / "seed-2").config
    assert config.rslora
    assert config.target_modules == ("q_proj", "v_proj")


def test_where_every_run_fails_the_exit_code_says_so(place: Place, tmp_path: Path):
    grid = ["--rank", "2", "--lr", "1e30,2e30", "--clip", "0", "--max-steps", "3", "--together", "2"]
    assert main(flags(place, tmp_path / "sweep", *grid)) == 3


def test_what_may_not_vary_is_refused_by_name(place: Place, tmp_path: Path, capsys):
    assert main(flags(place, tmp_path / "sweep", "--rank", "2,3", "--batch-size", "2,4")) == 2
    assert "batch_size" in capsys.readouterr().err
    assert main(flags(place, tmp_path / "sweep", "--rank", "2")) == 2
    assert "no option has several values" in capsys.readouterr().err
