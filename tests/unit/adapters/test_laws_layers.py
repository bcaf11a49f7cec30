"""The laws of adapters on every kind of layer, with every variant that it can carry."""

import pytest
import torch
from torch import nn

from adapters import trained
from layer_cases import CASES, EACH
from onebase.adapters.injection import (
    adapter_dropout,
    base_tensors,
    eject,
    extract,
    inject,
    injected,
    new_adapter,
    trainable,
    use,
)
from onebase.adapters.kinds import find_site, is_parameter, merged_weight
from onebase.models.base import wrap_base
from onebase.storage.format import load_adapter, read_adapter, save_adapter

pytestmark = pytest.mark.parametrize(("name", "variant"), EACH)


@pytest.fixture
def case(name):
    return CASES[name]


@torch.no_grad()
def test_laws_2_3_5(case, variant):
    model = case.model()
    before, weights = case.call(model), {n: t.clone() for n, t in base_tensors(model)}
    objects = dict(model.named_modules()), dict(model.named_parameters())
    with injected(model, new_adapter(model, case.config(variant))):
        if variant != "dora" and not case.fused:
            assert torch.equal(case.call(model), before)  # law 3: B = 0 changes nothing
        torch.testing.assert_close(case.call(model), before, rtol=1e-5, atol=1e-5)
    adapter = trained(model, case.config(variant))
    inject(model, adapter, "a")
    assert extract(model, "a") == adapter  # law 2
    with use(model, "a"):
        assert (case.call(model) - before).abs().max() > 1e-2
    with use(model, None):
        torch.testing.assert_close(case.call(model), before, rtol=0, atol=1e-6 if case.fused else 0)
    eject(model)
    assert all(torch.equal(t, weights[n]) for n, t in base_tensors(model))  # law 5
    assert (dict(model.named_modules()), dict(model.named_parameters())) == objects  # the very same ones
    assert torch.equal(case.call(model), before)


@torch.no_grad()
def test_law_1_output_is_that_of_the_effective_weight(case, variant):
    model = case.model()
    adapter = trained(model, case.config(variant))
    with injected(model, adapter):
        expected = case.call(model)
    modules = dict(model.named_modules())
    for path, low in adapter.lowrank.items():
        site = find_site(modules, path)
        owner, _, name = site.tensor.rpartition(".")
        weight = modules[owner].get_parameter(name)
        changed = merged_weight(weight, low).contiguous()
        assert changed.shape == weight.shape
        setattr(modules[owner], name, nn.Parameter(changed, False))  # not in place: others may be tied to it
        if low.bias is not None:
            modules[owner].bias.data += low.scale * low.bias
    assert (case.call(model) - expected).abs().max() <= 3e-4 * expected.abs().max()


def test_law_2_what_is_saved_is_read_back(case, variant, tmp_path):
    base = wrap_base(case.model())
    adapter = trained(base.model, case.config(variant))
    save_adapter(adapter, tmp_path / "a")
    assert load_adapter(tmp_path / "a", base) == adapter
    alone = read_adapter(tmp_path / "a")  # without the base it is not known how the base stores its weights
    save_adapter(alone, tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    inject(base.model, alone, "a")
    assert extract(base.model, "a") == adapter


def test_law_5_an_optimiser_step_moves_the_adapter_and_nothing_else(case, variant):
    model = case.model()
    adapter = trained(model, case.config(variant))
    before = {name: tensor.clone() for name, tensor in base_tensors(model)}
    inject(model, adapter, "a")
    parameters = trainable(model, "a")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with use(model, "a"), adapter_dropout(model):
        case.call(model).square().sum().backward()
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    after = extract(model, "a").tensors()
    assert [name for name, tensor in adapter.tensors().items() if torch.equal(tensor, after[name])] == []
    assert all(p.grad is None for name, p in model.named_parameters() if ".slots." not in name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model))


@torch.no_grad()
def test_law_6_each_row_gets_its_own_adapter(case, variant):
    model = case.model()
    for seed, name in enumerate("ab"):
        inject(model, trained(model, case.config(variant), seed), name)
    names = ["b", None, "a", "b"]
    with use(model, names):
        mixed = case.call(model, count=4)
    for row, name in enumerate(names):
        with use(model, name):
            alone = case.call(model, slice(row, row + 1), count=4)
        torch.testing.assert_close(mixed[row], alone[0], rtol=1e-4, atol=1e-4)
    with use(model, "a"):
        assert not torch.allclose(mixed[0], case.call(model, count=4)[0], atol=1e-3)


def test_training_mode_without_dropout_changes_nothing(case, variant):
    """A wrapper's own mode must not reach the base's (torch's encoder chooses its path by it)."""
    model = case.model()
    adapter = trained(model, case.config(variant))
    with injected(model, adapter), torch.no_grad():
        expected = case.call(model)
        with adapter_dropout(model):
            assert torch.equal(case.call(model), expected)
    assert all(low.rank == 2 for low in adapter.lowrank.values())
    assert any(is_parameter(low.kind) for low in adapter.lowrank.values()) == (
        not {"dora", "lora_bias"} & set(case.variants)
    )
