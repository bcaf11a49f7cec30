"""Merging in memory: the outputs of base and adapter, and a way back that is exact to the bit."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import every_kind, trained
from merges import CASES, SPECS, assert_same_outputs
from onebase.adapters.injection import base_tensors, inject, injected, use
from onebase.config import LoraConfig
from onebase.errors import AdapterNameError, BaseMismatch
from onebase.models.fingerprint import fingerprint_model
from onebase.transforms.merge import merge_in_memory, merged, unmerge
from tiny import CONFIGS, output, some_ids, tiny


@CASES
def test_merged_in_memory_equals_base_and_adapter(arch, spec):
    model, ids = tiny(arch), some_ids()
    adapter = trained(model, SPECS[spec](arch))
    before = output(model, ids)
    with injected(model, adapter):
        wanted = output(model, ids)
    with merged(model, adapter):
        got = output(model, ids)
    assert_same_outputs(got, wanted)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(output(model, ids), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", CONFIGS)
def test_law_4_unmerge_restores_every_bit(arch, dtype):
    model, ids = tiny(arch).to(dtype), some_ids()
    adapter = trained(model, every_kind(model))
    before = {
        name: (tensor, tensor.data_ptr(), tensor.clone())
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    digest, logits = fingerprint_model(model), output(model, ids)
    for _ in range(10):
        assert merge_in_memory(model, adapter) is model
        assert not torch.equal(output(model, ids), logits)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert unmerge(model) is model
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, place, copy) in before.items():
        assert after[name] is tensor
        assert after[name].data_ptr() == place
        assert torch.equal(tensor, copy)
    assert fingerprint_model(model) == digest
    assert torch.equal(output(model, ids), logits)
    assert not [name for name in vars(model) if name.startswith("onebase")]


def test_a_base_that_is_mapped_read_only_can_be_merged(tmp_path):
    """Writing to such a weight would kill the process."""
    model = tiny("llama")
    save_file({"w": model.lm_head.weight}, tmp_path / "w")
    model.lm_head.weight = nn.Parameter(load_file(tmp_path / "w")["w"], requires_grad=False)
    mapped, stored = model.lm_head.weight, (tmp_path / "w").read_bytes()
    with merged(model, trained(model, LoraConfig(rank=2, modules_to_save=["lm_head"]))):
        assert model.lm_head.weight is not mapped
        assert model.lm_head.weight.requires_grad is False
    assert model.lm_head.weight is mapped
    assert (tmp_path / "w").read_bytes() == stored


def test_only_one_adapter_is_in_the_weights():
    model = tiny("llama")
    adapter = trained(model, LoraConfig(rank=2))
    with merged(model, adapter), pytest.raises(AdapterNameError, match="already carries a merged one"):
        merge_in_memory(model, adapter)
    with pytest.raises(AdapterNameError, match="no adapter is merged"):
        unmerge(model)
    inject(model, adapter, "mine")
    with use(model, "mine"), pytest.raises(AdapterNameError, match="already carries mine"):
        merge_in_memory(model, adapter)
    other = tiny("gpt2")
    with pytest.raises(BaseMismatch, match="no such module"):
        merge_in_memory(other, adapter)
    assert all(type(module).__module__.startswith(("torch", "transformers")) for module in other.modules())
    assert len(dict(base_tensors(other))) == len(dict(base_tensors(tiny("gpt2"))))


def test_a_merge_that_fails_half_way_is_undone():
    model = tiny("llama")
    before = dict(model.state_dict(keep_vars=True))
    adapter = trained(model, LoraConfig(rank=2, target_modules=["q_proj"]))
    first, second = sorted(adapter.lowrank)
    broken = adapter.lowrank[second]._replace(
        A=adapter.lowrank[second].A.to("meta"), B=adapter.lowrank[second].B
    )
    low = {first: adapter.lowrank[first], second: broken}
    with pytest.raises(NotImplementedError):
        merge_in_memory(model, replace(adapter, lowrank=low))
    assert all(tensor is before[name] for name, tensor in model.state_dict(keep_vars=True).items())
    merge_in_memory(model, adapter)
