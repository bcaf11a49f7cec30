"""Starts from data: what a pass gathers, what eva and lora_ga make of it, and that it leaves nothing behind."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from onebase.adapters.calibration import observed
from onebase.adapters.injection import inject, new_adapter
from onebase.adapters.targets import match
from onebase.config import LoraConfig
from onebase.errors import TargetError
from starts import first_half, seen_by
from tiny import output, some_ids, tiny

PATH = "model.layers.0.mlp.up_proj"
NAMED = LoraConfig(rank=2, alpha=6, target_modules=["one"])


def inputs_of(model, path, ids):
    """The layer's inputs as (tokens, in)."""
    found = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _, x, y: found.append(x[0].flatten(0, -2))
    )
    output(model, ids)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize(("arch", "path"), [("llama", PATH), ("gpt2", "transformer.h.0.mlp.c_proj")])
def test_eva_points_where_inputs_vary_most(arch, path):
    model, ids, config = tiny(arch), some_ids(8, 12), LoraConfig(rank=4, init="eva")
    adapter = new_adapter(model, config, seen=seen_by(model, config, ids))
    a, x = adapter.lowrank[path].A, inputs_of(model, path, ids)
    values, vectors = torch.linalg.eigh(torch.cov(x.double().T))
    cosines = (a.double() * vectors.flip(1)[:, :4].T).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close((x @ a.T).double().var(dim=0), values.flip(0)[:4], rtol=1e-4, atol=0)
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()  # the sign is fixed
    assert not adapter.lowrank[path].B.any()


def test_what_is_seen_does_not_depend_on_the_batches():
    """Batches with means far apart: sums of squares minus the mean's square would lose the digits."""
    layer = nn.ModuleDict({"one": nn.Linear(6, 3, bias=False)}).requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=draw) + torch.tensor([1e3, 0, 0, -500, 0, 7.0])
    x[20:] += 50
    targets = match(layer, LoraConfig(rank=2, target_modules="one")).targets

    def scatter(parts):
        with observed(layer, targets, "eva") as seen:
            for part in parts:
                layer["one"](part)
        return seen["one"]

    exact = (torch.cov(x.double().T) * 39).float()
    for parts in ([x], x.split(7), x.reshape(5, 8, 6)):
        torch.testing.assert_close(scatter(parts), exact, rtol=1e-4, atol=1e-2 * exact.abs().min())


@pytest.mark.parametrize(("arch", "path"), [("llama", PATH), ("gpt2", "transformer.h.1.attn.c_attn")])
def test_lora_ga_points_where_the_gradient_does(arch, path):
    model, ids, config = tiny(arch), some_ids(8, 12), LoraConfig(rank=4, alpha=8, init="lora_ga")
    seen = seen_by(model, config, ids)
    twin = tiny(arch)
    weight = twin.get_submodule(path).weight.requires_grad_(True)
    twin(input_ids=ids).logits.square().mean().backward()
    grad = weight.grad.T if arch == "gpt2" else weight.grad
    torch.testing.assert_close(seen[path], grad, rtol=1e-4, atol=1e-7)
    low = first_half(new_adapter(model, config, seen=seen).lowrank[path])
    u, values, v = torch.linalg.svd(seen[path], full_matrices=False)
    torch.testing.assert_close(low.A @ v[:4].T @ v[:4], low.A)
    torch.testing.assert_close(low.A @ low.A.T, torch.eye(4), rtol=0, atol=1e-5)
    gamma = low.B.shape[0] ** 0.25 / 4
    torch.testing.assert_close(u[:, 4:8].T @ low.B, torch.diag(values[4:8] * gamma), rtol=1e-4, atol=1e-7)


def test_two_backward_passes_add_up():
    model, config = tiny("llama"), LoraConfig(rank=2, init="lora_ga", target_modules="q_proj")
    parts = [some_ids(4, 9, seed) for seed in (0, 1)]
    targets = match(model, config).targets
    with observed(model, targets, "lora_ga") as seen:
        for ids in parts:
            model(input_ids=ids).logits.square().sum().backward()
    singles = [seen_by(model, config, ids) for ids in parts]
    for path, total in seen.items():  # the singles are means over 4 · 9 · 96 logits
        torch.testing.assert_close(
            total, sum(one[path] for one in singles) * (4 * 9 * 96), rtol=1e-4, atol=1e-2
        )


# -- The pass over data leaves nothing behind.


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


def test_the_watched_model_is_left_as_it_was():
    model, config = tiny("llama"), LoraConfig(rank=2, init="lora_ga")
    targets = match(model, config).targets
    model.train()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), observed(model, targets, "lora_ga"):  # noqa: PT012
        assert not any(module.training for module in model.modules())
        assert hooks(model) == len(targets)
        model(input_ids=some_ids()).logits.mean().backward()
        raise ZeroDivisionError
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == modes
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    with observed(model, targets, "pissa") as seen:
        assert hooks(model) == 0
    assert seen == {}


def test_the_plain_base_is_watched():
    """Adapters that the model carries take no part."""
    model, config = tiny("llama"), LoraConfig(rank=2, init="eva")
    alone = seen_by(model, config)
    adapter = new_adapter(model, LoraConfig(rank=2))
    low = {path: low._replace(B=torch.ones_like(low.B)) for path, low in adapter.lowrank.items()}
    inject(model, replace(adapter, lowrank=low))
    assert all(torch.equal(tensor, alone[path]) for path, tensor in seen_by(model, config).items())


def test_a_target_that_took_no_part_is_named():
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)}).requires_grad_(False)
    targets = match(model, replace(NAMED, target_modules=["one", "two"])).targets
    with (
        pytest.raises(TargetError, match="1 targets took no part in the pass over data: two"),
        observed(model, targets, "eva"),
    ):
        model["one"](torch.randn(9, 4))
    with (
        pytest.raises(TargetError, match="2 targets took no part"),
        observed(model, targets, "lora_ga"),
        torch.no_grad(),
    ):
        model["two"](model["one"](torch.randn(9, 4)))
