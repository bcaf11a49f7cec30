"""Labels by the command line: preview, train, eval, predict, and what the other commands say of such an adapter."""

import json

import pytest
from place import learning

from labelled import ROWS
from onebase.cli.main import main
from texts import save_base, write_rows

pytestmark = pytest.mark.slow

MAP = ["--map", "text=review,label=stars"]
SIMPLE = [{"review": row["text"], "stars": int(row["label"] == "good")} for row in ROWS]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The rows' file, and an adapter that was trained on them."""
    folder = tmp_path_factory.mktemp("labels")
    base, rows = str(save_base(folder / "base")), write_rows(folder / "rows.jsonl", SIMPLE)
    options = ["--max-steps", "20", "--batch-size", "8", "--rank", "2", "--lr", "0.01", "--dtype", "float32"]
    command = learning("classify", base, rows, folder / "run")
    assert main([*command, *MAP, *options]) == 0
    return folder


def test_preview_shows_the_classes(place, capsys):
    rows = str(place / "rows.jsonl")
    assert main(["preview", "--task", "classify", "--base", str(place / "base"), "--data", rows, *MAP]) == 0
    shown = capsys.readouterr().out
    assert "0: 33" in shown or "0: 32" in shown
    assert "rare-class" in shown
    assert "no-eos" not in shown
    assert "label 1" in shown


def test_eval_prints_the_constant_answer_beside_the_adapter(place, capsys, tmp_path):
    out = tmp_path / "scores.json"
    rows = ["--data", str(place / "rows.jsonl"), *MAP]
    assert (
        main(["eval", "--adapter", str(place / "run"), *rows, "--dtype", "float32", "--output", str(out)])
        == 0
    )
    shown = capsys.readouterr().out
    assert "Accuracy" in shown
    assert "most frequent class" in shown
    scores = json.loads(out.read_text())
    assert scores["most frequent class"]["accuracy"] == 0.5
    assert scores["adapter"]["accuracy"] > 0.8
    assert scores["adapter"].keys() == {"loss", "tokens", "accuracy", "macro_f1", "pearson", "r2"}


def test_predict_says_label_and_probabilities(place, capsys, tmp_path):
    adapter = ["predict", "--adapter", str(place / "run"), "--dtype", "float32"]
    assert main([*adapter, "--prompt", "Ada loves tea."]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == rest[0].split()[-1]
    out = tmp_path / "said.jsonl"
    map_text = ["--map", "text=review"]
    assert main([*adapter, "--input", str(place / "rows.jsonl"), *map_text, "--output", str(out)]) == 0
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in said] == [row["review"] for row in SIMPLE]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in said)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["generate", "--prompt", "x", "--adapter"], "use onebase predict"),
        (["merge", "--output", "{out}", "--adapter"], "belongs to its head"),
        (["export", "--to", "gguf", "--output", "{out}"], "head"),
    ],
)
def test_what_such_an_adapter_cannot_do_is_said(place, command, told, capsys, tmp_path):
    filled = [part.format(out=tmp_path / "out") for part in command]
    assert main([*filled, str(place / "run")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_and_doctor_know_it(place, capsys):
    assert main(["inspect", str(place / "run")]) == 0
    assert "0, 1" in capsys.readouterr().out
    assert main(["doctor", str(place / "run")]) == 0
    assert "healthy" in capsys.readouterr().out


def test_predict_refuses_an_adapter_without_a_head(place, capsys):
    assert main(["predict", "--prompt", "x"]) == 2
    assert "--task classify" in capsys.readouterr().err


def test_minilm_tells_sentences_apart(tmp_path, capsys):
    """The built-in encoder: a few steps suffice for what a word decides."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = ["--max-steps", "30", "--batch-size", "8", "--rank", "4", "--lr", "2e-3", "--dtype", "float32"]
    command = learning("classify", "minilm", rows, tmp_path / "run")
    assert main([*command, *options, "--holdout", "16"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["after"]["accuracy"] == 1.0
    assert record["proof"]["before"] == record["proof"]["after"]
