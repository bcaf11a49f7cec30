"""Bad input, each kind: the documented exit code, a message that says asked, found and nearest, and nothing written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from place import TRAINING, Place
from safetensors.torch import load_file, save_file

from onebase.cli.main import main
from texts import QUESTIONS, save_base, write_rows

B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
SHORT = ["--max-new-tokens", "2", "--dtype", "float32"]


def refused(capsys, *arguments: str, told: tuple[str, ...]) -> str:
    """The message of a command that must end with 2, print no traceback, and say everything in `told`."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("onebase: ")
    assert "Traceback" not in captured.err
    assert [part for part in told if part not in captured.err] == [], captured.err
    return captured.err


def train(place: Place, output: Path, *flags: str) -> list[str]:
    return ["train", "--base", place.base, "--data", place.rows, "--output", str(output), *TRAINING, *flags]


# -- data


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", ("rows.jsonl: holds no rows",)),
        ("\n\n", ("holds no rows",)),
        ('{"prompt": "a", "completion": "b"}\n' * 16 + "oops\n", ("row 17 is not JSON", "column 1")),
        (
            '{"prompt": "a", "completion": "b"}\n' * 4 + '{"prompt": "a"}\n',
            ("row 5 has no column 'completion'",),
        ),
        ('{"prompt": "a", "completion": 3}\n', ("row 1 has a number in column 'completion', not text",)),
        (
            '{"question": "a", "answer": "b"}\n',
            ("question, answer", "--map prompt=question,completion=answer"),
        ),
        ("[" * 100_000, ("row 1 is nested too deeply",)),
    ],
    ids=["empty", "blank", "row 17", "missing column", "number", "other columns", "deep"],
)
def test_bad_rows_are_named_by_number(
    place: Place, tmp_path: Path, capsys, content: str, told: tuple[str, ...]
):
    (tmp_path / "rows.jsonl").write_text(content)
    output = tmp_path / "run"
    refused(capsys, *train(place, output, "--data", str(tmp_path / "rows.jsonl")), told=told)
    assert not output.exists()


def test_a_missing_data_file_gives_its_neighbours(place: Place, tmp_path: Path, capsys):
    write_rows(tmp_path / "reviews.jsonl", QUESTIONS)
    arguments = train(place, tmp_path / "run", "--data", str(tmp_path / "review.jsonl"))
    refused(capsys, *arguments, told=("review.jsonl: no such file", "nearest valid: reviews.jsonl"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "told"), [("--data", "option data"), ("--output", "option output")], ids=["data", "output"]
)
def test_what_training_cannot_do_without(place: Place, tmp_path: Path, capsys, flag: str, told: str):
    refused(capsys, *train(place, tmp_path / "run", flag, ""), told=(told, "is empty", flag))


def test_a_row_longer_than_the_context_offers_a_choice(place: Place, tmp_path: Path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [*QUESTIONS, {"prompt": "long " * 300, "completion": "x"}])
    arguments = train(place, tmp_path / "run", "--data", rows, "--holdout", "0")
    refused(capsys, *arguments, told=("28", "128", "--overlong", "truncate", "drop"))
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--overlong", "drop"]) == 0


