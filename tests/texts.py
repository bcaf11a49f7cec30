"""A tiny base that reads text: a byte-level BPE tokenizer with a ChatML template, and a random Llama for it."""

import json
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

from onebase.models.base import wrap_base

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo")
THINGS = ("a kettle", "two warm coats", "the old garden bench")

# 27 rows of different lengths, with all three things in each of the orders that a split may give.
QUESTIONS = [
    {"prompt": f"What has {name} bought?", "completion": f"{name} has bought {thing}."}
    for thing in THINGS
    for name in NAMES
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }
    for row in QUESTIONS
]
TEXTS = [{"text": f"{row['prompt']} {row['completion']}"} for row in QUESTIONS]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text has ids; <|im_end|> ends texts and turns."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text for row in QUESTIONS for text in row.values()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>", pad_token="</s>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    return fast


def text_model(seed: int = 0, **config):
    """A random Llama with the tokenizer's vocabulary, 128 positions, float32."""
    set_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    words = tokenizer()
    ids = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {"vocab_size": len(words), "max_position_embeddings": 128, **sizes, **heads, **ids, **config}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model


def text_base(seed: int = 0, **config):
    """The tiny model and its tokenizer as a Base."""
    return wrap_base(text_model(seed, **config), tokenizer(), "tiny")


def save_base(folder, seed: int = 0):
    """The tiny base as a model folder, as users have them; returns the folder."""
    text_model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_rows(path, rows):
    """Rows as JSONL; returns the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
