"""Each start: what it is, that it changes no output, that what it took from W stays, and what it refuses."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from onebase.adapters.adapter import parted
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
from onebase.adapters.kinds import KINDS, as_rows, find_site, merged_weight
from onebase.adapters.layers import base_modules
from onebase.adapters.targets import match, pattern_value
from onebase.adapters.variants import INITS, is_held, scaling, sizes, start_scale, stored_config
from onebase.config import Init, LoraConfig
from onebase.errors import ConfigError, TargetError
from onebase.ops.lowrank import update
from onebase.storage.format import read_adapter, save_adapter
from starts import first_half, seen_by
from tiny import output, some_ids, tiny

EPS = torch.finfo(torch.float32).eps
HELD = [name for name, row in INITS.items() if row.taken]
PATH = "model.layers.0.mlp.up_proj"


def made(model, config, seed=0):
    return new_adapter(model, config, seed, seen=seen_by(model, config))


def test_the_table_has_a_row_for_each_option():
    assert tuple(INITS) == get_args(Init)


# -- What holds for every start.


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_start_leaves_the_output_as_it_is(arch, init, variant):
    """To the bit where B = 0. Elsewhere the parts cancel up to rounding: its bound, layer by layer, is below."""
    model, ids = tiny(arch), some_ids()
    before, weights = output(model, ids), {n: t.clone() for n, t in base_tensors(model)}
    config = LoraConfig(rank=4, alpha=6, init=init, rslora=variant == "rslora", dora=variant == "dora")
    adapter = made(model, config)
    with injected(model, adapter):
        after = output(model, ids)
    if init in ("default", "gaussian", "eva"):
        assert torch.equal(after, before)
    else:
        assert (after - before).abs().max() <= 5e-6 * before.abs().max()
    assert all(torch.equal(t, weights[n]) for n, t in base_tensors(model))
    modules = dict(base_modules(model))
    for path, low in adapter.lowrank.items():
        assert (low.rank, low.scale) == (8 if init in HELD else 4, adapter.lowrank[path].scale)
        # Rounding of sums over the rank; orthogonal's B·A cancels after A and B were themselves rounded.
        size = update(low.factors._replace(A=low.A.abs(), B=low.B.abs(), scale=abs(low.scale)))
        assert (update(low.factors).abs() <= (low.rank + 2) * EPS * size.max()).all()
        weight = modules[path].weight
        torch.testing.assert_close(merged_weight(weight, low), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", HELD)
def test_the_layers_rounding_is_within_its_bound(init):
    """|y - W x| <= 2 (in + 2r + 2) eps · s·|B||A||x|, from the standard bound of a sum (Higham 2002, section 3.1)."""
    model = tiny("llama")
    adapter = made(model, LoraConfig(rank=8, alpha=16, init=init, target_modules="up_proj"))
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 30
    low, layer = adapter.lowrank[PATH], model.get_submodule(PATH)
    plain = layer(x)
    with injected(model, adapter):
        off = (model.get_submodule(PATH)(x) - plain).abs()
    size = low.scale * (x.abs() @ low.A.abs().T) @ low.B.abs().T
    bound = 2 * (32 + low.rank + 2) * EPS * size + EPS * plain.abs()  # the last: adding to y itself
    assert (off <= bound).all()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_laws_2_3_5_while_it_learns(init, dora, tmp_path):
    """Extracted, saved and loaded bit for bit, before and after a step; what is held stays; the base stays."""
    model, ids = tiny("llama"), some_ids()
    before, weights = output(model, ids), {n: t.clone() for n, t in base_tensors(model)}
    modules = dict(model.named_modules())
    adapter = made(model, LoraConfig(rank=4, alpha=6, init=init, dora=dora))
    assert adapter.config.init == init
    inject(model, adapter, "a")
    assert extract(model, "a") == adapter
    parameters = trainable(model, "a")
    names = ("A", "B", "magnitude") if dora else ("A", "B")
    assert parameters.keys() == {f"{path}.{name}" for path in adapter.lowrank for name in names}
    assert all(p.shape[0] == 4 for n, p in parameters.items() if n.endswith(".A"))
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with use(model, "a"), adapter_dropout(model):
        model(input_ids=ids).logits.square().mean().backward()
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    stepped = extract(model, "a")
    with use(model, "a"):
        assert (output(model, ids) - before).abs().max() > 1e-4
    for path, low in stepped.lowrank.items():
        assert not torch.equal(low.B, adapter.lowrank[path].B)
        if init in HELD:
            trained, held = parted(low, 4)
            first, start = parted(adapter.lowrank[path], 4)
            assert torch.equal(held.A, start.A)
            assert torch.equal(held.B, start.B)
            assert torch.equal(start.A, first.A)
            assert torch.equal(start.B, -first.B)
            assert not torch.equal(trained.A, first.A)
    assert all(torch.equal(t, weights[n]) for n, t in base_tensors(model))
    eject(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(output(model, ids), before)
    save_adapter(stepped, tmp_path / "a")
    assert read_adapter(tmp_path / "a") == stepped
    inject(model, read_adapter(tmp_path / "a"), "a")  # and what was held is held again
    assert trainable(model, "a").keys() == parameters.keys()
    assert extract(model, "a") == stepped


@given(
    rank=st.integers(1, 4096),
    alpha=st.floats(-1e6, 1e6).filter(lambda a: abs(a) > 1e-6),
    rslora=st.booleans(),
    init=st.sampled_from(list(INITS)),
)
@example(rank=522, alpha=23623.0, rslora=True, init="pissa")
def test_the_scale_is_the_same_when_it_is_read_back(rank, alpha, rslora, init):
    """A reader computes it from the stored rank and alpha; the start used the very same number."""
    config = LoraConfig(rank=rank, alpha=alpha, rslora=rslora, init=init)
    stored = stored_config(config)
    assert start_scale(rank, alpha, config) == scaling(stored.rank, stored.alpha, rslora)
    wanted = scaling(rank, alpha, rslora)
    assert math.isclose(
        start_scale(rank, alpha, config), wanted, rel_tol=6 * 2**-53
    )  # six roundings in the two
    assert rslora or start_scale(rank, alpha, config) == wanted  # alpha/r: doubling is exact
    assert stored.rank == (2 * rank if init in HELD else rank)


def test_patterns_are_doubled_too():
    model = tiny("llama")
    options = {"rank": 4, "alpha": 6, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5.0}}
    adapter = new_adapter(model, LoraConfig(**options, rslora=True, init="pissa"))
    assert adapter.config.ranks == {"q_proj": 4}
    assert adapter.config.alphas == {"k_proj": 5.0 * math.sqrt(2)}
    for path, low in adapter.lowrank.items():
        rank = pattern_value(adapter.config.ranks, [path], adapter.config.rank)
        alpha = pattern_value(adapter.config.alphas, [path], adapter.config.alpha)
        assert (low.rank, low.scale) == (rank, scaling(rank, alpha, True))


def test_a_held_start_may_pass_the_weights_own_rank():
    """r may not be larger than the weight, the 2r that are stored may."""
    model = tiny("llama")
    adapter = new_adapter(model, LoraConfig(rank=16, init="pissa", target_modules="k_proj"))
    assert {(low.rank, low.B.shape[0]) for low in adapter.lowrank.values()} == {(32, 16)}
    with injected(model, adapter):
        assert adapter == extract(model)
    with pytest.raises(TargetError, match="rank above 16 adds nothing"):
        new_adapter(model, LoraConfig(rank=17, init="pissa", target_modules="k_proj"))


# -- Each start by what defines it.


@pytest.mark.parametrize("alpha", [12, -3])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_pissa_is_the_best_part_of_the_weight(arch, alpha):
    model = tiny(arch)
    adapter = new_adapter(model, LoraConfig(rank=4, alpha=alpha, init="pissa"))
    for path in adapter.lowrank:
        low = first_half(adapter.lowrank[path])
        weight = as_rows(model.get_submodule(path).weight, low)
        tail = torch.linalg.svdvals(weight.double())[4:]
        left = weight.double() - update(low.factors).double()
        assert torch.allclose(
            left.norm(), tail.norm(), rtol=1e-5
        )  # Eckart and Young: no rank-4 matrix is nearer
        assert torch.allclose(low.A.norm(dim=1), low.B.norm(dim=0), rtol=1e-4)  # the values in equal halves


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_olora_is_the_start_of_a_qr(arch):
    model = tiny(arch)
    adapter = new_adapter(model, LoraConfig(rank=4, alpha=12, init="olora"))
    for path in adapter.lowrank:
        low = first_half(adapter.lowrank[path])
        weight = as_rows(model.get_submodule(path).weight, low)
        torch.testing.assert_close(low.B.T @ low.B, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(low.B @ low.B.T @ weight, low.B @ low.A, rtol=1e-4, atol=1e-5)  # A = Qᵀ W
        assert torch.allclose(
            (low.B @ low.A)[:, :4], weight[:, :4], atol=1e-5
        )  # so the first columns are W's


@pytest.mark.parametrize("kind", ["linear", "conv", "parameter"])
def test_orthogonal_has_both_factors_and_no_product(kind):
    model = KINDS_OF[kind]()
    adapter = new_adapter(model, replace(TARGETS[kind], rank=4, init="orthogonal"))
    (low,) = adapter.lowrank.values()
    assert low.A.std() == pytest.approx(
        0.1 * math.sqrt(0.5), rel=0.35
    )  # entries: sums of 2 of 4 unit coordinates
    assert low.B.std() == pytest.approx(0.1 * math.sqrt(0.5), rel=0.35)
    assert (low.A.any(dim=1)).all()
    assert update(low.factors).abs().max() < 1e-7 * abs(low.scale) * 10


def experts(turned=False):
    """Two experts as transformers stores them: (experts, out, in), or turned (experts, in, out)."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn((2, 6, 8) if turned else (2, 8, 6)), requires_grad=False)
    module.is_transposed = turned
    return nn.ModuleDict({"one": module})


