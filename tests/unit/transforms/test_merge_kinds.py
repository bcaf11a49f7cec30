"""Merging in memory, every kind of layer in every variant: the outputs of base and adapter, and every bit restored."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from merges import stirred
from onebase.adapters.injection import injected, new_adapter
from onebase.config import LoraConfig
from onebase.errors import BaseMismatch
from onebase.transforms.merge import merge_in_memory, merged, unmerge
from tiny import tiny, tiny_inputs


class Turned(nn.Module):
    """A linear layer that stores its weight (in, out), as GPT-2's does."""

    def __init__(self, features, out):
        super().__init__()
        self.nf, self.weight = out, nn.Parameter(torch.randn(features, out) * 0.3)
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attend(x, x, x)[0]


class Experts(nn.Module):
    """Three experts in one parameter, stored either way."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.stack = nn.Parameter(torch.randn((3, 8, 6) if is_transposed else (3, 6, 8)))

    def forward(self, x):
        return torch.einsum("...i,eio->...eo", x, self.stack if self.is_transposed else self.stack.mT)


class Wrapped(nn.Module):
    """The layer under a name."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


PICTURE = {"kernel_size": 3, "padding": 1}
LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (4, 5, 8)),
    "linear without bias": (lambda: nn.Linear(8, 6, bias=False), (4, 8)),
    "transposed": (lambda: Turned(8, 6), (4, 5, 8)),
    "embedding": (lambda: nn.Embedding(12, 8), (4, 5)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=2, dilation=2), (4, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, (3, 2), stride=2, padding_mode="reflect", padding=1), (4, 8, 7, 6)),
    "conv2d pointwise": (lambda: nn.Conv2d(8, 6, 1), (4, 8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(8, 6, **PICTURE), (2, 8, 3, 4, 5)),
    "attention": (Attention, (4, 5, 8)),
    "attention of three": (lambda: Attention(kdim=8, vdim=8, bias=False), (4, 5, 8)),
    "experts": (lambda: Experts(False), (4, 8)),
    "experts transposed": (lambda: Experts(True), (4, 8)),
}
TARGETS = {
    "attention": {"target_modules": ["attend"]},
    "attention of three": {"target_modules": ["attend"]},
    "experts": {"target_modules": [], "target_parameters": ["layer.stack"]},
    "experts transposed": {"target_modules": [], "target_parameters": ["layer.stack"]},
}
PARAMETERS = tuple(TARGETS)
NO_BIAS = ("linear without bias", "embedding", *PARAMETERS)
VARIANTS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "bias": {"lora_bias": True},
}
CASES = [
    (layer, variant)
    for layer in LAYERS
    for variant in VARIANTS
    if not (variant == "dora" and layer in PARAMETERS) and not (variant == "bias" and layer in NO_BIAS)
]


def make(layer, variant, dtype=torch.float32):
    """A model of one layer, an input, and an adapter whose every tensor moved."""
    torch.manual_seed(0)
    factory, shape = LAYERS[layer]
    model = Wrapped(factory()).eval().requires_grad_(False)
    x = torch.randint(12, shape) if layer == "embedding" else torch.randn(shape)
    options = {"target_modules": ["layer"]} | TARGETS.get(layer, {})
    adapter = stirred(new_adapter(model, LoraConfig(rank=2, alpha=3, **options, **VARIANTS[variant])))
    return model.to(dtype), x if layer == "embedding" else x.to(dtype), adapter


@pytest.mark.parametrize(("layer", "variant"), CASES)
def test_law_1_merged_equals_injected(layer, variant):
    model, x, adapter = make(layer, variant)
    before = model(x)
    with injected(model, adapter):
        wanted = model(x)
    with merged(model, adapter):
        got = model(x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (got - before).abs().max() > 0.05
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layer", "variant"), CASES)
def test_law_4_many_cycles_leave_every_bit(layer, variant, dtype):
    model, _, adapter = make(layer, variant, dtype)
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    for _ in range(20):
        changed = merge_in_memory(model, adapter).state_dict()
        assert {tensor.dtype for tensor in changed.values()} == {dtype}
        assert any(not torch.equal(changed[name], copy) for name, (_, copy) in before.items())
        unmerge(model)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in before.items())


MODELS = [(arch, "lora") for arch in ("gpt2", "mixtral", "qwen3-moe", "gpt-oss", "t5", "vit")]
MODELS += [(arch, variant) for arch in ("gpt2", "vit") for variant in ("dora", "bias")]


@pytest.mark.parametrize(("arch", "variant"), MODELS)
def test_law_1_in_whole_models(arch, variant):
    model, inputs = tiny(arch), tiny_inputs(arch)
    adapter = stirred(new_adapter(model, LoraConfig(rank=2, alpha=4, **VARIANTS[variant])))
    with torch.no_grad():
        with injected(model, adapter):
            wanted = model(**inputs).logits
        with merged(model, adapter):
            got = model(**inputs).logits
        effect, largest = (got - model(**inputs).logits).abs().max(), float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=5e-4 * largest)  # random nets multiply rounding
    assert effect > 0.1 * largest


def test_bfloat16_weights_are_summed_in_float32_and_rounded_once():
    model, _, adapter = make("conv2d", "dora", torch.bfloat16)
    weight, low = model.layer.weight.clone(), adapter.lowrank["layer"]
    exact = weight.double().flatten(1) + low.scale * low.B.double() @ low.A.double()
    exact = (exact * (low.magnitude / exact.norm(dim=1))[:, None]).view(weight.shape)
    got = merge_in_memory(model, adapter).layer.weight
    assert (got == exact.to(torch.bfloat16)).float().mean() > 0.98  # float32 rounds a few to the other side
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=0)


def test_a_bias_needs_a_bias_to_merge_into():
    model, x, adapter = make("linear", "bias")
    other = Wrapped(nn.Linear(8, 6, bias=False)).requires_grad_(False)
    with pytest.raises(BaseMismatch, match="layer: the adapter moves its bias, and the Linear has none"):
        merge_in_memory(other, adapter)
    low = adapter.lowrank["layer"]
    alone = replace(adapter, lowrank={"layer": low._replace(B=low.B * 0)})
    before = model(x)
    with merged(model, alone):
        torch.testing.assert_close(model(x), before + low.scale * low.bias)
