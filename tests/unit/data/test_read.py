"""Rows from files: what is accepted, and that each error names the row, the columns and the way out."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from onebase.config import DataConfig
from onebase.data.read import Example, read_examples
from onebase.errors import ConfigError, DataError, MissingFile

PAIR = {"prompt": "q", "completion": "a"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def write(folder: Path, content: object, name: str = "rows.jsonl") -> str:
    path = folder / name
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    return str(path)


def read(source: str, **options: object) -> list[Example]:
    return read_examples(source, DataConfig(**options))


def failure(source: str, error: type[Exception] = DataError, **options: object) -> str:
    with pytest.raises(error) as caught:
        read(source, **options)
    return str(caught.value)


def test_jsonl_rows_are_lines_and_blank_lines_count(tmp_path):
    source = write(tmp_path, b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "caf\xc3\xa9"}\r\n\n')
    assert read(source) == [Example(1, text="one"), Example(3, text="café")]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "JSONL"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = [{"prompt": "1", "completion": "a,\nb", "key": "x"}, {"prompt": "2", "completion": "", "key": "y"}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = {
            "json": json.dumps(rows),
            "csv": 'prompt,completion,key\n1,"a,\nb",x\n2,,y\n',
        }.get(suffix, "\n".join(map(json.dumps, rows)))
        path.write_text(text)
    examples = read(str(path), split_by="key")
    assert examples == [
        Example(1, prompt="1", completion="a,\nb", group="x"),
        Example(2, prompt="2", completion="", group="y"),
    ]
    assert [example.row for example in read(str(path), limit=1)] == [1]


def test_messages_and_conversational_prompts_become_one_chat(tmp_path):
    whole = read(write(tmp_path, [{"messages": CHAT}]))[0]
    parts = read(write(tmp_path, [{"prompt": CHAT[:1], "completion": CHAT[1:]}]))[0]
    assert whole == parts
    assert whole.kind == "messages"
    assert whole.messages == tuple(CHAT)


def test_messages_of_parquet_may_have_null_extras(tmp_path):
    rows = [{"messages": [message | {"tool_calls": None} for message in CHAT]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert read(str(tmp_path / "r.parquet"))[0].messages == tuple(CHAT)


def test_map_renames_and_fills_up_with_columns_of_our_name(tmp_path):
    source = write(tmp_path, [{"question": "q", "completion": "a", "text": "t"}])
    assert read(source, map="prompt=question") == [Example(1, prompt="q", completion="a")]
    assert read(source, map="text=question") == [Example(1, text="q")]
    assert read(source)[0].kind == "text"


def test_aliases_are_offered_never_guessed(tmp_path):
    message = failure(write(tmp_path, [{"question": "q", "answer": "a"}]))
    assert "question, answer" in message
    assert "--map prompt=question,completion=answer" in message
    assert "--map messages=conversations" in failure(write(tmp_path, [{"conversations": CHAT}]))
    assert "--map completion=response" in failure(write(tmp_path, [{"prompt": "q", "response": "a"}]))
    assert "COLUMN" in failure(write(tmp_path, [{"a": 1, "b": 2}]))


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (b'{"text": "a"}\n{"text": \n', {}, ["row 2 is not JSON", "column"]),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', {}, ["row 3 is not UTF-8", "byte 11"]),
        (b'{"text": "a"}\n[1]\n', {}, ["row 2 is a list"]),
        ([{"text": "a"}, {"texts": "b"}], {}, ["row 2 has no column 'text'", "nearest valid: texts"]),
        ([PAIR, PAIR | {"completion": None}], {}, ["row 2 has null in column 'completion'"]),
        ([PAIR, PAIR | {"prompt": 3}], {}, ["row 2 has a number in column 'prompt', not text"]),
        ([PAIR, PAIR | {"prompt": CHAT}], {}, ["row 2 has a list in column 'prompt'"]),
        ([{"text": CHAT}], {}, ["row 1 has a list in column 'text', not text"]),
        ([{"messages": "hi"}], {}, ["row 1 has text in column 'messages', not a list of messages"]),
        ([{"messages": []}], {}, ["row 1 has an empty list"]),
        ([{"messages": ["hi"]}], {}, ["text as message 1"]),
        ([{"messages": [{"role": "human", "content": "x"}]}], {}, ["role 'human' in message 1", "assistant"]),
        ([{"messages": [*CHAT, {"role": "user"}]}], {}, ["null as content of message 3"]),
        ([{"messages": [CHAT[0] | {"tool_calls": [{}]}]}], {}, ["tool calls in message 1"]),
        (b'{"text": "\\ud83d"}\n', {}, ["half a surrogate pair", "row 1"]),
        (
            [PAIR],
            {"map": "prompt=promt,completion=completion"},
            ["no column 'promt'", "nearest valid: prompt"],
        ),
        ([PAIR], {"split_by": "promt"}, ["no column 'promt'", "split_by", "nearest valid: prompt"]),
        ([PAIR | {"g": "a"}, PAIR], {"split_by": "g"}, ["row 2 has no column 'g'"]),
        (b"", {}, ["holds no rows"]),
        (b"\n\n", {}, ["holds no rows"]),
    ],
)
def test_errors_name_row_and_column(tmp_path, content, options, expected):
    source = write(tmp_path, content)
    message = failure(source, **options)
    assert source in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("r.json", '{"text": "a"}', "holds an object, not a list"),
        ("r.json", '[{"text": "a"},\n {"text": }]', "line 2, column 11"),
        ("r.json", '[{"text": "a"}, 3]', "row 2 is a number"),
        ("r.json", "[" * 100_000, "nested too deeply"),
        ("r.csv", "prompt,completion\na,b\nc\n", "row 2 (line 3) has 1 fields, the header 2"),
        ("r.csv", 'prompt,completion\na,"b\n', "row 1 (line 2) is not CSV"),
        ("r.csv", "text,text\na,b\n", "two columns have the same name"),
        ("r.csv", b"text\na\n\xe9\n", "row 3 is not UTF-8"),
        ("r.csv", "text\n", "holds no rows"),
        ("r.parquet", "not parquet", "not readable as Parquet"),
        ("r.xlsx", "x", "cannot read .xlsx"),
    ],
)
def test_broken_files(tmp_path, name, content, expected):
    assert expected in failure(write(tmp_path, content, name))


def test_unknown_map_key_is_a_config_error(tmp_path):
    assert "no column 'promt'" in failure(write(tmp_path, [PAIR]), ConfigError, map="promt=prompt")


def test_group_by_our_name_of_a_mapped_column(tmp_path):
    source = write(tmp_path, [{"question": "q", "completion": "a"}])
    assert read(source, map="prompt=question", split_by="prompt")[0].group == "q"


def test_missing_files_name_their_neighbours(tmp_path):
    write(tmp_path, [PAIR], "train.jsonl")
    write(tmp_path, "x", "train.txt")
    message = failure(str(tmp_path / "trian.jsonl"), MissingFile)
    assert "nearest valid: train.jsonl" in message
    assert "train.txt" not in message
    assert "there is no folder" in failure(str(tmp_path / "no" / "x.jsonl"), MissingFile)
    assert "is a folder" in failure(str(tmp_path))
    assert "train.jsonl" in failure(str(tmp_path))


def test_a_name_in_an_existing_folder_is_meant_as_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert "no such file" in failure("data/rows", MissingFile)


def test_an_unreachable_hub_dataset_says_what_was_tried(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = failure("nobody/no-such-set", MissingFile, split="train")
    assert "hub dataset 'nobody/no-such-set' (split 'train')" in message


def test_a_hub_dataset_is_read_by_split_and_subset(monkeypatch):
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        if split == "tset":
            raise ValueError("Unknown split")
        return datasets.Dataset.from_list([{"question": "q", "answer": "a"}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("openai/gsm8k:main", split="test", map="prompt=question,completion=answer", limit=2)
    assert asked == [("openai/gsm8k", "main", "test")]
    assert [row.row for row in rows] == [1, 2]
    assert "Unknown split" in failure("openai/gsm8k", split="tset")


def test_an_example_is_exactly_one_kind():
    with pytest.raises(DataError, match="row 4"):
        Example(4, prompt="a")
    with pytest.raises(DataError):
        Example(4, text="a", messages=())
    assert Example(1, prompt="", completion="").kind == "completion"