KINDS_OF = {
    "linear": lambda: nn.ModuleDict({"one": nn.Linear(6, 8)}),
    "conv": lambda: nn.ModuleDict({"one": nn.Conv2d(3, 8, 3)}),
    "embedding": lambda: nn.ModuleDict({"one": nn.Embedding(12, 8)}),
    "parameter": experts,
    "parameter_transposed": lambda: experts(turned=True),
}
NAMED = LoraConfig(rank=2, alpha=6, target_modules=["one"])
STACKED = LoraConfig(rank=2, alpha=6, target_modules=[], target_parameters=["one.weight"])
TARGETS = {kind: STACKED if kind.startswith("parameter") else NAMED for kind in KINDS_OF}


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora"])
@pytest.mark.parametrize("kind", KINDS_OF)
def test_every_kind_starts_from_random_numbers_or_its_weight(kind, init):
    torch.manual_seed(0)
    model = KINDS_OF[kind]()
    adapter = new_adapter(model, replace(TARGETS[kind], init=init))
    (path, low), modules = next(iter(adapter.lowrank.items())), dict(base_modules(model))
    site = find_site(modules, path)
    weight = modules[site.owner].get_parameter(site.name).detach()
    assert (low.kind, low.blocks, low.rank) == (kind, site.blocks, 4 if init in HELD else 2)
    torch.testing.assert_close(merged_weight(weight, low), weight, rtol=1e-5, atol=1e-6)
    inject(model, adapter, "a")
    assert extract(model, "a") == adapter
    if init == "pissa":
        first = parted(low, 2)[0]
        rows = as_rows(weight, low).unflatten(0, (low.blocks, -1))
        left = rows - update(first.factors).unflatten(0, (low.blocks, -1))
        tail = torch.linalg.svdvals(rows)[:, 2:].norm(dim=1)  # each expert's own best part
        torch.testing.assert_close(left.flatten(1).norm(dim=1), tail, rtol=1e-4, atol=1e-5)


