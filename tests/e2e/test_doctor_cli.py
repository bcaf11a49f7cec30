"""`onebase doctor` and `onebase compare`: what they print, their exit codes, and how they refuse."""

import json
import math
from dataclasses import replace

import pytest
import torch

from onebase.cli.main import main
from onebase.cli.pictures import bar, heat_map
from onebase.config import LoraConfig
from onebase.diagnosis.checkup import CHECKS
from onebase.models.fingerprint import fingerprint_files
from onebase.storage.format import save_adapter
from sickness import adapter, edit_config, edit_tensors
from texts import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("doctor") / "base")


@pytest.fixture
def made(base):
    return adapter(base=str(base), fingerprint=fingerprint_files(base))


@pytest.fixture
def folder(made, tmp_path):
    return save_adapter(made, tmp_path / "adapter")


def words(text):
    """The text of tables without their lines."""
    return " ".join("".join(" " if mark in "│┃━─┏┓┗┛┳┻┡┩╇└┘┴┬├┤┼" else mark for mark in text).split())


def doctor(capsys, *arguments):
    code = main(["doctor", *map(str, arguments)])
    return code, capsys.readouterr()


def facts(capsys, *arguments):
    code, shown = doctor(capsys, *arguments, "--json")
    return code, json.loads(shown.out)


def test_a_healthy_adapter_on_its_own_base(folder, capsys):
    code, shown = doctor(capsys, folder)
    assert code == 0
    text = words(shown.out)
    assert text.endswith("verdict: healthy")
    assert "all 14 modules are the base's" in text
    assert "KL(base || adapted)" in text
    assert "|W' - W| / |W| by layer" in text
    assert "model.layers.*.self_attn.q_proj" in text


def test_everything_as_json(folder, base, capsys):
    code, found = facts(capsys, folder)
    assert (code, found["healthy"], found["verdict"], found["base"]) == (0, True, "healthy", str(base))
    assert [one["check"] for one in found["findings"]] == list(CHECKS)
    assert {one["severity"] for one in found["findings"]} == {"fine"}
    assert len(found["modules"]) == 14
    assert all(0 < m["ratio"] < 1 and m["rank"] == 4 and m["scale"] == 2.0 for m in found["modules"])
    assert found["effect"]["mean"] > 0.01


def test_a_sick_adapter_exits_with_1(made, tmp_path, capsys):
    low = {p: one._replace(B=torch.zeros_like(one.B)) for p, one in made.lowrank.items()}
    folder = save_adapter(replace(made, lowrank=low), tmp_path / "idle")
    code, found = facts(capsys, folder)
    assert (code, found["healthy"]) == (1, False)
    assert found["verdict"] == "sick: no effect: B·A is 0 in all 14 modules (1 other error)"
    assert found["effect"] == {
        "tokens": found["effect"]["tokens"],
        "mean": 0.0,
        "largest": 0.0,
        "changed": 0.0,
    }


def test_warnings_keep_the_exit_code(folder, capsys):
    edit_config(folder, alpha_pattern={"q_prj": 2.0})
    code, found = facts(capsys, folder)
    assert (code, found["healthy"]) == (0, True)
    assert found["verdict"].startswith("healthy, 1 warning: alpha_pattern q_prj")


def test_without_a_base(folder, capsys):
    code, shown = doctor(capsys, folder, "--base", "off")
    assert code == 0
    assert (
        "not looked at base, keys, size, intruders, merged, prompt, words, effect: left out: --base off"
        in words(shown.out)
    )
    assert "|s·B·A| by layer" in shown.out


def test_a_recorded_base_that_is_gone_is_no_mistake_of_the_user(made, tmp_path, capsys):
    gone = replace(made, origin=replace(made.origin, base=str(tmp_path / "gone")))
    code, found = facts(capsys, save_adapter(gone, tmp_path / "adapter"))
    assert (code, found["base"]) == (0, None)
    skipped = [one for one in found["findings"] if one["severity"] == "skipped"]
    assert {one["check"] for one in skipped} == {name for name, check in CHECKS.items() if check.needs_base}
    assert "the recorded base cannot be opened" in skipped[0]["found"]
    code, shown = doctor(capsys, tmp_path / "adapter", "--base", tmp_path / "gone")
    assert code == 2
    assert "no such file or folder" in shown.err


def test_files_that_nothing_else_would_read(folder, capsys):
    edit_tensors(folder, lambda n, t: (n.replace("lora_A.", "lora_A.default."), t))
    code, found = facts(capsys, folder)
    assert code == 1
    assert "the adapter's name inside" in found["verdict"]
    assert len(found["modules"]) == 14
    assert found["findings"][-1]["found"] == "the adapter cannot be loaded"
    edit_tensors(folder, lambda n, t: (n, t * math.nan))
    code, found = facts(capsys, folder)
    assert code == 1
    assert {m["largest"] for m in found["modules"]} == {None}  # JSON has no NaN


def test_a_renamed_base(folder, capsys):
    edit_tensors(
        folder, lambda n, t: (n.replace("model.model.layers", "model.model.language_model.layers"), t)
    )
    code, shown = doctor(capsys, folder)
    assert code == 1
    assert "model.language_model. -> model. in the names would match 14 of them" in words(shown.out)


