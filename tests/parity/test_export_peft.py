"""Exported folders in PEFT itself: the same logits as the source, with its settings and with the oldest ones."""

import json

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model

from adapters import VARIANTS, every_kind, options_for, trained
from merges import assert_same_outputs
from onebase.adapters.injection import injected
from onebase.config import LoraConfig
from onebase.models.base import wrap_base
from onebase.storage.format import load_adapter, read_adapter
from onebase.transforms.export import portable, save_exact, save_portable
from tiny import output, some_ids, tiny

ARCHES = ["llama", "qwen3", "gpt2", "phi3"]


def in_peft(arch, folder):
    return output(PeftModel.from_pretrained(tiny(arch), folder), some_ids())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", ARCHES)
def test_peft_reads_both(arch, variant, tmp_path):
    model = tiny(arch)
    source = trained(model, LoraConfig(**options_for(arch, variant)))
    with injected(model, source):
        wanted = output(model, some_ids())
    assert (wanted - output(model, some_ids())).abs().max() > 0.1 * wanted.abs().max()
    save_exact(source, tmp_path / "peft")
    save_portable(portable(source), source, tmp_path / "portable")
    for name in ("peft", "portable"):
        assert_same_outputs(in_peft(arch, tmp_path / name), wanted)
        assert load_adapter(tmp_path / name, wrap_base(model)).lowrank.keys() == source.lowrank.keys()


def test_embeddings_and_head(tmp_path):
    model = tiny("llama")
    source = trained(model, every_kind(model))
    with injected(model, source):
        wanted = output(model, some_ids())
    save_portable(portable(source), source, tmp_path / "a")
    assert_same_outputs(in_peft("llama", tmp_path / "a"), wanted)


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_in_peft(start, tmp_path):
    """PEFT's own conversion of such an adapter has rank 2r and no mark of its start; ours reads and rewrites it."""
    config = PeftLora(r=4, lora_alpha=6, init_lora_weights=start, target_modules=["q_proj"])
    model = get_peft_model(tiny("llama"), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    wanted = output(model, some_ids())
    model.save_pretrained(tmp_path / "made", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    source = read_adapter(tmp_path / "made")
    assert {low.rank for low in source.lowrank.values()} == {8}
    save_portable(portable(source), source, tmp_path / "portable")
    assert_same_outputs(in_peft("llama", tmp_path / "portable"), wanted)


def test_the_config_holds_what_peft_0_3_knew(tmp_path):
    source = trained(tiny("gpt2"), LoraConfig(rank=4, rslora=True, target_modules=["c_attn"]))
    save_portable(portable(source), source, tmp_path / "a")
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    new = ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "target_parameters")
    assert not [name for name in new if name in raw]
    assert raw["fan_in_fan_out"] is True
    assert raw["target_modules"] == ["c_attn"]