def test_a_prompt_longer_than_the_context(place: Place, tmp_path: Path, capsys):
    target = tmp_path / "answers.jsonl"
    rows = write_rows(tmp_path / "rows.jsonl", [QUESTIONS[0], {"prompt": "long " * 300, "completion": "x"}])
    arguments = ["generate", "--base", place.base, "--input", rows, "--output", str(target), *SHORT]
    refused(capsys, *arguments, told=("prompt 2", "128", "shorten"))
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, ("none.txt: no such file",)),
        ("empty.txt", b"\n\n", ("holds no prompt",)),
        ("latin.txt", b"caf\xe9", ("not UTF-8", "byte 4")),
        ("rows.jsonl", b'{"question": "x"}\n', ("question", "needs one of")),
        ("rows.xlsx", b"", ("cannot read .xlsx", ".jsonl")),
    ],
)
def test_bad_files_of_prompts(place: Place, tmp_path: Path, capsys, name: str, content: bytes | None, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(capsys, "generate", "--base", place.base, "--input", str(tmp_path / name), *SHORT, told=told)


def test_generate_wants_one_of_prompt_and_input(place: Place, capsys):
    refused(capsys, "generate", "--base", place.base, told=("prompt and input", "neither"))
    both = ["--prompt", "x", "--input", place.rows]
    refused(capsys, "generate", "--base", place.base, *both, told=("prompt and input", "contradict"))


# -- what to train


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--target-modules", "q_porj"], ("q_porj", "nearest valid: ", "q_proj")),
        (["--target-modules", "q_proj,norm"], ("norm",)),
        (["--target-modules", "re:nothing.*"], ("the pattern matches no module",)),
        (["--exclude-modules", "q_porj"], ("exclude_modules q_porj", "q_proj")),
        (["--layers", "0-7"], ("layers 0-7", "0-1")),
        (["--rank", "0"], ("rank=0", "at least 1")),
        (["--rank", "33"], ("rank 33", "a rank above", "adds nothing")),
        (["--rank-pattern", "q_porj=2"], ("rank_pattern q_porj", "q_proj")),
        (["--modules-to-save", "lm_haed"], ("modules_to_save lm_haed", "lm_head")),
        (["--holdout", "400"], ("400", "27")),
        (["--split-by", "promt"], ("no column 'promt'", "nearest valid: prompt")),
        (["--max-length", "4096"], ("4096", "128")),
        (["--log", "tensorbord"], ("tensorbord", "tensorboard")),
    ],
)
def test_a_run_that_cannot_be_meant(
    place: Place, tmp_path: Path, capsys, flags: list[str], told: tuple[str, ...]
):
    refused(capsys, *train(place, tmp_path / "run", *flags), told=told)
    assert not (tmp_path / "run").exists()


# -- where to write


def test_a_run_is_never_overwritten_in_silence(place: Place, capsys):
    before = (Path(place.run) / "metrics.jsonl").read_bytes()
    refused(capsys, *train(place, Path(place.run)), told=("already holds a run", "--resume", "--overwrite"))
    assert (Path(place.run) / "metrics.jsonl").read_bytes() == before


def test_a_folder_that_holds_other_things_is_left_alone(place: Place, tmp_path: Path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(capsys, *train(place, tmp_path, "--overwrite"), told=("not empty and holds no run",))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_resume_needs_a_run(place: Place, tmp_path: Path, capsys):
    refused(
        capsys, "train", "--output", str(tmp_path / "none"), "--resume", told=("none", "no run to resume")
    )


def test_output_below_a_file(place: Place, tmp_path: Path, capsys):
    (tmp_path / "file").write_text("kept")
    refused(capsys, *train(place, tmp_path / "file" / "run"), told=("file/run",))
    refused(capsys, *train(place, tmp_path / "file"), told=("it is a file",))
    for command in (["generate", "--prompt", "x"], ["eval", "--data", place.rows]):
        output = ["--output", str(tmp_path / "file" / "x.json")]
        refused(capsys, *command, "--base", place.base, *output, *SHORT, told=("file is not a folder",))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "kept")]


def test_output_that_is_a_folder(place: Place, tmp_path: Path, capsys):
    arguments = ["generate", "--base", place.base, "--prompt", "x", "--output", str(tmp_path), *SHORT]
    refused(capsys, *arguments, told=("it is a folder",))


def test_output_that_cannot_be_written(place: Place, capsys):
    refused(capsys, *train(place, Path("/proc/onebase-run")), told=("/proc/onebase-run",))


# -- bases


