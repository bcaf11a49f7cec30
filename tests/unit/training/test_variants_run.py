"""Whole runs of each variant: the plan counts what is trained, the base stays, and a resumed run is an unbroken one."""

import pytest
import torch

from onebase.adapters.adapter import parted
from onebase.adapters.injection import injected, new_adapter
from onebase.adapters.targets import match
from onebase.adapters.variants import INITS
from onebase.config import TrainConfig, build
from onebase.data.pack import pad
from onebase.errors import ConfigError, TargetError
from onebase.models.loss import loss_sum
from onebase.models.scoring import loss_tokens
from onebase.training import calibrate as calibration
from onebase.training.calibrate import calibrate
from onebase.training.loop import Evaluated, Stepped
from onebase.training.plan import Plan
from onebase.training.prepare import prepare
from onebase.training.run import train
from texts import QUESTIONS, text_base, write_rows

pytestmark = pytest.mark.slow

SMALL = {"rank": 4, "lr": 1e-2, "batch_size": 4, "max_steps": 4, "holdout": 3, "samples": 0, "save_every": 1}
VARIANTS = {
    "pissa with dora": {"init": "pissa", "dora": True, "rslora": True},
    "lora_ga, padded": {"init": "lora_ga", "engine": "padded"},
    "eva without A": {"init": "eva", "freeze_a": True, "target_modules": "q_proj,up_proj"},
    "olora, patterns": {"init": "olora", "rank_pattern": "q_proj=2", "alpha_pattern": "k_proj=3"},
    "orthogonal, lora+": {"init": "orthogonal", "lora_plus": 4.0},
}


@pytest.fixture(scope="module")
def base():
    return text_base()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", QUESTIONS)


class Heard(list):
    """The events of a run; asks for a stop after a number of steps."""

    def __init__(self, steps=10**9):
        super().__init__()
        self.steps = steps

    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]

    def enough(self):
        return len(self.of(Stepped)) >= self.steps


def run(base, rows, folder, heard, **options):
    return train(base, heard.append, heard.enough, data=rows, output=str(folder), **SMALL, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_and_its_resumption(base, rows, tmp_path, variant, monkeypatch):
    options = VARIANTS[variant]
    whole = Heard()
    done = run(base, rows, tmp_path / "whole", whole, **options)
    assert done.adapter.config.init == options["init"]
    assert done.record.proof.before == done.record.proof.after == base.fingerprint
    losses = [event.metrics["loss"] for event in whole.of(Evaluated)]
    assert losses[-1] < losses[0]

    stopped = run(base, rows, tmp_path / "half", Heard(2), **options)
    assert stopped.reason == "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "observed", None)  # a resumed run does not look at data again
        again = train(base, output=str(tmp_path / "half"), resume=True)
    assert again.adapter.tensors().keys() == done.adapter.tensors().keys()
    assert all(torch.equal(t, done.adapter.tensors()[n]) for n, t in again.adapter.tensors().items())

    (plan,) = whole.of(Plan)
    start = first_adapter(base, rows, **options)
    moved = {n for n, t in done.adapter.tensors().items() if not torch.equal(t, start.tensors()[n])}
    held = INITS[options["init"]].taken
    assert moved == {n for n in start.tensors() if not (options.get("freeze_a") and n.endswith(".A"))}
    trained = sum(start.tensors()[name].numel() for name in moved)
    stuck = 0
    for path, low in start.lowrank.items() if held else ():
        after, before = (parted(x.lowrank[path], low.rank // 2)[1] for x in (done.adapter, start))
        assert torch.equal(after.A, before.A)
        assert torch.equal(after.B, before.B)
        stuck += before.A.numel() + before.B.numel()
    assert plan.trainable == trained - stuck == done.record.adapter.parameters
    assert plan.total == base.parameters + start.parameters


def first_adapter(base, rows, **options):
    config = build(TrainConfig, {**SMALL, **options, "data": rows, "output": "unused"})
    seen = calibrate(base, config, prepare(base, config))
    return new_adapter(base.model, config.lora, config.seed, seen=seen)


def test_the_gradient_is_that_of_the_first_batches(base, rows):
    """The base's own, of the mean over their loss tokens; padding and the batches' sizes do not count."""
    options = {**SMALL, "data": rows, "output": "unused", "init": "lora_ga", "batch_size": 2}
    config = build(TrainConfig, options)
    ready = prepare(base, config)
    seen = calibrate(base, config, ready)
    state = torch.get_rng_state()
    assert all(torch.equal(t, seen[p]) for p, t in calibrate(base, config, ready).items())
    assert torch.equal(torch.get_rng_state(), state)
    batches = calibration._first_batches(ready, config)
    assert len(batches) == 8
    path = "model.layers.0.mlp.down_proj"
    weight = base.model.get_submodule(path).weight
    weight.requires_grad_(True)
    try:
        with injected(base.model, None):
            total = sum(loss_sum(base.model, pad(batch, base.pad_id))[0] for batch in batches)
            (grad,) = torch.autograd.grad(total / sum(map(loss_tokens, batches)), weight)
    finally:
        weight.requires_grad_(False)
    torch.testing.assert_close(seen[path], grad, rtol=1e-4, atol=1e-6)


def test_nothing_is_looked_at_where_nothing_is_needed(base, rows, monkeypatch):
    monkeypatch.setattr(calibration, "observed", None)
    config = build(TrainConfig, {**SMALL, "data": rows, "init": "pissa"})
    assert calibrate(base, config, prepare(base, config)) == {}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"init": "olora", "dropout": 0.1}, ConfigError, "would be dropped too"),
        ({"dora": True, "lora_bias": True}, ConfigError, "lora_bias"),
        ({"lora_bias": True}, TargetError, "none of the targeted layers has a bias"),
        ({"init": "eva", "target_modules": "q_proj,embed_tokens"}, TargetError, "this is a embedding"),
        ({"freeze_a": True, "target_modules": "q_proj,embed_tokens"}, ConfigError, "it would learn nothing"),
        ({"init": "orthogonal", "rank": 3}, TargetError, "3 is odd"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    base, rows, tmp_path, options, error, said
):
    with pytest.raises(error, match=said):
        train(base, data=rows, output=str(tmp_path / "run"), **{**SMALL, **options})
    assert not (tmp_path / "run").exists()


def test_match_knows_the_scale_that_is_stored(base):
    config = build(TrainConfig, {"rank": 3, "alpha": 7, "rslora": True, "init": "pissa"}).lora
    adapter = new_adapter(base.model, config)
    assert {target.scale for target in match(base.model, config).targets} == {
        low.scale for low in adapter.lowrank.values()
    }
