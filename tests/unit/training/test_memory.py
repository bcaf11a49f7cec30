"""The engine's kept bytes, by the table and as autograd is given them; and what a plan adds to them."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from decoders import DECODERS, adapted, decoder, some_layout
from onebase.adapters.injection import use
from onebase.adapters.targets import match
from onebase.config import LoraConfig
from onebase.data.trie import filled, filled_length
from onebase.models.engine import Engine
from onebase.models.reading import read_model
from onebase.ops.decoder import _State
from onebase.ops.kernels import takes
from onebase.training.memory import KEPT, Batch, autograd_bytes, engine_bytes, kept_bytes

NODES = [(0, 20, -1), (20, 9, 0), (29, 12, 0), (41, 24, -1)]  # 65 tokens, filled up to 72


def saved_bytes(model, recompute):
    """The bytes that autograd is given of tensors with a value for each token, each memory once; and the tokens."""
    made, _ = some_layout(NODES, share_of_loss=0.3)
    tokens, found = len(filled(made).ids), {}
    assert tokens == 72
    assert filled_length(len(made.columns.unique())) != tokens  # what the head keeps does not count

    def keep(tensor):
        if tokens in tensor.shape[:2]:
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with use(model), saved_tensors_hooks(keep, lambda tensor: tensor):
        Engine(model, "default").loss(made, recompute)
    return sum(found.values()), tokens


OPTIONS = {
    "all": {},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "the upper layers": {"layers": "1,2", "target_modules": ["down_proj", "gate_proj"]},
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_what_every_family_keeps_is_what_the_table_says(name, recompute):
    model = decoder(name)
    layers, targets = read_layers(model), match(model, LoraConfig(rank=4)).targets
    adapted(model)
    found, tokens = saved_bytes(model, recompute)
    assert found == tokens * kept_bytes(layers, targets, 4, recompute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_some_layers_and_any_dtype(options, dtype):
    model = decoder("qwen3", dtype)
    layers, targets = read_layers(model), match(model, LoraConfig(rank=4, **options)).targets
    adapted(model, **options)
    found, tokens = saved_bytes(model, recompute=False)
    narrow = dtype == torch.bfloat16 and not takes(torch.empty(1, dtype=dtype))  # torch's twin keeps x·Aᵀ so
    ranks = sum(target.rank for target in targets)
    assert found == tokens * (kept_bytes(layers, targets, dtype.itemsize, False) - 2 * ranks * narrow)


def read_layers(model):
    return [one.frozen for one in read_model(model, ()).layers]


def test_the_table_has_what_the_decoder_saves():
    assert KEPT._fields == _State._fields[:-1]  # and the x·Aᵀ, counted by rank


def test_recomputation_keeps_the_inputs_and_one_layer():
    model = decoder("llama")
    targets = match(model, LoraConfig(rank=4)).targets
    one, two = (Batch(tokens, 10, 20, 1) for tokens in (1000, 2000))
    # A layer: 4 states of 32 (x, mid, q, attended), k and v of 16, gate and up of 48, and 7 ranks of 4.
    layer = 4 * 32 + 2 * 16 + 2 * 48 + 7 * 4
    working = 3 * 48 + 2 * 64 + 4 * 32
    assert difference(model, targets, one, two, False) == 4 * 1000 * (3 * layer + working)
    assert difference(model, targets, one, two, True) == 4 * 1000 * (3 * 32 + layer + working)


def difference(model, targets, one, two, recompute):
    return engine_bytes(model, targets, two, recompute) - engine_bytes(model, targets, one, recompute)


def test_a_chunk_of_logits_is_held_where_there_are_few_tokens():
    model = decoder("llama")
    targets = match(model, LoraConfig(rank=4)).targets
    small, more = (engine_bytes(model, targets, Batch(8, losses, 8, 1), False) for losses in (1, 101))
    assert small > 128 * 97 * 12  # three float32 copies of 128 rows of logits
    assert more - small == 100 * 3 * 32 * 4


def test_autograd_keeps_inputs_outputs_and_logits():
    model = decoder("llama")
    one, two = (autograd_bytes(model, (), Batch(tokens, 10, 20, 1)) for tokens in (1, 2))
    outputs = 32 + 16 + 16 + 32 + 48 + 48 + 32
    inputs = 4 * 32 + 32 + 32 + 48
    assert two - one == 8 * 3 * (inputs + outputs)
    losses = autograd_bytes(model, (), Batch(1, 11, 20, 1)) - one
    assert losses == 97 * 16
