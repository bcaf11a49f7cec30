"""Flags, YAML files and help: what was given comes out typed or refused, flags over files, nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from onebase.cli.main import COMMANDS, main
from onebase.cli.parser import parse
from onebase.config import LOGGERS, TrainConfig, build
from onebase.errors import ConfigError, MissingFile, nearest
from onebase.options import flat_options
from onebase.training import loggers


def train(*arguments: str):
    return parse("train", COMMANDS["train"], arguments)


def config_file(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_only_given_options_come_out_even_with_their_default_value():
    assert flat_options(TrainConfig)["rank"][1] == 16
    assert train() == {}
    assert train("--rank", "16", "--no-resume") == {"rank": "16", "resume": False}


@pytest.mark.parametrize("spelling", [("--max-length", "64"), ("--max_length", "64"), ("--max_length=64",)])
def test_dashes_and_underscores_both_work(spelling: tuple[str, ...]):
    assert train(*spelling) == {"max_length": "64"}


def test_values_are_left_alone_by_the_spelling_of_flags():
    assert train("--base=my_base", "--system", "a --b_c d") == {"base": "my_base", "system": "a --b_c d"}


@pytest.mark.parametrize("order", [0, 1], ids=["file first", "flag first"])
def test_flags_go_over_the_file_in_any_order(tmp_path: Path, order: int):
    parts = [["--config", config_file(tmp_path, "rank: 8\nalpha: 4")], ["--rank", "16"]]
    given = train(*parts[order], *parts[1 - order])
    config = build(TrainConfig, given or {})
    assert (config.lora.rank, config.lora.alpha) == (16, 4.0)


def test_a_later_file_goes_over_an_earlier_one(tmp_path: Path):
    first = config_file(tmp_path, "rank: 8\nseed: 3", "a.yaml")
    second = config_file(tmp_path, "rank: 4", "b.yaml")
    assert train("--config", first, "--config", second) == {"rank": 4, "seed": 3}


@pytest.mark.parametrize("name", COMMANDS)
def test_print_config_reads_back_as_the_same_config(name: str, tmp_path: Path, capsys):
    command = COMMANDS[name]
    assert parse(name, command, ["--print_config"]) is None
    printed = capsys.readouterr().out
    given = parse(name, command, ["--config", config_file(tmp_path, printed)])
    assert build(command.options, given or {}) == command.options()


def test_print_config_keeps_what_was_given(tmp_path: Path, capsys):
    flags = ["--lr", "1e-3", "--map", "prompt=question,completion=answer", "--rank-pattern", "q_proj=4"]
    flags += ["--target-modules", "q_proj,v_proj", "--separator", "\n ü\n", "--no-teach-eos", "--layers", "5"]
    assert main(["train", *flags, "--print-config"]) == 0
    printed = capsys.readouterr().out
    config = build(TrainConfig, train("--config", config_file(tmp_path, printed)) or {})
    assert config == build(TrainConfig, train(*flags) or {})
    assert config.data.map_columns == {"prompt": "question", "completion": "answer"}
    assert config.lora.ranks == {"q_proj": 4}
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert (config.optim.lr, config.data.separator, config.data.teach_eos) == (1e-3, "\n ü\n", False)
    assert config.lora.layers == "5"


@pytest.mark.parametrize(
    "text", ["rank_pattern: {q_proj: 4}", "rank_pattern: q_proj=4", "rank-pattern: {q_proj: 4}"]
)
def test_a_file_may_hold_pairs_as_a_mapping_or_as_text(tmp_path: Path, text: str):
    assert build(TrainConfig, train("--config", config_file(tmp_path, text)) or {}).lora.ranks == {
        "q_proj": 4
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ranks", "3"], ["unknown option --ranks", "--rank"]),
        (["--ran", "3"], ["unknown option --ran", "--rank"]),
        (["--split_bye=x"], ["unknown option --split-bye", "--split-by"]),
        (["rows.jsonl"], ["unexpected 'rows.jsonl'"]),
        (["--rank"], ["--rank", "expected one argument"]),
        (["--rank", "abc"], ["rank='abc'", "a whole number"]),
        (["--rank", "2.5"], ["rank='2.5'", "a whole number"]),
        (["--rank", "0"], ["rank=0", "at least 1"]),
        (["--lr", "nan"], ["lr=nan", "a finite number"]),
        (["--epochs", "inf"], ["epochs=inf", "a finite number"]),
        (["--seed", "-1"], ["seed=-1", "0 or more"]),
        (["--schedule", "cosin"], ["schedule='cosin'", "linear, cosine, constant"]),
        (["--rank-pattern", "q_proj=4.5"], ["rank_pattern", "4.5"]),
        (["--rank-pattern", "q_proj"], ["rank_pattern", "pairs"]),
        (["--rank-pattern", "(=2"], ["(", "no regular expression"]),
        (["--target-modules", "re:("], ["(", "no regular expression"]),
        (["--resume", "--overwrite"], ["resume and overwrite", "contradict"]),
        (["--validation", "v.jsonl", "--split-by", "prompt"], ["validation and split_by", "contradict"]),
        (["--allow", "no-los"], ["no-los", "no-loss"]),
    ],
)
def test_a_wrong_flag_is_named_with_what_was_meant(arguments: list[str], told: list[str]):
    with pytest.raises(ConfigError) as caught:
        train(*arguments)
    assert [part for part in told if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ranks: 3", ["unknown option ranks in", "nearest valid: rank"]),
        ("rank: eight", ["rank='eight'", "a whole number"]),
        ("rank: true", ["rank=True", "a whole number"]),
        ("rank: [8]", ["rank=[8]", "a whole number"]),
        ("rank:", ["rank=None", "a whole number"]),
        ("lr: .nan", ["lr=nan", "a finite number"]),
        ("alpha: 1" + "0" * 400, ["alpha=1000", "a finite number"]),
        ("system: yes", ["system=True", "text"]),
        ("resume: 1", ["resume=1", "true or false"]),
        ("target_modules: [q_proj, 3]", ["target_modules", "names, with commas"]),
        ("rank_pattern: {q_proj: 4.5}", ["rank_pattern", "pairs such as"]),
        ("alpha_pattern: {q_proj: .inf}", ["alpha_pattern", "pairs such as"]),
        ("map: 3", ["map=3", "pairs"]),
        ("lora: {rank: 8}", ["unknown option lora"]),
        ("- 3", ["must hold lines such as"]),
        ("a: b: c", ["not YAML"]),
        ("[" * 5000, ["not YAML"]),
        ("", ["must hold lines such as"]),
    ],
)
def test_a_wrong_file_is_named_with_what_was_meant(tmp_path: Path, text: str, told: list[str]):
    with pytest.raises(ConfigError) as caught:
        train("--config", config_file(tmp_path, text))
    assert [part for part in told if part not in str(caught.value)] == []


def test_numbers_in_a_file_are_read_as_their_option_means_them(tmp_path: Path):
    given = train(
        "--config", config_file(tmp_path, "lr: 1e-3\nlayers: 5\nepochs: 2")
    )  # YAML reads 1e-3 as text
    config = build(TrainConfig, given or {})
    assert (config.optim.lr, config.lora.layers, config.optim.epochs) == (1e-3, "5", 2.0)


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path):
    config_file(tmp_path, "rank: 8")
    with pytest.raises(MissingFile, match=r"rum\.yaml: no such file\n.*run\.yaml"):
        train("--config", str(tmp_path / "rum.yaml"))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path):
    (tmp_path / "x.yaml").write_bytes(b"rank: \xff\xfe")
    with pytest.raises(ConfigError, match="not YAML"):
        train("--config", str(tmp_path / "x.yaml"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option_once_with_its_default(name: str, capsys):
    assert main([name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    options = flat_options(COMMANDS[name].options)
    flags = [f"--{option.replace('_', '-')}" for option in options if option != COMMANDS[name].positional]
    assert [flag for flag in flags if shown.count(f" {flag} ") + shown.count(f" {flag}, ") < 1] == []
    assert shown.count("(default: ") == len(flags)
    assert COMMANDS[name].example in shown
    assert "Config" not in shown


def test_help_says_where_a_default_comes_from(capsys):
    main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "docs/evidence.md" in shown.partition("--lr ")[2].partition("(default: 0.0)")[0]
    assert "(default: 16)" in shown.partition("--rank ")[2][:200]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_lists_every_command(arguments: list[str], capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert [name for name, command in COMMANDS.items() if command.help not in shown] == []


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("onebase 0.")


def test_an_unknown_command_gives_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "nearest valid: train" in capsys.readouterr().err
    assert nearest("trian", COMMANDS)[0] == "train"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["train", "--rank", "x"], ["--version"]]
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments: list[str]):
    code = "import sys; from onebase.cli.main import main; main(sys.argv[1:]); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split("\n")[-2].split())
    assert "onebase.cli.main" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "numpy", "datasets", "rich"})


def test_the_loggers_that_are_accepted_are_those_there_are():
    assert set(LOGGERS) == set(loggers.LOGGERS)


def test_a_printed_config_is_plain_yaml(capsys):
    main(["train", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["target_modules"] == "all-linear"
