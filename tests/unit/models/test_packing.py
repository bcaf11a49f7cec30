"""Packed rows against each row alone, for many architectures; and the refusal of those that would leak."""

import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from onebase.errors import BaseError
from onebase.models import packing
from onebase.models.packing import packed_attention, packing_problem, segments

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16}
# What differs from SIZES. Windows of 4 are shorter than the rows below.
PACKED = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 0.5},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"sliding_window": 4},
    "gpt2": {},  # with attention dropout by default, which eval mode keeps off
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "stablelm": {},
    "ctrl": {},  # changes its embeddings in place
    "deepseek_v3": {
        **EXPERTS,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}
# Why each of these is refused.
REFUSED = {
    "bloom": ({}, "does not use transformers' attention interface"),
    "falcon": ({}, "does not use transformers' attention interface"),
    "gptj": ({"rotary_dim": 8}, "does not use transformers' attention interface"),
    "gpt_oss": (EXPERTS, "takes s_aux"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "called 1 times for 2 layers"),
    "diffllama": ({}, "called 4 times for 2 layers"),
    "rwkv": ({}, "called 0 times for 2 layers"),
    "llama4_text": ({**EXPERTS, "head_dim": 8, "attention_chunk_size": 4}, "no sliding window"),
    "zaya": ({**EXPERTS, "num_experts_per_tok": 1}, "the logits differ"),
}
LENGTHS = (6, 1, 9, 6)


def tiny(name, seed=0, **changes):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # the default start is so small that a leak could hide
        parameter.data.mul_(3.0)
    return model


def some_rows(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, VOCABULARY, (sum(lengths),), generator=generator).split(lengths))


def run_packed(model, rows, **kwargs):
    """Logits of one packed call, per row."""
    lengths = tuple(len(row) for row in rows)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with packed_attention(model), segments(lengths):
        output = model(torch.cat(rows)[None], position_ids=positions, attention_mask=None, use_cache=False)
    return output.logits[0].split(lengths)


def run_alone(model, rows):
    return [model(row[None], use_cache=False).logits[0] for row in rows]


def next_token_loss(logits, rows):
    pairs = [(part[:-1], row[1:]) for part, row in zip(logits, rows, strict=True)]
    return sum(cross_entropy(part, target, reduction="sum") for part, target in pairs)


def gradient(model, rows, run):
    """The gradient of the summed loss on the embeddings."""
    weight = model.get_input_embeddings().weight
    return torch.autograd.grad(next_token_loss(run(model, rows), rows), weight)[0]


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_give_what_each_gives_alone(name):
    model, rows = tiny(name, **PACKED[name]), some_rows()
    with torch.no_grad():
        for packed, alone in zip(run_packed(model, rows), run_alone(model, rows), strict=True):
            assert (packed - alone).abs().max() <= 1e-5 * max(1.0, float(alone.abs().max()))
    packed, alone = gradient(model, rows, run_packed), gradient(model, rows, run_alone)
    assert (packed - alone).abs().max() <= 1e-4 * alone.abs().max()


@pytest.mark.parametrize("name", PACKED)
def test_the_probe_passes_and_leaves_no_trace(name):
    model = tiny(name, **PACKED[name])
    model.train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    implementation, random_state = model.config._attn_implementation, torch.get_rng_state()
    assert packing_problem(model, pad_id=0) is None
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("name", REFUSED)
def test_the_probe_refuses_what_cannot_be_packed(name):
    changes, reason = REFUSED[name]
    model = tiny(name, **changes)
    implementation = model.config._attn_implementation
    problem = packing_problem(model, pad_id=0)
    assert problem is not None
    assert problem.startswith(f"{name} cannot be trained on packed rows: ")
    assert reason in problem
    assert "\n" not in problem
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2"])
def test_the_probe_passes_in_bfloat16(name):
    assert packing_problem(tiny(name, **PACKED[name]).bfloat16(), pad_id=0) is None


def test_a_leak_shows_in_the_gradient():
    rows = some_rows((6, 9, 1))
    for name, changes, expected in (("zaya", REFUSED["zaya"][0], True), ("qwen3_moe", EXPERTS, False)):
        model = tiny(name, **changes)
        with packed_attention(model):
            assert packing._packed_logits_and_leak(model, rows)[1] is expected