def test_gaussian_is_as_wide_for_experts_as_for_one_layer():
    model = nn.ModuleDict({"one": nn.Module()})
    model["one"].weight = nn.Parameter(torch.randn(16, 8, 200), requires_grad=False)
    low = new_adapter(model, replace(STACKED, rank=4, init="gaussian")).lowrank["one.weight"]
    assert low.A.std() == pytest.approx(1 / 4, rel=0.05)
    assert low.blocks == 16


# -- DoRA, bias, sizes.


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_doras_magnitude_is_the_norm_of_the_rows(kind):
    torch.manual_seed(0)
    model = KINDS_OF[kind]().requires_grad_(False)
    (low,) = new_adapter(model, replace(NAMED, dora=True)).lowrank.values()
    weight = model["one"].weight
    norms = weight.norm(dim=0) if kind == "embedding" else weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(low.magnitude, norms)
    x = {"linear": torch.randn(5, 6), "conv": torch.randn(2, 3, 5, 5), "embedding": torch.tensor([[1, 11]])}[
        kind
    ]
    plain = model["one"](x)
    with injected(model, new_adapter(model, replace(NAMED, dora=True))):
        assert torch.equal(model["one"](x), plain)


def test_lora_bias_is_for_layers_that_have_one():
    model = nn.ModuleDict({"one": nn.Linear(6, 8), "two": nn.Linear(6, 8, bias=False)}).requires_grad_(False)
    config = replace(NAMED, target_modules=["one", "two"], lora_bias=True)
    adapter = new_adapter(model, config)
    assert torch.equal(adapter.lowrank["one"].bias, torch.zeros(8))
    assert adapter.lowrank["two"].bias is None
    moved = adapter.lowrank["one"]._replace(bias=torch.arange(8.0))
    x, plain = torch.randn(5, 6), model["one"]
    with injected(model, replace(adapter, lowrank={**adapter.lowrank, "one": moved})), torch.no_grad():
        torch.testing.assert_close(model["one"](x), plain(x) + 3.0 * torch.arange(8.0))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_sizes_are_those_of_the_tensors(init, dora):
    model = tiny("gpt2")
    config = LoraConfig(rank=4, init=init, dora=dora, lora_bias=not dora)
    adapter, modules = made(model, config), dict(base_modules(model))
    for target in match(model, config).targets:
        low, found = adapter.lowrank[target.path], sizes(target, config, modules[target.site.owner])
        assert sum(found) == sum(tensor.numel() for tensor in low.tensors().values())
        half = low.A.numel() // 2 if is_held(config) else low.A.numel()
        assert (found.A, found.held > 0) == (half, is_held(config))
        assert found.bias == (0 if low.bias is None else low.bias.numel())