@pytest.mark.parametrize("offline", ["owner/model", "modle"])
def test_a_hub_name_without_network(tmp_path: Path, monkeypatch, capsys, offline: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused(
        capsys, "generate", "--base", offline, "--prompt", "x", told=(offline, "not cached", "built-in base")
    )


def test_a_misspelt_folder_gives_the_nearest(place: Place, tmp_path: Path, capsys):
    arguments = ["generate", "--prompt", "x", *SHORT]
    wrong = str(Path(place.base).with_name("bse"))
    refused(capsys, *arguments, "--base", wrong, told=("no such file or folder", place.base))


def test_an_adapter_is_no_base(place: Place, capsys):
    told = ("an adapter, not a base", place.base)
    refused(capsys, "generate", "--base", place.run, "--prompt", "x", told=told)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 40, b"not a gguf at all"])
def test_a_broken_gguf(tmp_path: Path, monkeypatch, capsys, content: bytes):
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "half.gguf").write_bytes(content)
    refused(capsys, "generate", "--base", str(tmp_path / "half.gguf"), "--prompt", "x", told=("half.gguf",))


def test_a_base_with_weights_cut_short(tmp_path: Path, capsys):
    base = save_base(tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(capsys, "generate", "--base", str(base), "--prompt", "x", *SHORT, told=("model.safetensors",))


# -- adapters


def with_adapter(folder: Path) -> list[str]:
    return ["generate", "--adapter", str(folder), "--prompt", "x", *SHORT]


def test_no_adapter_there(copied_run: Path, capsys):
    refused(capsys, *with_adapter(copied_run.with_name("adaptor")), told=("no such folder", "adapter"))
    refused(capsys, *with_adapter(copied_run / "adapter_config.json"), told=("no such folder",))
    refused(capsys, "inspect", told=("option adapter", "onebase inspect runs/first"))


def break_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def put_nan(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    stored[B][0, 0] = torch.nan
    save_file(stored, path)
    (folder / "onebase.json").unlink()


def pickle_it(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def disguise_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps({}))


def set_config(**values: object):
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (break_config, ("adapter_config.json: no such file", "the folder holds")),
        (cut_short, ("broken or cut short",)),
        (put_nan, (f"{B}: holds NaN",)),
        (pickle_it, ("only adapter_model.bin, a pickle",)),
        (disguise_pickle, ("a pickle under a safetensors name",)),
        (set_config(use_qalora=True, bias="some"), ("use_qalora=True", "bias='some'")),
        (set_config(init_lora_weights="pissa"), ("init_lora_weights='pissa'",)),
        (set_config(r="four"), ("r='four'", "must be int")),
        (set_config(r=2), ("the config says rank 2",)),
    ],
)
@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_broken_adapters(copied_run: Path, capsys, command: str, damage, told: tuple[str, ...]):
    damage(copied_run)
    arguments = with_adapter(copied_run) if command == "generate" else ["inspect", str(copied_run)]
    refused(capsys, *arguments, told=told)


def test_missing_extra_and_misshapen_tensors_are_listed_at_once(copied_run: Path, capsys):
    path = copied_run / "adapter_model.safetensors"
    stored = load_file(path)
    start = "base_model.model.model.layers"
    for side, end in (("A", (4, 32)), ("B", (32, 4))):
        stored.pop(f"{start}.1.mlp.up_proj.lora_{side}.weight")
        stored[f"{start}.9.mlp.up_proj.lora_{side}.weight"] = torch.ones(end)
        stored[f"{start}.0.mlp.up_proj.lora_{side}.weight"] = torch.ones(end)
    save_file(stored, path)
    (copied_run / "onebase.json").unlink()
    told = (
        "layers.1.mlp.up_proj: missing",
        "layers.9.mlp.up_proj: the base has no such module",
        "is 48 x 32",
    )
    refused(capsys, *with_adapter(copied_run), told=told)


def test_an_adapter_for_another_base(place: Place, tmp_path: Path, capsys):
    other = str(save_base(tmp_path / "other", seed=1))
    arguments = ["generate", "--base", other, "--adapter", place.run, "--prompt", "x", *SHORT]
    refused(capsys, *arguments, told=("made for base", place.base, "fingerprint", "--allow-base-mismatch"))
    assert main([*arguments, "--allow-base-mismatch"]) == 0
