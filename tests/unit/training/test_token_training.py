"""Training with trainable tokens: texts become ids or new tokens, rows learn, every use of the adapter knows them."""

import json

import pytest
import torch

from onebase.adapters.adapter import Origin
from onebase.adapters.injection import base_tensors, new_adapter
from onebase.cli.main import main
from onebase.config import LoraConfig
from onebase.errors import BaseError, BaseMismatch, ConfigError, GateError
from onebase.evaluation import evaluate
from onebase.models.base import wrap_base
from onebase.models.generation import decode, generate
from onebase.models.vocabulary import for_adapter, resolve_tokens
from onebase.storage.format import load_adapter, read_adapter
from onebase.training.prepare import prepare
from onebase.training.run import read_config, train
from texts import QUESTIONS, save_base, text_base, text_model, tokenizer, write_rows

pytestmark = pytest.mark.slow

TOKENS = ["<tool>", "<|im_start|>", "id:70", "</tool>"]
OPTIONS = {
    "rank": 2,
    "lr": 3e-2,
    "batch_size": 4,
    "max_steps": 4,
    "holdout": 3,
    "samples": 2,
    "target_modules": "q_proj",
    "trainable_tokens": TOKENS,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    data = [{"prompt": row["prompt"], "completion": f"<tool>{row['completion']}</tool>"} for row in QUESTIONS]
    return write_rows(tmp_path_factory.mktemp("rows") / "tools.jsonl", data)


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    base = text_base()
    before = {name: tensor.clone() for name, tensor in base_tensors(base.model)}
    words = len(base.tokenizer)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    plans = []
    result = train(base, plans.append, data=str(rows), output=str(folder), **OPTIONS)
    assert len(base.tokenizer) == words
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(base.model))
    return base, result, plans[0]


def test_a_run_trains_the_rows_and_records_the_new_tokens(run):
    base, result, plan = run
    adapter, size = result.adapter, len(base.tokenizer)
    start = base.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert adapter.origin.tokens == {"<tool>": size, "</tool>": size + 1}
    assert adapter.tokens.keys() == {"model.embed_tokens", "lm_head"}
    assert adapter.config.trainable_tokens == tuple(f"id:{n}" for n in (start, 70, size, size + 1))
    for path, tokens in adapter.tokens.items():
        weight = base.model.get_submodule(path).weight
        assert tokens.ids == (start, 70, size, size + 1)
        assert (tokens.rows[2:] != weight.mean(0)).any(1).all()
    assert plan.token_rows == [
        f"{start} <|im_start|>",
        f"70 {base.tokenizer.convert_ids_to_tokens(70)}",
        f"{size} <tool> (new)",
        f"{size + 1} </tool> (new)",
    ]
    assert plan.trainable == adapter.parameters
    assert load_adapter(result.folder, base) == adapter
    start = json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert (start["kind"], start["step"]) == ("eval", 0)
    assert result.record.before.loss == pytest.approx(start["loss"], rel=1e-5)
    assert result.record.after.loss < result.record.before.loss
    assert json.loads((result.folder / "onebase.json").read_text())["tokens"] == adapter.origin.tokens


def test_the_loss_falls_below_that_of_the_start(run, rows):
    base, result, _ = run
    fresh = new_adapter(
        base.model,
        LoraConfig(
            rank=2, target_modules="q_proj", trainable_tokens=list(result.adapter.config.trainable_tokens)
        ),
        origin=Origin(tokens=result.adapter.origin.tokens),
    )
    before, after = (evaluate(base, str(rows), adapter) for adapter in (fresh, result.adapter))
    assert before.tokens == after.tokens
    assert after.loss < before.loss - 0.05
    plain = evaluate(base, str(rows))
    assert plain.tokens > after.tokens  # to the plain base <tool> is some letters


def test_generation_reads_and_writes_the_new_tokens(run):
    base, result, _ = run
    words = for_adapter(base, result.adapter)
    assert decode(words, [words.tokenizer("a <tool>b</tool>")["input_ids"]]) == ["a <tool>b</tool>"]
    answers = generate(base, ["<tool>What has Ada bought?"], result.adapter)
    assert len(answers) == 1
    assert generate(base, ["What has Ada bought?"]) == generate(text_base(), ["What has Ada bought?"])


