"""Every kind of layer and variant that PEFT has: the same output, gradients and merged weights, in both directions."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from adapters import trained
from layer_cases import CASES, EACH, VARIANTS
from onebase.adapters.injection import injected, trainable
from onebase.adapters.kinds import find_site, merged_weight
from onebase.models.base import wrap_base
from onebase.storage.format import load_adapter, save_adapter
from onebase.storage.peft_tensors import to_peft_tensors

# PEFT drops a convolution's dilation and padding mode, and refuses attention whose three weights are stored apart.
NOT_PEFTS = ("conv1d", "conv2d", "conv3d", "attention, weights apart")
BOTH = [(name, variant) for name, variant in EACH if name not in NOT_PEFTS]
pytestmark = [
    pytest.mark.parametrize(("name", "variant"), BOTH),
    pytest.mark.filterwarnings("ignore"),  # PEFT warns of ties, of layers without a bias, and more
]
PEFT_OPTIONS = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}} | {
    name: VARIANTS[name] for name in ("lora", "lora_bias")
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
WITH_BIAS = {"mlp": ["lin0"]} | {f"conv{n}d, strided": ["first"] for n in (1, 2, 3)}


def case_of(name, variant):
    """For lora_bias only layers that have a bias: PEFT adds one to the others too, and then cannot merge."""
    case = CASES[name]
    return case._replace(targets=WITH_BIAS.get(name, case.targets)) if variant == "lora_bias" else case


def peft_model(case, variant, model):
    """PEFT's own, every tensor of its adapter away from its start."""
    parameters = list(case.parameters) or None
    options = PEFT_OPTIONS[variant] | {"target_modules": case.targets, "target_parameters": parameters}
    theirs = get_peft_model(copy.deepcopy(model), PeftConfig(r=2, lora_alpha=5, **options)).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return theirs


def peft_loads(model, folder):
    """PEFT reads the folder and reports no missing and no unexpected key."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return PeftModel.from_pretrained(copy.deepcopy(model), folder, is_trainable=True).eval()


def test_peft_reads_what_we_save(name, variant, tmp_path):
    case = case_of(name, variant)
    model = case.model()
    adapter = trained(model, case.config(variant))
    save_adapter(adapter, tmp_path / "a")
    theirs = peft_loads(model, tmp_path / "a")
    with injected(model, adapter):
        ours = case.call(model)
    torch.testing.assert_close(case.call(theirs), ours, **CLOSE)
    assert (ours - case.call(model)).abs().max() > 1e-2


def test_we_read_what_peft_saves(name, variant, tmp_path):
    case = case_of(name, variant)
    model = case.model()
    theirs = peft_model(case, variant, model)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs", wrap_base(model))
    with injected(model, adapter):
        torch.testing.assert_close(case.call(model), case.call(theirs), **CLOSE)
    assert (case.call(model) - case.call(theirs)).abs().max() > 1e-2
    save_adapter(adapter, tmp_path / "ours")
    assert load_adapter(tmp_path / "ours", wrap_base(model)) == adapter
    stored = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    mine, their = stored
    assert all(torch.equal(tensor, their[key]) for key, tensor in mine.items())
    assert {key for key in their if "lora_" in key} == mine.keys()


def test_gradients_are_pefts(name, variant, tmp_path):
    case = case_of(name, variant)
    model = case.model()
    adapter = trained(model, case.config(variant))
    save_adapter(adapter, tmp_path / "a")
    theirs = peft_loads(model, tmp_path / "a")
    case.call(theirs).pow(3).mean().backward()
    named = theirs.named_parameters()
    expected = {n.replace(".default", ""): p.grad for n, p in named if p.requires_grad}
    with injected(model, adapter):
        parameters = trainable(model, "default")
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        case.call(model).pow(3).mean().backward()
    grads = {
        path: low._replace(**{side: parameters[f"{path}.{side}"].grad for side in low.tensors()})
        for path, low in adapter.lowrank.items()
    }
    ours = to_peft_tensors(replace(adapter, lowrank=grads))
    expected = {n.replace("magnitude_vector.weight", "magnitude_vector"): g for n, g in expected.items()}
    for key in ours:  # half of B is stored, and added twice: but for a gradient PEFT counts it once
        if key.endswith(".out_proj.lora_A.weight"):
            expected[key] = 2 * expected[key]
        elif key.endswith(".out_proj.lora_B.weight"):
            expected[key] = expected[key] / 2
    assert ours.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in ours.values())
    for key, grad in ours.items():
        torch.testing.assert_close(
            grad, expected[key], rtol=1e-3, atol=1e-5 * largest, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert largest > 1e-5


def test_merged_weights_are_pefts(name, variant, tmp_path):
    if name == "t5 embeddings":
        pytest.skip("PEFT merges into the one tensor that the encoder, the decoder and the head are tied to")
    case = case_of(name, variant)
    model = case.model()
    adapter = trained(model, case.config(variant))
    save_adapter(adapter, tmp_path / "a")
    theirs = peft_loads(model, tmp_path / "a").merge_and_unload()
    modules = dict(model.named_modules())
    for path, low in adapter.lowrank.items():
        site = find_site(modules, path)
        expected = theirs.get_parameter(site.tensor)
        torch.testing.assert_close(
            merged_weight(model.get_parameter(site.tensor), low), expected.data, **CLOSE
        )
        if low.bias is not None:
            owner = site.owner + ".bias"
            bias = model.get_parameter(owner) + low.scale * low.bias
            torch.testing.assert_close(bias, theirs.get_parameter(owner).data, **CLOSE)
