"""Token by token back to bytes, whatever way a tokenizer writes them; prompts with tokens that adapters added."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onebase.adapters.adapter import Origin
from onebase.errors import BaseError, ConfigError
from onebase.serve.prompts import Prompts
from texts import text_base

TEXT = "Ada kauft ein Stück Käse für 3 €, 日本 🎉\n"


def pieces_to_bytes():
    """A base whose tokenizer writes spaces as SentencePiece does, and unknown characters byte by byte."""
    letters = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2581",
        *"Adakuftein",
        "\u00fc",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys(letters))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    return replace(text_base(), tokenizer=words)


@pytest.mark.parametrize("make", [text_base, pieces_to_bytes])
def test_the_bytes_of_a_texts_tokens_are_the_texts(make):
    prompts = Prompts(make())
    ids = prompts.text([], TEXT)
    assert b"".join(prompts.piece([], token) for token in ids) == TEXT.encode()
    assert len(ids) > len(TEXT)  # some characters took several


def test_special_tokens_show_as_they_are_written():
    base = text_base()
    assert Prompts(base).piece([], base.tokenizer.eos_token_id) == b"<|im_end|>"


def test_tokens_that_an_adapter_added_are_its_own():
    base = text_base()
    new = len(base.tokenizer)
    origin, prompts = Origin(tokens={"<tool>": new}), Prompts(base)
    assert prompts.text([origin], "Ada<tool>") == [*prompts.text([], "Ada"), new]
    assert prompts.piece([origin], new) == b"<tool>"
    assert new not in prompts.text([], "Ada<tool>")
    said = [{"role": "user", "content": "<tool>"}]
    assert new in prompts.chat([origin], said)
    assert new not in prompts.chat([], said)


def test_formats_that_are_recorded_must_agree():
    chat, plain = (Origin(prompt={"chat": way, "system": "", "separator": ""}) for way in (True, False))
    prompts = Prompts(text_base())
    assert prompts.form([Origin(), plain]).chat is False
    assert prompts.form([Origin()]).chat is True  # the base's own
    with pytest.raises(ConfigError, match="different prompt formats"):
        prompts.text([chat, plain], "a")


def test_a_base_without_words_is_not_served():
    with pytest.raises(BaseError, match="no tokenizer"):
        Prompts(replace(text_base(), tokenizer=None))
