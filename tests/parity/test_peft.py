"""Adapters go both ways between onebase and PEFT, with the same logits and the same gradients."""

import copy
import json
import re
import warnings

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from adapters import every_kind, options_for, trained
from onebase.adapters.injection import injected, trainable
from onebase.adapters.targets import match
from onebase.config import LoraConfig
from onebase.errors import FormatError
from onebase.models.base import wrap_base
from onebase.storage.format import load_adapter, read_adapter, save_adapter
from tiny import CONFIGS, output, some_ids, tiny

VARIANTS = ("lora", "rslora", "patterns")


def to_peft(options: dict) -> dict:
    names = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora"}
    return {names.get(key, key): value for key, value in options.items()}


def quiet_peft(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, *args, **kwargs)


def save_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def peft_loads(model, folder):
    """PEFT reads the folder and reports no missing and no unexpected key."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings(
            "ignore", message=".*tie_word_embeddings.*"
        )  # the head stays on the base, as ours
        return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def shake(model):
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", CONFIGS)
def test_peft_reads_what_we_save(arch, variant, tmp_path):
    model, ids = tiny(arch), some_ids()
    adapter = trained(model, LoraConfig(**options_for(arch, variant)))
    save_adapter(adapter, tmp_path / "a")
    with injected(model, adapter):
        ours = output(model, ids)
    theirs = peft_loads(model, tmp_path / "a")
    torch.testing.assert_close(output(theirs, ids), ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, output(model, ids))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", CONFIGS)
def test_we_read_what_peft_saves(arch, variant, tmp_path):
    model, ids = tiny(arch), some_ids()
    if (arch, variant) == ("mixtral", "patterns"):
        pytest.skip(
            "PEFT adds a pattern of its own, stores all of them sorted, and cannot read the file itself"
        )
    config = PeftConfig(target_modules="all-linear", **to_peft(options_for(arch, variant)))
    theirs = quiet_peft(copy.deepcopy(model), config).eval()
    shake(theirs)
    save_peft(theirs, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", wrap_base(model))
    assert {target.path for target in match(model, LoraConfig(rank=1)).targets} == adapter.lowrank.keys()
    before = output(model, ids)
    with injected(model, adapter):
        torch.testing.assert_close(output(model, ids), output(theirs, ids), rtol=1e-5, atol=1e-5)
    assert (before - output(theirs, ids)).abs().max() > 1e-2


REFUSED = {
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_we_do_not_compute_is_refused_by_name(setting, tmp_path):
    """The config alone decides: beside it lies an adapter that would load."""
    adapter = trained(tiny("llama"), LoraConfig(rank=2, target_modules="q_proj"))
    save_adapter(adapter, tmp_path / "a")
    assert read_adapter(tmp_path / "a") == adapter
    PeftConfig(r=2, target_modules=["q_proj"], **REFUSED[setting]).save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match=re.escape(setting)):
        read_adapter(tmp_path / "a")


def test_a_config_with_every_default_of_peft_is_read(tmp_path):
    adapter = trained(tiny("llama"), LoraConfig(rank=8, alpha=8, target_modules="q_proj"))
    save_adapter(adapter, tmp_path / "a")
    PeftConfig(target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    assert len(json.loads((tmp_path / "a" / "adapter_config.json").read_text())) > 30
    assert read_adapter(tmp_path / "a").lowrank.keys() == adapter.lowrank.keys()


SPECS = {
    "regex": {"target_modules": r".*layers\.[01]\.self_attn\.(q|v)_proj"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("spec", SPECS)
def test_every_way_to_name_targets(arch, spec, tmp_path):
    model, ids = tiny(arch), some_ids()
    theirs = quiet_peft(copy.deepcopy(model), PeftConfig(r=4, lora_alpha=6, **SPECS[spec])).eval()
    shake(theirs)
    save_peft(theirs, tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft", wrap_base(model))
    with injected(model, adapter):
        torch.testing.assert_close(output(model, ids), output(theirs, ids), rtol=1e-5, atol=1e-5)
    save_adapter(adapter, tmp_path / "ours")
    assert read_adapter(tmp_path / "ours") == adapter
    mine, their = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert mine.keys() <= their.keys()  # PEFT adds copies of base tensors where it suspects a new vocabulary
    assert all("lora_" not in key for key in their.keys() - mine.keys())
    assert all(torch.equal(tensor, their[key]) for key, tensor in mine.items())
    assert (output(model, ids) - output(theirs, ids)).abs().max() > 1e-2
    torch.testing.assert_close(output(peft_loads(model, tmp_path / "ours"), ids), output(theirs, ids))


@pytest.mark.parametrize("arch", sorted(CONFIGS.keys() - {"mixtral"}))  # experts: test_layers_peft.py
def test_gradients_agree(arch, tmp_path):
    """The same adapter, the same input: the gradient of every A and B is PEFT's."""
    model, ids = tiny(arch), some_ids()
    config = LoraConfig(rank=4, alpha=8) if arch != "bert" else every_kind(model)
    adapter = trained(model, config)
    save_adapter(adapter, tmp_path / "a")
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a", is_trainable=True)

    def loss(net):
        result = net(input_ids=ids)
        return (result.logits if "logits" in result else result.last_hidden_state).square().mean()

    loss(theirs.eval()).backward()
    with injected(model, adapter):
        parameters = trainable(model, "default")
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        loss(model).backward()
        grads = {name: p.grad for name, p in parameters.items()}
    their_grads = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(grads) == len(their_grads) > 0
    for name, grad in grads.items():
        path, side = name.rsplit(".", 1)
        (theirs_name,) = [n for n in their_grads if f"{path}.lora_" in n and f"_{side}.default" in n]
        torch.testing.assert_close(grad, their_grads[theirs_name], rtol=1e-4, atol=1e-7)
        assert arch == "bert" or grad.abs().max() > 1e-5, (
            name
        )  # BERT's pooler takes no part in its hidden states


def test_half_precision_files_are_widened_exactly(tmp_path):
    model = tiny("llama")
    theirs = quiet_peft(
        copy.deepcopy(model), PeftConfig(r=2, target_modules=["q_proj"]), autocast_adapter_dtype=False
    )
    shake(theirs)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    save_peft(theirs, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    low = load_adapter(tmp_path / "a", wrap_base(model)).lowrank["model.layers.0.self_attn.q_proj"]
    assert low.A.dtype == torch.float32
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(low.A, stored[key].float())
    assert stored[key].dtype == torch.bfloat16