def test_the_probe_works_on_replaced_modules():
    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) * 1.5

    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = Wrapped(layer.self_attn.q_proj)
    model.model.embed_tokens = Wrapped(model.model.embed_tokens)
    assert packing_problem(model, pad_id=0) is None


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8).map(tuple), seed=st.integers(0, 9))
def test_any_lengths(lengths, seed):
    model, rows = tiny("mistral", **PACKED["mistral"]), some_rows(lengths, seed)
    with torch.no_grad():
        for packed, alone in zip(run_packed(model, rows), run_alone(model, rows), strict=True):
            torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_a_row_changes_no_other_row():
    model, rows = tiny("gemma3_text", **PACKED["gemma3_text"]), some_rows()
    with torch.no_grad():
        before = run_packed(model, rows)
        after = run_packed(model, [rows[0], rows[1], rows[2].flip(0), rows[3]])
    assert [torch.equal(x, y) for x, y in zip(before, after, strict=True)] == [True, True, False, True]


def test_calls_without_segments_are_transformers_own():
    model = tiny("mistral", **PACKED["mistral"])
    ids, mask = torch.stack(some_rows((9, 9))), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    with torch.no_grad():
        own = model(ids, attention_mask=mask).logits
        written = model.generate(ids, max_new_tokens=5, do_sample=False)
        with packed_attention(model):
            assert torch.equal(model(ids, attention_mask=mask).logits, own)
            assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_know_their_rows_in_another_thread(reentrant):
    """Autograd runs a GPU's backward in its own threads, where no context variable is set."""
    model, rows = tiny("llama"), some_rows()
    weight = model.get_input_embeddings().weight
    expected = gradient(model, rows, run_packed)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert model.is_gradient_checkpointing
    loss = next_token_loss(run_packed(model, rows), rows)
    with packed_attention(model):
        backward = threading.Thread(target=loss.backward)
        backward.start()
        backward.join()
    assert torch.equal(weight.grad, expected)


def test_each_config_gets_its_own_implementation_back():
    text = {**SIZES, "head_dim": 8, "sliding_window": 4}
    vision = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    configs = (model.config, model.config.text_config, model.config.vision_config)
    with packed_attention(model):
        assert [c._attn_implementation for c in configs] == ["onebase"] * 3
    assert [c._attn_implementation for c in configs] == ["sdpa", "eager", "sdpa"]
    with pytest.raises(KeyError), packed_attention(model):
        raise KeyError
    assert [c._attn_implementation for c in configs] == ["sdpa", "eager", "sdpa"]
    del model.model.vision_tower  # its config is now read by no module
    model.config.vision_config._attn_implementation = "eager"
    with packed_attention(model):
        pass
    assert [c._attn_implementation for c in configs] == ["sdpa", "eager", "eager"]


def call(model, lengths, ids, **kwargs):
    with packed_attention(model), segments(lengths):
        model(ids, **{"use_cache": False, **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "lengths", "reason"),
    [
        ({"attention_mask": torch.ones(1, 9, dtype=torch.int64)}, (4, 5), "an attention mask"),
        ({"use_cache": True}, (4, 5), "use_cache=True"),
        ({"new_option": 1}, (4, 5), "takes new_option"),
        ({"is_causal": False}, (4, 5), "not causal"),
        ({}, (4, 4), "9 tokens"),
        ({"attention_mask": torch.zeros(1, 1, 9, 9)}, (4, 5), "did not get the mask"),
    ],
)
def test_a_call_that_cannot_be_packed_raises(kwargs, lengths, reason):
    with pytest.raises(BaseError, match=reason):
        call(tiny("llama"), lengths, torch.cat(some_rows((4, 5)))[None], **kwargs)


def test_a_batch_of_rows_and_dropout_in_training_raise():
    ids = torch.stack(some_rows((4, 4)))
    with pytest.raises(BaseError, match="one sequence"):
        call(tiny("llama"), (4,), ids)
    dropping = partial(call, tiny("llama", attention_dropout=0.1).train(), (4,), ids[:1])
    with pytest.raises(BaseError, match="--attention padded"):
        dropping()


def test_a_layer_that_is_not_causal_raises():
    model, ids = tiny("llama"), some_rows((4,))[0][None]
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(BaseError, match="not causal"):
        call(model, (4,), ids)


def test_a_layer_whose_window_is_not_its_masks_raises():
    model, ids = tiny("mistral", **PACKED["mistral"]), some_rows((4,))[0][None]
    model.config.sliding_window = 3
    model.model.layers[1].self_attn.config = AutoConfig.for_model("mistral", sliding_window=5)
    model.model.layers[1].self_attn.config._attn_implementation = "onebase"
    with pytest.raises(BaseError, match="window is 5, its mask's 3"):
        call(model, (4,), ids)


def test_harmless_options_pass():
    call(tiny("llama"), (4, 5), torch.cat(some_rows((4, 5)))[None], is_causal=True, new_option=None)
