"""The gate of serving's speed claims: in one mixed batch every adapter's greedy tokens are PEFT's."""

import pytest
import torch
from peft import PeftModel

from decoders import DECODERS, decoder
from onebase.models.base import wrap_base
from onebase.serve.request import Request
from serving import adapter_folder, make_engine, prompts

TOKENS = 12
OPTIONS = {
    "lora": {},
    "rslora": {"rslora": True},
    "some modules": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "patterns": {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 5.0}},
    "dora": {"dora": True},  # the slow way
    "head": {"modules_to_save": ["lm_head"]},
    "bias": {"lora_bias": True, "target_modules": ["q_proj"]},
}


def peft_tokens(model, folder, name, asked):
    """Greedy tokens for each prompt, one at a time, by PEFT and transformers' `generate`."""
    wrapped = model if name is None else PeftModel.from_pretrained(model, folder / name)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        rows = [wrapped.generate(input_ids=torch.tensor([prompt]), **options) for prompt in asked]
    if name is not None:
        wrapped.unload()
    return [tuple(row[0, len(prompt) :].tolist()) for row, prompt in zip(rows, asked, strict=True)]


def check(model_name, folder, **options):
    base = wrap_base(decoder(model_name))
    base.model.generation_config.eos_token_id = None
    made = adapter_folder(folder, base, **options)
    asked = prompts(2 * len(made))
    names = [*made, *made]
    engine = make_engine(base, folder, slots=5)
    assert not engine.slow
    requests = [
        Request(str(n), prompt, name, max_tokens=TOKENS)
        for n, (name, prompt) in enumerate(zip(names, asked, strict=True))
    ]
    answers = engine.generate(requests)
    for name in made:
        own = [n for n, one in enumerate(names) if one == name]
        wanted = peft_tokens(base.model, folder, name, [asked[n] for n in own])
        assert [answers[n].tokens for n in own] == wanted, name
    return engine


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "cohere2", "qwen3"])
def test_a_mixed_batch_says_what_peft_says(name, tmp_path):
    assert name in DECODERS
    check(name, tmp_path)


@pytest.mark.parametrize("variant", OPTIONS)
def test_every_variant_says_what_peft_says(variant, tmp_path):
    model = "llama" if variant == "bias" else "qwen3"
    check(model, tmp_path, **OPTIONS[variant])
