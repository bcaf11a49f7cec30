"""`onebase bench`: three ways that give one loss, what their numbers say of each other, and what stops it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, set_seed

from onebase.adapters.injection import new_adapter
from onebase.cli import bench
from onebase.cli.main import main
from onebase.config import DataConfig, LoraConfig
from onebase.data.read import read_examples
from onebase.data.template import encode
from onebase.demo import read_demo
from onebase.models.base import load_base
from onebase.training.work import Attention, Decoder, Linear, Load
from texts import text_model, tokenizer

SHORT = ["--batch-size", "2", "--steps", "2", "--rank", "4", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BOUND_SECONDS", 0.05)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny base whose context holds the demo's rows."""
    folder = tmp_path_factory.mktemp("base")
    text_model(max_position_embeddings=512).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def facts(capsys: pytest.CaptureFixture[str], *arguments: str):
    code = main(["bench", *arguments, *SHORT, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_three_ways_one_loss(base: str, capsys: pytest.CaptureFixture[str]):
    code, found = facts(capsys, "--base", base)
    assert code == 0
    assert found["equal"] is True
    assert (found["batch_size"], found["rank"], found["steps"], found["dtype"]) == (2, 4, 2, "float32")
    ways = found["ways"]
    assert [way["note"] for way in ways] == ["", "", ""]
    assert ways[0]["loss"] == pytest.approx(ways[2]["loss"], rel=1e-5)
    assert ways[1]["loss"] == pytest.approx(ways[2]["loss"], rel=1e-5)
    assert found["losses_apart"] <= 1e-5
    for way in ways:
        assert way["share_of_bound"] == pytest.approx(way["tokens_per_second"] / found["bound"])
        ratio = way["tokens_per_second"] / ways[2]["tokens_per_second"]
        assert way["against_peft"] == pytest.approx(ratio)
    assert 0 < found["bound_each"] <= found["bound"]


def test_the_loss_is_that_of_the_demos_first_rows(base: str, capsys: pytest.CaptureFixture[str]):
    """The base's own loss on these rows: the adapter is nearly none."""
    _, found = facts(capsys, "--base", base)
    opened = load_base(base, "float32")
    data = DataConfig(holdout=0)
    examples = read_examples(str(read_demo()), data)
    rows = encode(tokenizer(), examples, data, opened.stop_ids, opened.context).rows
    chosen = [rows[index] for index in bench.step_rows(len(rows), 2, 1, 0, 0)[0]]
    total, count = 0.0, 0
    for row in chosen:
        with torch.no_grad():
            logits = opened.model(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        wanted = [t for t in range(1, len(row.ids)) if row.loss[t]]
        total -= sum(float(logits[t - 1, row.ids[t]]) for t in wanted)
        count += len(wanted)
    assert found["ways"][0]["loss"] == pytest.approx(total / count, rel=2e-3)


def test_the_table(base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench.console, "_width", 140)
    assert main(["bench", "--base", base, *SHORT]) == 0
    shown = capsys.readouterr().out
    for text in ("GFLOP/s", "engine", "packed rows", "PEFT", "of the bound", "2 steps of 2 rows"):
        assert text in shown
    assert "1.00x" in shown  # PEFT against itself


def test_without_peft_the_ladder_ends_below_it(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "peft", None)
    code, found = facts(capsys, "--base", base)
    assert code == 0
    assert "pip install peft" in found["ways"][2]["note"]
    assert [way["against_peft"] for way in found["ways"]] == [None, None, None]
    assert [way["tokens_per_second"] is None for way in found["ways"]] == [False, False, True]


def test_other_losses_show_no_times(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A way that is half a per cent off."""
    plain = bench._plain_loss
    monkeypatch.setattr(bench, "_plain_loss", lambda *given: lambda rows: plain(*given)(rows) * 1.005)
    assert main(["bench", "--base", base, *SHORT]) == 1
    shown = capsys.readouterr().out
    assert "different losses" in shown
    assert "tokens/s" not in shown


def test_a_base_that_the_engine_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    set_seed(0)
    words = tokenizer()
    ids = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = GPT2Config(vocab_size=len(words), n_embd=32, n_layer=2, n_head=4, n_positions=512, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    code, found = facts(capsys, "--base", str(tmp_path))
    engine, packed, peft = found["ways"]
    assert code == 0
    assert engine["tokens_per_second"] is None
    assert "engine cannot compute" in engine["note"]
    assert packed["loss"] == pytest.approx(peft["loss"], rel=1e-5)


@pytest.mark.parametrize("option", ["--steps", "--rank", "--batch-size"])
def test_none_of_something_is_refused(option: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", option, "0"]) == 2
    told = capsys.readouterr().err
    assert option.removeprefix("--").replace("-", "_") in told
    assert "at least 1" in told


def test_a_context_too_short_for_the_demo_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text_model(max_position_embeddings=16).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert main(["bench", "--base", str(tmp_path), *SHORT]) == 2
    assert "context of 16 tokens" in capsys.readouterr().err


def test_the_base_comes_back_from_peft(base: str):
    opened = load_base(base, "float32")
    before = [(path, id(module)) for path, module in opened.model.named_modules()]
    adapter = new_adapter(opened.model, LoraConfig(rank=2))
    task = bench._Task(opened, adapter, [], bench.OptimConfig())
    with bench._on_peft(bench._installed("peft"), task) as model:
        assert any("lora_A" in name for name, _ in model.named_parameters())
    assert [(path, id(module)) for path, module in opened.model.named_modules()] == before


def test_the_bound_is_the_flop_sum_at_the_best_speed(monkeypatch: pytest.MonkeyPatch):
    """One frozen layer of 8 to 4 with rank 2, no head, 10 tokens: every product counted by hand."""

    def slow_where_narrow(products, dtype, device, seconds):
        return {p: 50.0 if min(p[:3]) == 2 else 100.0 for p in products}

    monkeypatch.setattr(bench, "measure", slow_where_narrow)
    decoder = Decoder((Linear(8, 4, rank=2),), None, Attention(1, 1, 1, 8))
    found = bench.matrix_bound(decoder, [Load(10, 0, 55)], torch.float32, torch.device("cpu"))
    frozen = 2 * (2 * 10 * 8 * 4)  # forward, input gradient
    factors = 3 * (2 * 10 * 8 * 2) + 3 * (2 * 10 * 4 * 2)  # H, dA, dX; H·Bᵀ, dH, dB
    assert found.flops == 100.0
    assert found.tokens == pytest.approx(10 / ((frozen + factors) / 100))
    assert found.each == pytest.approx(10 / (frozen / 100 + factors / 50))
