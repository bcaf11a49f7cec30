"""Vectors by the command line: preview, train, eval, embed, and what the other commands say of such an adapter."""

import json

import numpy as np
import pytest
from place import learning

from onebase.cli.main import main
from paired import PAIRS
from texts import save_base, write_rows

pytestmark = pytest.mark.slow

MAP = ["--map", "anchor=question,positive=answer"]
ROWS = [{"question": row["anchor"], "answer": row["positive"]} for row in PAIRS]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The rows' file, and an adapter that was trained on them."""
    folder = tmp_path_factory.mktemp("vectors")
    base, rows = str(save_base(folder / "base")), write_rows(folder / "rows.jsonl", ROWS)
    options = [
        "--max-steps",
        "60",
        "--batch-size",
        "12",
        "--rank",
        "4",
        "--lr",
        "0.005",
        "--dtype",
        "float32",
    ]
    command = learning("embed", base, rows, folder / "run")
    assert main([*command, *MAP, *options]) == 0
    return folder


def test_preview_shows_pairs(place, capsys):
    rows = str(place / "rows.jsonl")
    assert main(["preview", "--task", "embed", "--base", str(place / "base"), "--data", rows, *MAP]) == 0
    shown = capsys.readouterr().out
    assert "pairs" in shown
    assert "positive: " in shown
    assert "same-text" in shown


def test_eval_sets_the_base_beside_the_adapter(place, capsys, tmp_path):
    out = tmp_path / "scores.json"
    rows = ["--data", str(place / "rows.jsonl"), *MAP, "--dtype", "float32", "--output", str(out)]
    assert main(["eval", "--adapter", str(place / "run"), *rows]) == 0
    assert "MRR@10" in capsys.readouterr().out
    scores = json.loads(out.read_text())
    assert scores["adapter"]["accuracy_at_1"] > scores["base"]["accuracy_at_1"]
    assert scores["adapter"].keys() == {"loss", "tokens", "accuracy_at_1", "mrr_at_10"}
    plain = ["eval", "--task", "embed", "--base", str(place / "base"), *rows]
    assert main(plain) == 0
    assert json.loads(out.read_text()) == {"base": scores["base"]}


def test_embed_writes_a_row_for_each_text(place, capsys, tmp_path):
    command = ["embed", "--adapter", str(place / "run"), "--dtype", "float32"]
    texts = ["--input", str(place / "rows.jsonl"), "--map", "text=question"]
    assert main([*command, *texts, "--output", str(tmp_path / "v.npy")]) == 0
    assert main([*command, *texts, "--output", str(tmp_path / "v.jsonl")]) == 0
    vectors = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert vectors.shape == (len(ROWS), 32)
    assert vectors.dtype == np.float32
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [row["question"] for row in ROWS]
    np.testing.assert_array_equal(np.array([line["vector"] for line in lines], np.float32), vectors)
    assert main([*command, "--prompt", ROWS[0]["question"]]) == 0
    np.testing.assert_allclose(
        json.loads(capsys.readouterr().out)["vector"], vectors[0], rtol=1e-4, atol=1e-5
    )
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    plain = [
        "embed",
        "--base",
        str(place / "base"),
        "--input",
        str(tmp_path / "texts.txt"),
        "--pooling",
        "last",
    ]
    assert main([*plain, "--output", str(tmp_path / "w.npy")]) == 0
    assert np.load(tmp_path / "w.npy").shape == (2, 32)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["generate", "--prompt", "x", "--adapter", "{run}"], "use onebase embed"),
        (["predict", "--prompt", "x", "--adapter", "{run}"], "for vectors embed"),
        (["merge", "--output", "{out}", "--adapter", "{run}"], "below the output head"),
        (["embed", "--prompt", "x", "--adapter", "{run}", "--pooling", "cls"], "trained with mean"),
        (["embed", "--prompt", "x", "--output", "v.txt"], "ends in .npy or .jsonl"),
        (["embed"], "neither is given"),
    ],
)
def test_what_cannot_be_is_said(place, command, told, capsys, tmp_path):
    names = {"run": place / "run", "out": tmp_path / "out"}
    assert main([part.format(**names) for part in command]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_and_doctor_know_it(place, capsys):
    assert main(["inspect", str(place / "run")]) == 0
    assert "pooling=mean" in capsys.readouterr().out
    assert main(["doctor", str(place / "run")]) == 0
    assert "healthy" in capsys.readouterr().out


def test_minilm_pools_as_its_own_files_say_and_merges_into_a_folder_that_does(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    options = ["--max-steps", "6", "--batch-size", "8", "--rank", "4", "--lr", "1e-3", "--dtype", "float32"]
    command = learning("embed", "minilm", rows, tmp_path / "run")
    assert main([*command, *options, "--holdout", "12"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    wanted = {"task": "embed", "pooling": "mean", "normalize": True, "scale": 20.0, "longest": 256}
    assert record["embedder"] == wanted
    assert record["after"]["loss"] < record["before"]["loss"]
    assert record["proof"]["before"] == record["proof"]["after"]
    merged = str(tmp_path / "merged")
    assert main(["merge", "--adapter", str(tmp_path / "run"), "--output", merged]) == 0
    one = ["--prompt", "Ada bought tea.", "--dtype", "float32", "--output"]
    assert main(["embed", "--adapter", str(tmp_path / "run"), *one, str(tmp_path / "a.npy")]) == 0
    assert main(["embed", "--base", merged, *one, str(tmp_path / "b.npy")]) == 0
    both = [np.load(tmp_path / f"{name}.npy") for name in "ab"]
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(both[0]) == pytest.approx(1.0, abs=1e-5)
