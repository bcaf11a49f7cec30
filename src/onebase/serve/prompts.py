"""What is asked, as token ids: chats in the format that the adapter was trained with, completions as raw text."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from onebase.adapters.adapter import Origin
from onebase.data.read import Message
from onebase.data.template import PromptFormat, render_messages, render_prompt
from onebase.errors import BaseError, ConfigError
from onebase.models.base import Base
from onebase.models.generation import format_of
from onebase.models.vocabulary import remembering

PIECES = 1 << 16  # tokens whose bytes are kept
Added = tuple[tuple[str, int], ...]


class Prompts:
    """Renders prompts for one base. Its methods may be called from any thread; one at a time works.

    Raises BaseError for a base without a tokenizer.
    """

    def __init__(self, base: Base) -> None:
        if base.tokenizer is None:
            raise BaseError(f"serve {base.ref}", "it has no tokenizer")
        self._base = base
        self._lock = threading.Lock()  # tokenizers do not say that several threads may use them
        self._extended = remembering(base.tokenizer)
        self._pieces = lru_cache(PIECES)(self._piece)
        self._by_bytes = GDOT in base.tokenizer.get_vocab()

    def chat(self, origins: Sequence[Origin], messages: Sequence[Message]) -> list[int]:
        """The ids from which the next answer starts. Without a chat format the last message alone is the prompt.

        `origins`: of the adapters that answer, none for the plain base. Raises ConfigError where they were trained with
        different formats, DataError where the base's chat template refuses the messages or is missing.
        """
        with self._lock:
            words, form = self._words(origins), self.form(origins)
            if form.chat:
                return render_messages(words, messages, form)
            return render_prompt(words, messages[-1]["content"], form)

    def text(self, origins: Sequence[Origin], text: str) -> list[int]:
        """A raw text's ids, behind a beginning-of-text token where this tokenizer puts one. Raises as `form`."""
        self.form(origins)
        with self._lock:
            return render_prompt(self._words(origins), text, PromptFormat())

    def piece(self, origins: Sequence[Origin], token: int) -> bytes:
        """What one token stands for, in UTF-8; part of a character where the tokenizer splits one."""
        return self._pieces(_added(origins), token)

    def form(self, origins: Sequence[Origin]) -> PromptFormat:
        """The format in which those who answer are asked: one that is recorded, else the base's own.

        Raises ConfigError where the adapters record different ones: no sum of such is served.
        """
        forms = {PromptFormat.from_dict(one.prompt) for one in origins if one.prompt}
        if len(forms) > 1:
            raise ConfigError("this mixture", "its adapters were trained with different prompt formats")
        return next(iter(forms), None) or format_of(self._base, None)

    def _words(self, origins: Sequence[Origin]) -> Any:
        return self._extended(dict(_added(origins)))

    def _piece(self, added: Added, token: int) -> bytes:
        words = self._extended(dict(added))
        piece = str(words.convert_ids_to_tokens(token) or "")
        if token in words.added_tokens_decoder:
            return piece.encode()
        if len(piece) == 6 and piece.startswith("<0x"):  # a byte that SentencePiece has no piece for
            return bytes.fromhex(piece[3:5])
        if self._by_bytes:
            return bytes(LETTERS[letter] for letter in piece if letter in LETTERS)
        return piece.replace(SPACE, " ").encode()


def _added(origins: Sequence[Origin]) -> Added:
    """The tokens that these adapters added, the same for the same."""
    return tuple(sorted({text: token for one in origins for text, token in one.tokens.items()}.items()))


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: printable ones themselves, others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


LETTERS = _byte_letters()
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's
GDOT = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # a space, where tokenizers are byte-level
