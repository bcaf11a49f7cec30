"""Tiny real tokenizers: byte-level BPE, SentencePiece-like with a BOS, and chat templates good and bad."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Is it true? yes, it is. no, it is not.",
    "name: Blue Spice | area: riverside\nThe Blue Spice is by the river.",
    "user assistant system answer question prompt completion",
    "A: yes\nB: no\n",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Keeps only the last two messages, as templates do that strip old reasoning: no prefix property.
FORGETFUL = CHATML.replace("for m in messages", "for m in messages[-2:]")
TAGGED = (
    "{% for m in messages[-2:] %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


def _fast(tokenizer: Tokenizer, template: str | None = None) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = template
    return fast


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def gpt() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a BOS of its own, without a chat template."""
    return _fast(byte_level())


@pytest.fixture(scope="session")
def spaced() -> PreTrainedTokenizerFast:
    """SentencePiece-like: a space before every text, and <s> put in front by the post-processor."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return _fast(tokenizer)


def _with_template(template: str) -> PreTrainedTokenizerFast:
    return _fast(byte_level(), template)


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return _with_template(CHATML)


@pytest.fixture(scope="session")
def bos_chat() -> PreTrainedTokenizerFast:
    """A template that writes <s> itself, on a tokenizer that would add it too."""
    tokenizer = byte_level()
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return _fast(tokenizer, "{{ bos_token }}" + CHATML)


@pytest.fixture(scope="session")
def forgetful() -> PreTrainedTokenizerFast:
    return _with_template(FORGETFUL)


@pytest.fixture(scope="session")
def tagged() -> PreTrainedTokenizerFast:
    return _with_template(TAGGED)


@pytest.fixture(scope="session")
def strict() -> PreTrainedTokenizerFast:
    return _with_template(STRICT)
