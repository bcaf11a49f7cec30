"""Training that goes on from an adapter: its end is the start, its settings are the options."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from adapters import trained
from onebase.adapters.adapter import Origin
from onebase.config import LoraConfig
from onebase.errors import BaseMismatch, ConfigError, GateError, MissingFile
from onebase.ops.lowrank import update
from onebase.storage.format import read_adapter, save_adapter
from onebase.training.loop import Evaluated, Stepped
from onebase.training.run import read_config, train
from texts import QUESTIONS, text_base, write_rows

pytestmark = pytest.mark.slow

SMALL = {"lr": 1e-2, "batch_size": 4, "max_steps": 3, "holdout": 3, "samples": 0, "save_every": 1}
FIRST = {"rank": 4, "alpha": 12.0, "target_modules": "q_proj,up_proj", "rank_pattern": "up_proj=2"}


@pytest.fixture(scope="module")
def base():
    return text_base()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", QUESTIONS)


@pytest.fixture(scope="module")
def first(base, rows, tmp_path_factory):
    """A trained adapter's folder."""
    folder = tmp_path_factory.mktemp("first") / "run"
    train(base, data=rows, output=str(folder), **SMALL, **FIRST, dropout=0.1)
    return folder


def losses(events):
    return {event.progress.step: event.metrics["loss"] for event in events if isinstance(event, Evaluated)}


def test_a_run_goes_on_where_the_adapter_ended(base, rows, first, tmp_path):
    heard = []
    run = train(base, heard.append, data=rows, output=str(tmp_path / "second"), start=str(first), **SMALL)
    ended = json.loads((first / "run.json").read_text())["after"]["loss"]
    assert losses(heard)[0] == pytest.approx(ended, rel=1e-6)
    start = read_adapter(first)
    assert run.adapter.config == replace(start.config, dropout=0.1)
    assert {path: low.rank for path, low in run.adapter.lowrank.items()} == {
        path: low.rank for path, low in start.lowrank.items()
    }
    assert {low.scale for low in run.adapter.lowrank.values()} == {3.0, 6.0}
    moved = [float((low.A - start.lowrank[path].A).abs().max()) for path, low in run.adapter.lowrank.items()]
    assert 0 < min(moved) <= max(moved) < 0.1  # three steps of Adam at 1e-2, not another draw
    facts = read_adapter(tmp_path / "second").origin.training
    assert facts["start"]["adapter"] == str(first)
    assert facts["start"]["digest"].startswith("sha256:")
    assert facts["settings"]["start"] == str(first)
    assert (facts["settings"]["rank"], facts["settings"]["alpha"]) == (4, 12.0)


def test_an_interrupted_run_that_goes_on_equals_an_unbroken_one(base, rows, first, tmp_path):
    options = {"data": rows, "start": str(first), **SMALL}
    whole = train(base, output=str(tmp_path / "whole"), **options)
    heard = []
    stop = lambda: any(isinstance(event, Stepped) for event in heard)  # noqa: E731
    train(base, heard.append, stop, output=str(tmp_path / "half"), **options)
    resumed = train(base, output=str(tmp_path / "half"), resume=True)
    assert {n: t.tolist() for n, t in resumed.adapter.tensors().items()} == {
        n: t.tolist() for n, t in whole.adapter.tensors().items()
    }


def test_an_adapter_that_changed_is_no_longer_the_runs_start(base, rows, first, tmp_path):
    start = shutil.copytree(first, tmp_path / "start")
    heard = []
    stop = lambda: any(isinstance(event, Stepped) for event in heard)  # noqa: E731
    options = {"data": rows, "start": str(start), **SMALL}
    train(base, heard.append, stop, output=str(tmp_path / "run"), **options)
    adapter = read_adapter(start)
    low = {path: one._replace(B=one.B + 1) for path, one in adapter.lowrank.items()}
    save_adapter(replace(adapter, lowrank=low), start, overwrite=True)
    with pytest.raises(ConfigError, match="start digest was 'sha256:"):
        train(base, output=str(tmp_path / "run"), resume=True)


