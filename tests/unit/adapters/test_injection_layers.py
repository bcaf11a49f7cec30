"""Adapters on parameters and on larger vocabularies: beside each other on a model, and off it again."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from adapters import trained
from onebase.adapters.fitting import fit_problems
from onebase.adapters.injection import eject, extract, inject, injected, use
from onebase.config import LoraConfig
from onebase.errors import AdapterNameError
from tiny import output, some_ids, tiny


@pytest.mark.parametrize("order", [("module", "parameter"), ("parameter", "module")])
def test_one_adapter_on_a_layer_and_another_on_its_weight(order):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).requires_grad_(False)
    configs = {
        "module": LoraConfig(rank=2, target_modules=["0"]),
        "parameter": LoraConfig(rank=2, target_modules=[], target_parameters=["0.weight", "2.weight"]),
    }
    adapters = {name: trained(model, configs[name], seed) for seed, name in enumerate(order)}
    x, modules = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dict(model.named_modules())
    alone = {}
    for name, adapter in adapters.items():
        with injected(model, adapter):
            alone[name] = model(x)
    for name, adapter in adapters.items():
        inject(model, adapter, name)
    with use(model, ["module", None, "parameter"]):
        mixed = model(x)
    for name, adapter in adapters.items():
        with use(model, name):
            torch.testing.assert_close(model(x), alone[name])
        assert extract(model, name) == adapter
    with use(model, None):
        torch.testing.assert_close(
            mixed, torch.stack([alone["module"][0], model(x)[1], alone["parameter"][2]])
        )
    eject(model, [order[0]])
    with use(model, order[1]):
        torch.testing.assert_close(model(x), alone[order[1]])
    eject(model)
    assert dict(model.named_modules()) == modules


def test_rows_are_told_apart_in_results_of_several_tensors():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            scores = x.flatten(0, 1) @ self.weight.T
            return scores, None, [scores.exp()]

    model = nn.ModuleDict({"router": Router()})
    adapter = trained(model, LoraConfig(rank=2, target_modules=[], target_parameters=["router.weight"]))
    inject(model, adapter, "a")
    x = torch.randn(2, 5, 4)
    with use(model, ["a", None]):
        scores, nothing, (exps,) = model["router"](x)
    assert nothing is None
    for row, name in enumerate(["a", None]):
        with use(model, name):
            expected, _, (others,) = model["router"](x[row : row + 1])
        torch.testing.assert_close(scores[5 * row : 5 * row + 5], expected)
        torch.testing.assert_close(exps[5 * row : 5 * row + 5], others)
    with (
        use(model, ["a", None, "a"]),
        pytest.raises(AdapterNameError, match=r"shape \(10, 3\) does not have them"),
    ):
        model["router"](x)


def test_only_an_embedding_or_a_head_may_have_more_rows_than_the_base():
    model = tiny("llama")
    adapter = trained(model, LoraConfig(rank=2, modules_to_save=["embed_tokens", "lm_head", "norm"]))

    def problems(path, *shape):
        return fit_problems(
            model, replace(adapter, full={**adapter.full, path: {"weight": torch.ones(shape)}})
        )

    assert problems("model.embed_tokens", 98, 32) == problems("lm_head", 97, 32) == []
    assert "the base {'weight': (96, 32)}" in problems("lm_head", 95, 32)[0]
    assert problems("lm_head", 98, 31)
    assert problems("model.embed_tokens", 98, 32, 1)
    assert problems("model.norm", 33)
    grown = replace(adapter, full={"lm_head": {"weight": torch.ones(98, 32)}})
    inject(model, grown, "a")
    assert extract(model, "a") == grown
    with use(model, "a"):
        assert output(model, some_ids()).shape[-1] == 98
    with use(model, None):
        assert output(model, some_ids()).shape[-1] == 96


def test_a_module_of_several_inputs_can_be_trained_in_full():
    model, ids = tiny("llama").to(torch.bfloat16), some_ids(rows=2)
    adapter = trained(model, LoraConfig(rank=2, target_modules="up_proj", modules_to_save=["self_attn"]))
    plain = output(model, ids)
    inject(model, adapter, "a")
    with use(model, "a"):
        changed = output(model, ids)
    assert changed.dtype == torch.bfloat16
    assert (changed - plain).abs().max() > 0.1
    with use(model, [None, None]):
        assert torch.equal(output(model, ids), plain)
    with (
        use(model, ["a", None]),
        pytest.raises(AdapterNameError, match="LlamaAttention that is trained in full"),
    ):
        output(model, ids)