def test_prompts_of_a_file(folder, tmp_path, capsys):
    few = tmp_path / "few.txt"
    few.write_text("What has Ada bought?\n\n", encoding="utf-8")
    many = facts(capsys, folder)[1]["effect"]["tokens"]
    assert 0 < facts(capsys, folder, "--prompts", few)[1]["effect"]["tokens"] < many


def test_refusals(folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe")
    cases = {
        (): "option adapter: is empty",
        (tmp_path / "adaptor",): "nearest valid: adapter",
        (folder, "--prompts", tmp_path / "emty.txt"): "nearest valid: empty.txt",
        (folder, "--prompts", tmp_path / "empty.txt"): "it holds no prompt",
        (folder, "--prompts", tmp_path / "odd.txt"): "not UTF-8",
        (folder, "--base", folder): "an adapter, not a base",
    }
    for arguments, message in cases.items():
        code, shown = doctor(capsys, *arguments)
        assert code == 2, arguments
        assert message in shown.err


# -- compare


@pytest.fixture
def other(base, tmp_path):
    config = LoraConfig(rank=2, alpha=2, target_modules=["q_proj", "v_proj"])
    made = adapter(
        config=config, base=str(base), fingerprint=fingerprint_files(base), prompt={"separator": "\n"}
    )
    return save_adapter(made, tmp_path / "other")


def compare(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    return code, capsys.readouterr()


def test_compare_two_adapters(folder, other, capsys):
    code, shown = compare(capsys, folder, other, "--max-new-tokens", "4")
    assert code == 0
    text = words(shown.out)
    assert "4 in both, 10 only in the first" in text
    assert "base || first" in text
    assert "first || second" in text
    assert "chance" in text
    assert "The capital of France is" in text


def test_compare_as_json(folder, other, capsys):
    code, shown = compare(capsys, folder, other, "--json", "--answers", "2", "--max-new-tokens", "4")
    assert code == 0
    found = json.loads(shown.out)
    assert found["summary"]["shared"] == 4
    shared = [m for m in found["modules"] if m["cosine"] is not None]
    assert len(shared) == 4
    assert all(abs(m["cosine"]) <= 1 and 0 <= m["overlap"]["inputs"] <= 1 for m in shared)
    assert [(d["of"], d["from"]) for d in found["prompts"]["divergences"]] == [
        ("base", "first"),
        ("base", "second"),
        ("first", "second"),
    ]
    assert [set(answer) for answer in found["prompts"]["answers"]] == [
        {"prompt", "base", "first", "second"}
    ] * 2


def test_compare_an_adapter_with_itself(folder, capsys):
    code, shown = compare(capsys, f"{folder},{folder}", "--json", "--answers", "0")
    assert code == 0
    found = json.loads(shown.out)
    assert found["summary"]["cosine"] == pytest.approx(1.0)
    assert found["prompts"]["divergences"][2]["mean"] == 0.0
    assert "answers" not in found["prompts"]


def test_compare_without_a_base(folder, other, capsys):
    code, shown = compare(capsys, folder, other, "--base", "off")
    assert code == 0
    assert "not looked at: left out: --base off" in words(shown.out)


def test_compare_refuses(folder, other, made, tmp_path, capsys):
    stranger = save_adapter(
        replace(made, origin=replace(made.origin, fingerprint="sha256:x")), tmp_path / "stranger"
    )
    for arguments, message in {
        (folder,): "1 adapter folders, it takes two",
        (folder, other, folder): "3 adapter folders",
        (folder, tmp_path / "othr"): "nearest valid: other",
        (folder, stranger): "--allow-base-mismatch to go on",
        (folder, other, "--answers", "-1"): "option answers=-1",
    }.items():
        code, shown = compare(capsys, *arguments)
        assert code == 2, arguments
        assert message in shown.err
    assert compare(capsys, folder, stranger, "--allow-base-mismatch", "--answers", "0")[0] == 0


# -- pictures


def test_a_heat_map_has_a_row_for_each_target_and_a_cell_for_each_layer():
    values = {f"model.layers.{n}.mlp.up_proj": n / 10 for n in range(11)} | {
        "model.layers.4.k": 0.5,
        "lm_head": 0.0,
    }
    found = heat_map(values, 40)
    assert found.top == 1.0
    assert {row.name: row.cells for row in found.rows} == {
        "model.layers.*.mlp.up_proj": "0▁▂▂▃▄▅▆▆▇█",
        "model.layers.*.k": "▄",
        "lm_head": "0",
    }
    assert found.rows[0].mean == pytest.approx(0.5)
    assert heat_map(values, 40, plain=True).rows[0].cells.isascii()
    narrow = heat_map(values, 4)
    assert (narrow.layers, narrow.rows[0].cells) == (3, "▂▄▆█")  # the largest of three layers
    gap = heat_map({"h.0.q": 1.0, "h.2.q": 1.0, "h.1.v": 1.0}, 9)
    assert gap.rows[0].cells == "█·█"
    assert heat_map({}, 10).rows == []
    far = heat_map({"h.0.q": 1.0, f"h.{10**15}.q": 1.0}, 10)  # a broken file may name any layer
    assert far.rows[0].cells == "█········█"


def test_bars():
    assert bar(0.5, 1.0, 8) == "████"
    assert bar(2.0, 1.0, 8, plain=True) == "########"
    assert bar(0.0, 0.0, 8) == ""
