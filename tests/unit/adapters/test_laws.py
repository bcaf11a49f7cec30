"""The laws of adapters, each checked on every architecture and layer kind."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from adapters import VARIANTS, every_kind, options_for, trained
from onebase.adapters.adapter import Origin
from onebase.adapters.injection import (
    adapter_dropout,
    adapter_names,
    base_tensors,
    eject,
    extract,
    inject,
    injected,
    new_adapter,
    trainable,
    use,
)
from onebase.adapters.kinds import merged_weight
from onebase.config import LoraConfig
from onebase.errors import AdapterNameError, BaseMismatch
from onebase.models.base import wrap_base
from onebase.storage.format import load_adapter, read_adapter, save_adapter
from tiny import CAUSAL, CONFIGS, output, some_ids, tiny


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", CONFIGS)
def test_laws_2_3_5(arch, variant):
    model, ids = tiny(arch), some_ids()
    before, weights = output(model, ids), {n: t.clone() for n, t in base_tensors(model)}
    modules = dict(model.named_modules())
    config = LoraConfig(**options_for(arch, variant))
    assert {low.rank for low in trained(model, config).lowrank.values()} == (
        {2, 4} if variant == "patterns" else {4}
    )
    with injected(model, new_adapter(model, config)):
        assert torch.equal(output(model, ids), before)  # law 3: B = 0 changes nothing
    adapter = trained(model, config)
    inject(model, adapter, "a")
    assert extract(model, "a") == adapter  # law 2
    with use(model, "a"):
        assert (output(model, ids) - before).abs().max() > 1e-3
    with use(model, None):
        assert torch.equal(output(model, ids), before)
    assert all(torch.equal(t, weights[n]) for n, t in base_tensors(model))  # law 5
    assert {n for n, _ in base_tensors(model)} == weights.keys()
    eject(model)
    assert dict(model.named_modules()) == modules  # the very same objects
    assert "onebase_adapters" not in vars(model)
    assert torch.equal(output(model, ids), before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", CONFIGS)
def test_law_1_output_is_that_of_the_effective_weight(arch, variant):
    """Tied embeddings are left out: there W stands in two places, and the update belongs to one of them."""
    model, ids = tiny(arch), some_ids()
    tied = getattr(model.config, "tie_word_embeddings", False) and arch != "bert"
    config = LoraConfig(**options_for(arch, variant))
    if not tied:
        rank = 2 if arch == "bert" else config.rank  # BERT has an embedding of two rows
        config = replace(config, rank=rank, target_modules=every_kind(model).target_modules)
    adapter = trained(model, config)
    plain = output(model, ids)
    with injected(model, adapter):
        expected = output(model, ids)
    assert (expected - plain).abs().max() > 1e-2
    for path, low in adapter.lowrank.items():
        weight = model.get_submodule(path).weight
        weight.data = merged_weight(weight.data, low).contiguous()
    assert (output(model, ids) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("arch", CONFIGS)
def test_law_2_what_is_saved_is_read_back(arch, tmp_path):
    model = tiny(arch)
    full = ["lm_head"] if arch == "llama" else []
    base = wrap_base(model)
    origin = Origin("some/base", base.fingerprint, "CAUSAL_LM", {"chat": True, "system": "ü"}, {"loss": 0.5})
    adapter = trained(
        model, replace(every_kind(model), modules_to_save=full, rslora=arch == "gpt2", dropout=0.25)
    )
    adapter = replace(adapter, origin=origin)
    save_adapter(adapter, tmp_path / "a")
    read = load_adapter(tmp_path / "a", base)
    assert read == adapter
    inject(model, read_adapter(tmp_path / "a"), "a")
    assert extract(model, "a") == adapter


@pytest.mark.parametrize("arch", CONFIGS)
def test_law_5_an_optimiser_step_moves_the_adapter_and_nothing_else(arch):
    model = tiny(arch)
    adapter = trained(model, every_kind(model))
    before = {name: tensor.clone() for name, tensor in base_tensors(model)}
    inject(model, adapter, "a")
    parameters = trainable(model, "a")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    with use(model, "a"), adapter_dropout(model):
        result = model(input_ids=some_ids())
        (result.logits if "logits" in result else result.pooler_output).square().sum().backward()
    optimizer.step()
    after = extract(model, "a").tensors()
    assert [name for name, tensor in adapter.tensors().items() if torch.equal(tensor, after[name])] == []
    assert all(p.grad is None for name, p in model.named_parameters() if ".slots." not in name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model))


@pytest.mark.parametrize("arch", ["llama-tied", "gpt2"])
def test_tied_embeddings_keep_the_head_on_the_base(arch):
    model, ids = tiny(arch), some_ids()
    name = "wte" if arch == "gpt2" else "embed_tokens"
    adapter = trained(model, LoraConfig(rank=2, alpha=4, target_modules=[name]))
    head = model.lm_head.weight.clone()
    with injected(model, adapter):
        got = output(model, ids)
        assert torch.equal(model.lm_head.weight, head)
    (low,) = adapter.lowrank.values()
    embeddings = merged_weight(model.get_input_embeddings().weight, low)[ids]
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeddings).logits, got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", CAUSAL)
def test_law_6_each_row_gets_its_own_adapter(arch):
    model, ids = tiny(arch), some_ids(rows=4)
    config = LoraConfig(rank=2, alpha=6, modules_to_save=["lm_head"])
    adapters = {"a": trained(model, config, 1), "b": trained(model, LoraConfig(rank=4, alpha=2), 2)}
    for name, adapter in adapters.items():
        inject(model, adapter, name)
    names = ["b", None, "a", "b"]
    with use(model, names):
        mixed = output(model, ids)
    for row, name in enumerate(names):
        with use(model, name):
            torch.testing.assert_close(mixed[row], output(model, ids[row : row + 1])[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[0], mixed[2])


def test_a_call_that_chose_nothing_is_an_error():
    model = tiny("llama")
    inject(model, new_adapter(model, LoraConfig(rank=2)), "mine")
    with pytest.raises(AdapterNameError, match="this call chose none"):
        output(model, some_ids())
    with pytest.raises(AdapterNameError, match="nearest valid: mine"), use(model, "mien"):
        pass
    with use(model, ["mine", None]), pytest.raises(AdapterNameError, match="the batch has 3 rows"):
        output(model, some_ids(rows=3))
    with pytest.raises(AdapterNameError, match="already carries"):
        inject(model, new_adapter(model, LoraConfig(rank=2)), "mine")


def test_choices_do_not_leak_between_threads():
    model, ids = tiny("llama"), some_ids()
    adapters = {f"v1.{n}": trained(model, LoraConfig(rank=2, alpha=4), n) for n in range(3)}
    for name, adapter in adapters.items():
        inject(model, adapter, name)

    def run(name):
        with use(model, name):
            return [output(model, ids) for _ in range(5)]

    alone = {name: run(name)[0] for name in adapters}
    with ThreadPoolExecutor(3) as pool:
        results = dict(zip(adapters, pool.map(run, adapters), strict=True))
    assert all(torch.equal(got, alone[name]) for name, outs in results.items() for got in outs)
    assert adapter_names(model) == list(adapters)
    eject(model, ["v1.1"])
    assert adapter_names(model) == ["v1.0", "v1.2"]
    assert torch.equal(run("v1.2")[0], alone["v1.2"])


def test_an_adapter_of_another_shape_is_refused_whole():
    model, other = tiny("llama"), tiny("gpt2")
    adapter = trained(model, LoraConfig(rank=2))
    with pytest.raises(BaseMismatch, match=r"q_proj: the base has no such module"):
        inject(other, adapter)
    bad = {
        p: (low._replace(A=low.A[:, :-1]) if "up_proj" in p else low) for p, low in adapter.lowrank.items()
    }
    with pytest.raises(BaseMismatch, match="up_proj: the base's weight is 48 x 32, the adapter's 48 x 31"):
        inject(model, replace(adapter, lowrank=bad))
    assert adapter_names(model) == []
    assert "LoraLayer" not in {type(m).__name__ for m in model.modules()}


def test_a_shared_module_is_adapted_in_both_places():
    shared = nn.Linear(4, 4, bias=False)
    model = nn.ModuleDict({"first": shared, "second": shared})
    adapter = trained(model, LoraConfig(rank=2, alpha=2, target_modules=["first"]))
    x = torch.randn(3, 4)
    with injected(model, adapter), torch.no_grad():
        assert torch.equal(model["first"](x), model["second"](x))
        assert not torch.equal(model["second"](x), shared(x))
    assert model["first"] is model["second"] is shared


def test_dropout_acts_in_training_only():
    model, ids = tiny("llama"), some_ids()
    adapter = trained(model, LoraConfig(rank=4, alpha=8, dropout=0.5))
    with injected(model, adapter):
        assert torch.equal(output(model, ids), output(model, ids))
        model.train()
        assert not torch.equal(output(model, ids), output(model, ids))
        model.eval()


def test_the_start_depends_on_seed_and_path_alone():
    model = tiny("llama")
    small = new_adapter(model, LoraConfig(rank=4, target_modules=["q_proj"]), seed=3)
    large = new_adapter(model, LoraConfig(rank=4), seed=3)
    path = "model.layers.1.self_attn.q_proj"
    assert torch.equal(small.lowrank[path].A, large.lowrank[path].A)
    assert not torch.equal(
        small.lowrank[path].A, new_adapter(model, LoraConfig(rank=4), seed=4).lowrank[path].A
    )
    bound = 32**-0.5
    a = large.lowrank[path].A
    assert a.abs().max() <= bound
    assert 0.8 * bound / 3**0.5 < a.std() < 1.2 * bound / 3**0.5
    gauss = new_adapter(model, LoraConfig(rank=8, init="gaussian"), seed=3).lowrank[path].A
    assert 0.8 / 8 < gauss.std() < 1.2 / 8
