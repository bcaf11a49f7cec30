"""`python -m benchmarks.evidence --quick` from no rows to the page, stopped and started again on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.evidence.plan import KINDS

from runs import environment

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def evidence(folder, *arguments):
    command = [sys.executable, "-m", "benchmarks.evidence", *arguments, "--quick", "--work", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_all_claims_are_run_once_and_make_a_page(tmp_path):
    path = tmp_path / "quick" / "rows.jsonl"
    evidence(tmp_path, "run", "--only", "2")
    first = path.read_text().splitlines()
    assert len(first) == 3
    assert "0 runs could start now" in evidence(tmp_path, "run", "--quiet")
    lines = path.read_text().splitlines()
    assert lines[:3] == first
    rows = [json.loads(line) for line in lines]
    assert len({row["key"] for row in rows}) == len(rows)
    assert {row["kind"] for row in rows} == set(KINDS)
    trained = [row["found"] for row in rows if "off_equal" in row["found"]]
    assert all(found["changed"] == 0 and found["off_equal"] and found["ejected_equal"] for found in trained)

    page = tmp_path / "docs" / "evidence.md"
    evidence(tmp_path, "render", "--page", str(page), "--pictures", str(tmp_path / "docs" / "img"))
    text = page.read_text()
    assert "](img/evidence-matrix.svg)" in text
    assert len(list((tmp_path / "docs" / "img").glob("evidence-*.svg"))) == 6
    answers = text[: text.index("## What was done")]
    assert "not run" not in answers
