"""The commands as users call them, on a tiny base: what they print, write and return."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from place import TRAINING, Place

import onebase
from onebase.cli.main import main
from onebase.config import DataConfig
from onebase.data.read import read_examples
from onebase.data.split import split_examples
from texts import CHATS, QUESTIONS, TEXTS, text_model, write_rows

ONEBASE = [sys.executable, "-c", "import sys; from onebase.cli.main import main; sys.exit(main())"]
SHORT = ["--max-new-tokens", "5", "--dtype", "float32"]


def out(capsys, *arguments: str, code: int = 0) -> str:
    """What a command prints to standard output; its exit code must be `code`."""
    capsys.readouterr()
    returned = main(list(arguments))
    captured = capsys.readouterr()
    assert returned == code, captured.err
    return captured.out


# -- train


def test_train_leaves_a_whole_run(place: Place):
    names = {path.name for path in Path(place.run).iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "train.yaml",
        "metrics.jsonl",
        "report.html",
    }
    steps = [json.loads(line) for line in (Path(place.run) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["kind"] == "step"] == [1, 2, 3]
    assert yaml.safe_load((Path(place.run) / "train.yaml").read_text())["rank"] == 4


def test_a_resumed_run_takes_its_options_from_the_folder_and_notices_a_change(
    place: Place, tmp_path: Path, capsys
):
    run = str(tmp_path / "run")
    out(
        capsys,
        "train",
        "--base",
        place.base,
        "--data",
        place.rows,
        "--output",
        run,
        *TRAINING,
        "--holdout",
        "0",
    )
    out(capsys, "train", "--output", run, "--resume", "--rank", "4")
    assert (
        main(["train", "--output", run, "--resume", "--rank", "16"]) == 2
    )  # 16 is the default, and not this run's
    assert "rank was 4, is 16" in capsys.readouterr().err


def test_names_with_brackets_are_printed_as_they_are(place: Place, tmp_path: Path, capsys):
    run = str(tmp_path / "[bold]run")
    shown = out(
        capsys,
        "train",
        "--base",
        place.base,
        "--data",
        place.rows,
        "--output",
        run,
        *TRAINING,
        "--holdout",
        "0",
    )
    assert f"{run}/report.html" in shown
    assert "[bold]run" in "".join(out(capsys, "inspect", run).split())  # a table folds a long title


# -- preview


def test_preview_shows_tokens_and_passes(place: Place, capsys):
    shown = out(capsys, "preview", "--base", place.base, "--data", place.rows, "--rows", "1")
    assert "bought" in shown
    assert "<|im_end|>" in shown


def test_preview_prints_first_and_then_fails_on_a_gate_that_allow_overrides(place: Place, capsys):
    arguments = ["preview", "--base", place.base, "--data", place.rows, "--no-teach-eos", "--rows", "1"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "bought" in captured.out
    assert "no-eos" in captured.err
    assert "--allow no-eos" in captured.err
    assert main([*arguments, "--allow", "no-eos"]) == 0


# -- generate


def answers(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_generate_answers_one_prompt_as_python_does(place: Place, capsys):
    prompt = QUESTIONS[0]["prompt"]
    adapter = out(capsys, "generate", "--adapter", place.run, "--prompt", prompt, *SHORT)
    plain = out(capsys, "generate", "--base", place.base, "--prompt", prompt, *SHORT)
    base = onebase.load_base(place.base, "float32")
    loaded = onebase.load_adapter(place.run, base)
    given = onebase.generate(base, prompt, loaded)[0]
    assert adapter.strip()
    assert given.startswith(adapter.removesuffix("\n"))
    assert adapter != plain


@pytest.mark.parametrize(
    ("name", "content", "flags"),
    [
        ("p.txt", "{0}\n\n{1}\n", []),
        ("p.jsonl", '{{"prompt": "{0}"}}\n{{"prompt": "{1}"}}\n', []),
        ("q.jsonl", '{{"question": "{0}"}}\n{{"question": "{1}"}}\n', ["--map", "prompt=question"]),
        ("n.jsonl", '{{"prompt": "{0}", "completion": null}}\n{{"prompt": "{1}", "completion": null}}\n', []),
        ("c.csv", "prompt,completion\n{0},x\n{1},y\n", []),
    ],
)
def test_generate_reads_prompts_from_any_file(
    place: Place, tmp_path: Path, capsys, name: str, content: str, flags: list[str]
):
    prompts = [row["prompt"] for row in QUESTIONS[:2]]
    (tmp_path / name).write_text(content.format(*prompts))
    shown = out(capsys, "generate", "--adapter", place.run, "--input", str(tmp_path / name), *flags, *SHORT)
    alone = [out(capsys, "generate", "--adapter", place.run, "--prompt", p, *SHORT)[:-1] for p in prompts]
    assert answers(shown) == [{"prompt": p, "answer": a} for p, a in zip(prompts, alone, strict=True)]


def test_generate_answers_chats(place: Place, tmp_path: Path, capsys):
    rows = write_rows(tmp_path / "chats.jsonl", [CHATS[0], {"messages": CHATS[1]["messages"][:1]}])
    shown = answers(out(capsys, "generate", "--base", place.base, "--input", rows, *SHORT))
    assert [row["messages"] for row in shown] == [CHATS[0]["messages"], CHATS[1]["messages"][:1]]
    prompt = QUESTIONS[1]["prompt"]
    assert (
        shown[1]["answer"] == out(capsys, "generate", "--base", place.base, "--prompt", prompt, *SHORT)[:-1]
    )


def test_generate_writes_a_file(place: Place, tmp_path: Path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", QUESTIONS[:3])
    target = tmp_path / "out" / "answers.jsonl"
    arguments = ["generate", "--base", place.base, "--input", rows, *SHORT]
    assert out(capsys, *arguments, "--output", str(target)) == ""
    assert target.read_text() == out(capsys, *arguments)
    assert [path.name for path in target.parent.iterdir()] == ["answers.jsonl"]


def test_sampling_depends_on_the_seed_alone(place: Place, capsys):
    def sampled(seed: int) -> str:
        flags = ["--temperature", "2", "--seed", str(seed), "--max-new-tokens", "12", "--dtype", "float32"]
        return out(capsys, "generate", "--base", place.base, "--prompt", "What?", *flags)

    assert sampled(1) == sampled(1) != sampled(2)


def test_answers_are_printed_as_they_are(place: Place, monkeypatch, capsys):
    monkeypatch.setattr("onebase.cli.generate.answers", lambda *_: ["[bold]:smile:\tx[/]"])
    assert out(capsys, "generate", "--base", place.base, "--prompt", "x") == "[bold]:smile:\tx[/]\n"


# -- eval


def test_eval_sets_base_and_adapter_side_by_side(place: Place, tmp_path: Path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", QUESTIONS[::3])
    target = tmp_path / "scores.json"
    shown = out(capsys, "eval", "--adapter", place.run, "--data", rows, "--output", str(target), *SHORT)
    scores = json.loads(target.read_text())
    assert scores.keys() == {"base", "adapter"}
    for score in scores.values():
        assert score.keys() == {"loss", "tokens", "perplexity", "exact_match", "bleu", "chrf"}
        assert f"{score['loss']:.4f}" in shown
    base = onebase.load_base(place.base, "float32")
    adapter = onebase.load_adapter(place.run, base)
    assert scores["adapter"]["loss"] == pytest.approx(onebase.evaluate(base, rows, adapter).loss)
    assert scores["base"]["loss"] == pytest.approx(onebase.evaluate(base, rows).loss)
    assert scores["base"]["loss"] != scores["adapter"]["loss"]


def test_eval_with_holdout_takes_the_rows_that_training_held_out(place: Place, tmp_path: Path, capsys):
    config = DataConfig(data=place.rows, split_by="prompt")
    held = split_examples(read_examples(place.rows, config), 0.2, True, 5)[1]  # 5: the run's seed
    assert 0 < len(held) < len(QUESTIONS)
    rows = write_rows(
        tmp_path / "held.jsonl", [{"prompt": e.prompt, "completion": e.completion} for e in held]
    )
    target = tmp_path / "scores.json"
    flags = ["--adapter", place.run, "--no-generate", "--output", str(target), *SHORT]
    out(capsys, "eval", "--data", place.rows, "--holdout", "0.2", "--split-by", "prompt", *flags)
    by_split = json.loads(target.read_text())
    out(capsys, "eval", "--data", rows, *flags)
    assert json.loads(target.read_text()) == by_split
    recorded = [json.loads(line) for line in (Path(place.run) / "metrics.jsonl").read_text().splitlines()]
    assert by_split["base"]["loss"] == pytest.approx(recorded[0]["loss"], rel=1e-5)


def test_eval_counts_any_of_a_prompts_references_as_right(place: Place, tmp_path: Path, capsys):
    prompt = QUESTIONS[0]["prompt"]
    answer = out(capsys, "generate", "--base", place.base, "--prompt", prompt, *SHORT).strip()
    texts = [{"prompt": prompt, "completion": text} for text in ("not that", answer, "nor that")]
    target = tmp_path / "scores.json"
    rows = write_rows(tmp_path / "rows.jsonl", texts)
    out(capsys, "eval", "--base", place.base, "--data", rows, "--chat", "--output", str(target), *SHORT)
    assert json.loads(target.read_text())["base"]["exact_match"] == 1.0


def test_eval_of_plain_text_is_loss_alone(place: Place, tmp_path: Path, capsys):
    shown = out(
        capsys, "eval", "--base", place.base, "--data", write_rows(tmp_path / "t.jsonl", TEXTS), *SHORT
    )
    assert "perplexity" in shown
    assert "exact match" not in shown


# -- inspect


def test_inspect_tells_what_is_inside(place: Place, capsys):
    facts = json.loads(out(capsys, "inspect", place.run, "--json"))
    assert facts["base"]["name"] == place.base
    assert facts["base"]["fingerprint"]
    assert len(facts["modules"]) == 14
    assert {module["rank"] for module in facts["modules"]} == {4}
    assert facts["training"]["settings"]["seed"] == 5
    stored = (Path(place.run) / "adapter_model.safetensors").stat().st_size
    assert facts["bytes"] == stored
    shown = out(capsys, "inspect", "--json", "--", place.run)
    assert json.loads(shown) == facts
    assert "base fingerprint" in out(capsys, "inspect", place.run)


def test_inspect_reads_a_folder_that_peft_wrote(tmp_path: Path, capsys):
    config = PeftConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(text_model(), config).save_pretrained(tmp_path / "peft")
    facts = json.loads(out(capsys, "inspect", str(tmp_path / "peft"), "--json"))
    assert [module["norm"] for module in facts["modules"]] == [0.0, 0.0]
    assert facts["base"]["fingerprint"] == ""
    shown = out(capsys, "inspect", str(tmp_path / "peft"))
    assert "not recorded" in shown
    assert "2 of 2 modules" in shown


# -- processes


@pytest.mark.skipif(os.name != "posix", reason="a pipe that closes is POSIX")
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_traceback(place: Place, flags: list[str]):
    process = subprocess.Popen(
        [*ONEBASE, "inspect", place.run, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert errors == b""
    assert process.returncode == 0


def test_errors_go_to_stderr_with_their_code():
    ran = subprocess.run([*ONEBASE, "train", "--rank", "0"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "onebase: option rank=0: must be at least 1\n"