# -- Refusals: (config options, model, what the error says).

ODD = {"rank": 3, "init": "orthogonal"}
REFUSED = {
    "dropout": ({"init": "pissa", "dropout": 0.1}, "linear", "would be dropped too"),
    "odd rank": (ODD, "linear", "halves the rank, and 3 is odd"),
    "orthogonal embedding": ({"init": "orthogonal"}, "embedding", "this is a embedding"),
    "eva embedding": ({"init": "eva"}, "embedding", "kinds linear, transposed; this is a embedding"),
    "eva conv": ({"init": "eva"}, "conv", "this is a conv"),
    "lora_ga experts": ({"init": "lora_ga"}, "parameter", "this is a parameter"),
    "lora_ga rank": ({"init": "lora_ga", "rank": 4}, "linear", "needs 8 directions, and the weight has 6"),
    "eva unseen": ({"init": "eva"}, "linear", "nothing was gathered"),
    "dora experts": ({"dora": True}, "parameter", "dora is for layers; this is a parameter"),
    "bias embedding": ({"lora_bias": True}, "embedding", "this is a embedding"),
    "bias experts": ({"lora_bias": True}, "parameter", "this is a parameter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_start_is_refused(case):
    options, kind, said = REFUSED[case]
    with pytest.raises((ConfigError, TargetError), match=said):
        new_adapter(KINDS_OF[kind](), replace(TARGETS[kind], **options))


def test_more_refusals():
    linear = KINDS_OF["linear"]()
    with pytest.raises(ConfigError, match="lora_bias"):
        LoraConfig(dora=True, lora_bias=True)
    with pytest.raises(TargetError, match="none of the targeted layers has a bias"):
        new_adapter(tiny("llama"), LoraConfig(rank=2, lora_bias=True))
    with pytest.raises(TargetError, match=r"inputs \(6, 6\): a tensor of shape \(8, 6\)"):
        new_adapter(linear, replace(NAMED, init="eva"), seen={"one": torch.zeros(8, 6)})
    with pytest.raises(TargetError, match="vary in fewer directions"):
        new_adapter(linear, replace(NAMED, init="eva"), seen={"one": torch.ones(6, 6)})
    with torch.no_grad():
        linear["one"].weight[2] = 0
    with pytest.raises(TargetError, match="1 rows of its weight are 0"):
        new_adapter(linear, replace(NAMED, dora=True))
    assert set(KINDS) >= set(KINDS_OF)
