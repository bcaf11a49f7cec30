"""The quick setting's base: a random Llama of a few thousand weights that reads bytes."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

from onebase.models.base import Base, wrap_base

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    unk, bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    )


def tiny_base(dtype: str) -> Base:
    """The same weights at every call."""
    words = tokenizer()
    shape = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        set_seed(0)
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype))
    return wrap_base(model, words, "tiny")
