"""What the tests of merging share: the adapters that they merge, and folders as transformers saves and loads them."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from adapters import VARIANTS, every_kind, options_for
from onebase.adapters.adapter import Adapter
from onebase.config import LoraConfig
from onebase.storage.shards import list_tensors, read_tensor
from tiny import CAUSAL, CONFIGS, tiny

EMBEDDINGS = {"gpt2": "wte", "bert": "word_embeddings"}
SPECS = {name: (lambda arch, name=name: LoraConfig(**options_for(arch, name))) for name in VARIANTS}
SPECS["every kind"] = lambda arch: every_kind(tiny(arch))
SPECS["one tied"] = lambda arch: LoraConfig(
    rank=2, alpha=6, target_modules=[EMBEDDINGS.get(arch, "embed_tokens")]
)
SPECS["saved"] = lambda arch: LoraConfig(
    rank=2, alpha=6, modules_to_save=["lm_head" if arch in CAUSAL else "pooler"]
)
CASES = pytest.mark.parametrize(("arch", "spec"), [(a, s) for a in CONFIGS for s in SPECS])


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def load(folder, loader=None):
    """transformers' own reading of a folder; it must find every weight and nothing besides."""
    loader = loader or (AutoModel if "Bert" in (folder / "config.json").read_text() else AutoModelForCausalLM)
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tensors(folder):
    return {info.name: read_tensor(info) for info in list_tensors(folder)}


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def assert_same_outputs(some, others):
    """Equal to 3e-5 of the largest value: a random net multiplies float32's rounding by a hundred."""
    torch.testing.assert_close(some, others, rtol=0, atol=3e-5 * float(others.abs().max()))


def stirred(adapter: Adapter, seed: int = 0) -> Adapter:
    """The adapter with every tensor moved away from where it started, magnitudes and biases too."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor):
        return tensor + 0.3 * torch.randn(tensor.shape, generator=generator)

    low = {
        p: one._replace(**{n: moved(t) for n, t in one.tensors().items()})
        for p, one in adapter.lowrank.items()
    }
    full = {p: {name: moved(t) for name, t in state.items()} for p, state in adapter.full.items()}
    return replace(adapter, lowrank=low, full=full)
