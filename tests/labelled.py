"""Rows with labels, and tiny bases that a head is put on: an encoder and a decoder with the same tokenizer."""

import torch
from transformers import AutoModel, BertConfig, DistilBertConfig, RobertaConfig, set_seed

from onebase.models.base import wrap_base
from texts import NAMES, text_base, tokenizer

# A word decides the class, so a head must reach accuracy 1.
WORDS = {"good": ("loves", "praises"), "bad": ("hates", "blames")}
ROWS = [
    {"text": f"{name} {word} {thing}.", "label": label}
    for name in NAMES
    for label, words in WORDS.items()
    for word in words
    for thing in ("tea", "the old garden bench")
]
# The number is how many times a word stands there.
NUMBERS = [
    {"text": f"{name}: {'yes ' * count}{'no ' * (3 - count)}", "label": float(count) / 2 - 0.5}
    for name in NAMES
    for count in range(4)
]

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODERS = {
    "bert": lambda **ids: BertConfig(**_SIZES, **ids, max_position_embeddings=128),
    "distilbert": lambda **ids: DistilBertConfig(
        dim=32, hidden_dim=48, n_layers=2, n_heads=4, **ids, max_position_embeddings=128
    ),
    "roberta": lambda **ids: RobertaConfig(**_SIZES, **ids, max_position_embeddings=130),
}
BASES = ("llama", *ENCODERS)


def labelled_base(name: str = "bert", pooler: bool = True):
    """A random base, float32. `pooler`: whether a BERT has the layer that its head reads through."""
    if name == "llama":
        return text_base()
    set_seed(0)
    words = tokenizer()
    config = ENCODERS[name](vocab_size=len(words), pad_token_id=words.pad_token_id)
    options = {} if pooler else {"add_pooling_layer": False}
    model = AutoModel.from_config(config, dtype=torch.float32, **options)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return wrap_base(model, words, name)