@pytest.mark.parametrize("variant", ["pissa", "dora", "peft", "parameters and rows"])
def test_variants(base, rows, tmp_path, variant):
    options = {
        "pissa": {"init": "pissa", "target_modules": "q_proj"},
        "dora": {"dora": True, "target_modules": "q_proj"},
        "peft": {"rslora": True, "target_modules": "q_proj"},
        "parameters and rows": {
            "target_modules": "q_proj",
            "modules_to_save": "norm",
            "trainable_tokens": "<tool>,<|im_start|>",
        },
    }[variant]
    train(base, data=rows, output=str(tmp_path / "first"), rank=4, **SMALL, **options)
    if variant == "peft":
        (tmp_path / "first" / "onebase.json").unlink()
    start, heard = read_adapter(tmp_path / "first"), []
    run = train(
        base, heard.append, data=rows, output=str(tmp_path / "second"), start=str(tmp_path / "first"), **SMALL
    )
    ended = json.loads((tmp_path / "first" / "run.json").read_text())["after"]["loss"]
    assert losses(heard)[0] == pytest.approx(ended, rel=1e-5)
    tensors, before = run.adapter.tensors(), start.tensors()
    assert tensors.keys() == before.keys()
    idle = ["model.embed_tokens.rows"] if "rows" in variant else []  # the rows hold none of these tokens
    assert [name for name, tensor in tensors.items() if torch.equal(tensor, before[name])] == idle
    assert run.adapter.origin.tokens == start.origin.tokens
    if variant == "pissa":  # the half that was held learns too
        low, old = (a.lowrank["model.layers.0.self_attn.q_proj"] for a in (run.adapter, start))
        assert low.rank == old.rank == 8
        assert run.adapter.config.init == "default"
        assert not torch.equal(low.A[4:], old.A[4:])


def test_an_adapter_of_some_layers_needs_no_gate(base, rows, tmp_path):
    options = {"rank": 4, "target_modules": "q_proj", "layers": "1"}
    train(base, data=rows, output=str(tmp_path / "first"), **SMALL, **options)
    run = train(base, data=rows, output=str(tmp_path / "second"), start=str(tmp_path / "first"), **SMALL)
    assert [*run.adapter.lowrank] == ["model.layers.1.self_attn.q_proj"]


def test_options_that_contradict_the_adapter(first, rows, tmp_path):
    given = {"data": rows, "output": str(tmp_path / "x"), "start": str(first)}
    assert read_config({**given, "rank": 4, "target_modules": ["up_proj", "q_proj"]}).lora.rank == 4
    assert read_config(given).lora.dropout == 0.1
    assert read_config({**given, "dropout": 0.0}).lora.dropout == 0.0
    with pytest.raises(ConfigError, match=r"alpha is 12\.0 there, 8 here; rank is 4 there, 8 here"):
        read_config({**given, "rank": 8, "alpha": 8})
    with pytest.raises(ConfigError, match="init is 'default' there"):
        read_config({**given, "init": "pissa"})
    with pytest.raises(MissingFile, match="no such folder"):
        read_config({**given, "start": str(first) + "x"})


def test_another_base_is_refused_until_allowed(rows, first, base, tmp_path):
    other = text_base(seed=1)
    options = {"data": rows, "output": str(tmp_path / "x"), "start": str(first), **SMALL}
    with pytest.raises(GateError, match=r"base-mismatch[\s\S]*this base has sha256"):
        train(other, **options)
    assert not (tmp_path / "x").exists()
    run = train(other, **options, allow=["base-mismatch"])
    assert run.record.allowed == ("base-mismatch",)
    assert run.adapter.origin.fingerprint == other.fingerprint
    with pytest.raises(BaseMismatch, match="the base's weight is"):
        train(
            text_base(hidden_size=48), **(options | {"output": str(tmp_path / "y")}), allow=["base-mismatch"]
        )


def test_the_start_is_not_deleted_by_the_run(rows, first, base, tmp_path):
    place = shutil.copytree(first, tmp_path / "run")
    with pytest.raises(ConfigError, match="which --overwrite deletes"):
        train(base, data=rows, output=str(place), start=str(place), overwrite=True, **SMALL)
    assert read_adapter(place) == read_adapter(first)


def test_dropout_needs_inputs(rows, tmp_path):
    base = text_base()
    config = LoraConfig(rank=2, alpha=2, target_modules=[], target_parameters=["q_proj.weight"])
    adapter = replace(trained(base.model, config), origin=Origin(task="CAUSAL_LM"))
    folder = save_adapter(adapter, tmp_path / "parameters")
    options = {"data": rows, "output": str(tmp_path / "x"), "start": str(folder), **SMALL}
    with pytest.raises(LookupError, match="has no input of its own"):
        train(base, **options, dropout=0.5)
    run = train(base, **options)
    moved = [
        update(low.factors) - update(adapter.lowrank[path].factors)
        for path, low in run.adapter.lowrank.items()
    ]
    assert all(bool(one.any()) for one in moved)