def test_resumed_equals_uninterrupted(run, rows, tmp_path):
    _, whole, _ = run
    folder, steps = tmp_path / "halves", []
    options = OPTIONS | {"data": str(rows), "output": str(folder), "save_every": 1}
    train(text_base(), lambda event: steps.append(event), lambda: len(steps) > 3, **options)
    assert (
        read_adapter(next((folder / "checkpoints").glob("step-*"))).origin.tokens
        == whole.adapter.origin.tokens
    )
    resumed = train(text_base(), output=str(folder), resume=True)
    assert resumed.adapter.tensors().keys() == whole.adapter.tensors().keys()
    for name, tensor in whole.adapter.tensors().items():
        assert torch.equal(resumed.adapter.tensors()[name], tensor), name


def test_spare_rows_of_a_padded_embedding_are_used_first(tmp_path):
    words = tokenizer()
    base = wrap_base(text_model(vocab_size=len(words) + 1), words)
    found = resolve_tokens(base, ["<a>", "<b>", "<s>", "<a>"])
    assert found.new == {"<a>": len(words), "<b>": len(words) + 1}
    adapter = new_adapter(
        base.model,
        LoraConfig(target_modules=[], trainable_tokens=found.names),
        origin=Origin(tokens=found.new),
    )
    weight = base.model.get_input_embeddings().weight
    rows = adapter.tokens["model.embed_tokens"].rows
    assert torch.equal(rows, torch.stack([weight[1], weight.mean(0), weight.mean(0)]))


def test_an_untrained_token_passes_its_gate_once_its_row_is_trained(rows, tmp_path):
    words, model = tokenizer(), text_model(vocab_size=len(tokenizer()))
    start = words.convert_tokens_to_ids("<|im_start|>")
    model.get_input_embeddings().weight.data[start] = 0.0
    data = write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "completion": "<|im_start|>b"}] * 8)
    base = wrap_base(model, words)
    options = {"data": str(data), "output": str(tmp_path / "out"), "holdout": 0}
    with pytest.raises(GateError, match="untrained-special"):
        prepare(base, read_config(options))
    ready = prepare(base, read_config({**options, "trainable_tokens": "<|im_start|>"}))
    assert ready.words.ids == (start,)
    assert ready.words.new == {}


def test_rows_alone_are_an_adapter(rows, tmp_path):
    options = OPTIONS | {
        "data": str(rows),
        "output": str(tmp_path / "out"),
        "target_modules": "",
        "max_steps": 2,
    }
    base = text_base()
    result = train(base, **options)
    assert result.adapter.lowrank == {}
    assert load_adapter(result.folder, base) == result.adapter
    assert result.record.after.loss < result.record.before.loss


def test_a_tokenizer_with_other_ids_is_refused():
    base = text_base()
    adapter = new_adapter(
        base.model,
        LoraConfig(target_modules="q_proj"),
        origin=Origin(tokens={"<tool>": len(base.tokenizer) + 1}),
    )
    with pytest.raises(BaseMismatch, match=f"<tool>: {len(base.tokenizer)}, not {len(base.tokenizer) + 1}"):
        for_adapter(base, adapter)


def test_mistakes_are_told(rows, tmp_path):
    base = text_base()
    with pytest.raises(ConfigError, match="the base has rows 0 to"):
        resolve_tokens(base, ["id:5000"])
    with pytest.raises(BaseError, match="no tokenizer"):
        resolve_tokens(wrap_base(text_model()), ["<tool>"])
    options = {
        "data": str(rows),
        "output": str(tmp_path / "out"),
        "init": "eva",
        "trainable_tokens": "<tool>",
    }
    with pytest.raises(ConfigError, match="rows for new tokens"):
        prepare(base, read_config(options))


def test_a_base_on_disk_and_the_command_line(rows, tmp_path, capsys):
    folder = save_base(tmp_path / "base")
    flags = ["--base", str(folder), "--data", str(rows), "--holdout", "3"]
    flags += ["--trainable-tokens", "<tool>,</tool>"]
    assert main(["preview", *flags, "--rows", "1"]) == 0
    assert "<tool> (new)" in capsys.readouterr().out
    run = ["--output", str(tmp_path / "run"), "--max-steps", "1", "--rank", "2", "--dtype", "float32"]
    assert main(["train", *flags, *run, "--samples", "0"]) == 0
    assert "</tool> (new)" in capsys.readouterr().out
    using = ["--adapter", str(tmp_path / "run")]
    assert main(["generate", *using, "--prompt", "<tool>a", "--max-new-tokens", "4"]) == 0
    assert main(["eval", *using, "--data", str(rows), "--max-new-tokens", "2"]) == 0
    assert main(["inspect", using[1]]) == 0
    assert "2 token rows" in capsys.readouterr().out
