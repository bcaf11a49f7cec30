"""Tokens that an adapter brings along: texts added to a copy of the base's tokenizer; the base's own stays as it is."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AddedToken

from onebase.adapters.adapter import Adapter
from onebase.adapters.tokens import ID_PREFIX, is_id
from onebase.errors import BaseError, BaseMismatch, ConfigError
from onebase.models.base import Base, open_tokenizer

COPIES = 16  # of a tokenizer, with adapters' tokens, that `remembering` keeps


class Vocabulary(NamedTuple):
    """A base whose tokenizer knows every token of `trainable_tokens`: their ids, and those that it did not know."""

    base: Base
    ids: tuple[int, ...] = ()
    new: Mapping[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The ids as `trainable_tokens` holds them."""
        return [f"{ID_PREFIX}{token}" for token in self.ids]

    @property
    def lines(self) -> list[str]:
        """A line for each token: its id, its text, and whether it is new."""
        words: Any = self.base.tokenizer
        texts = {token: str(words.convert_ids_to_tokens(token)) for token in self.ids}
        return [f"{n} {text}{' (new)' if text in self.new else ''}" for n, text in texts.items()]


def resolve_tokens(base: Base, names: Sequence[str]) -> Vocabulary:
    """Look up tokens by text or `id:N`; a text that the tokenizer does not know becomes a new token.

    New tokens get the ids that transformers' `add_tokens` gives: from the tokenizer's length on, so rows that a
    padded embedding has to spare are used first. They are never split, and stay in decoded text. Raises ConfigError
    for an id that the embedding has no row for, BaseError where the base has no tokenizer.
    """
    if not names:
        return Vocabulary(base)
    if base.tokenizer is None:
        raise BaseError(f"trainable_tokens on {base.ref}", "it has no tokenizer files")
    rows = len(base.model.get_input_embeddings().weight)  # pyright: ignore[reportCallIssue, reportArgumentType]
    known = base.tokenizer.get_vocab()
    ids = {int(name.removeprefix(ID_PREFIX)) for name in names if is_id(name)}
    if beyond := sorted(token for token in ids if token >= rows):
        found = f"the base has rows 0 to {rows - 1}"
        raise ConfigError(f"trainable_tokens id:{beyond[0]}", found, hint="give a new token as its text")
    texts = [name for name in dict.fromkeys(names) if not is_id(name)]
    unknown = [text for text in texts if text not in known]
    words = _with_texts(base.tokenizer, unknown)
    new = {text: int(words.convert_tokens_to_ids(text)) for text in unknown}
    ids |= {known[text] for text in texts if text in known} | set(new.values())
    return Vocabulary(replace(base, tokenizer=words), tuple(sorted(ids)), new)


def for_adapter(base: Base, adapter: Adapter | None) -> Base:
    """The base with a tokenizer that knows the tokens which this adapter added; the base itself if it added none.

    Raises BaseMismatch where the tokenizer gives one of them another id than the adapter's training did.
    """
    tokens = adapter.origin.tokens if adapter is not None else {}
    if not tokens:
        return base
    if base.tokenizer is None:
        raise BaseError(
            f"base {base.ref}", f"it has no tokenizer, the adapter adds {', '.join(tokens)} to it"
        )
    return replace(base, tokenizer=extended(base.tokenizer, tokens))


def extended(tokenizer: Any, tokens: Mapping[str, int]) -> Any:
    """The tokenizer if it knows these tokens, else a copy that does. Raises BaseMismatch where an id differs."""
    known = tokenizer.get_vocab()
    missing = [text for text in sorted(tokens, key=lambda text: tokens[text]) if text not in known]
    words = _with_texts(tokenizer, missing)
    given = {text: int(words.convert_tokens_to_ids(text)) for text in tokens}
    if differing := [f"{text}: {given[text]}, not {n}" for text, n in tokens.items() if given[text] != n]:
        raise BaseMismatch("the adapter's added tokens", f"this tokenizer has them as {'; '.join(differing)}")
    return words


def remembering(tokenizer: Any) -> Callable[[Mapping[str, int]], Any]:
    """`extended` of this tokenizer; the last few copies are kept, since each takes long to make."""
    kept = lru_cache(COPIES)(lambda added: extended(tokenizer, dict(added)))
    return lambda tokens: kept(tuple(sorted(tokens.items()))) if tokens else tokenizer


def tokenizer_files(folder: Path, tokens: Mapping[str, int]) -> dict[str, bytes]:
    """The files, by name, of a base's tokenizer that knows these tokens; none where there is nothing to add."""
    tokenizer = open_tokenizer(folder) if tokens else None
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as made:
        extended(tokenizer, tokens).save_pretrained(made)
        return {path.name: path.read_bytes() for path in Path(made).iterdir() if path.is_file()}


def _with_texts(tokenizer: Any, texts: Sequence[str]) -> Any:
    """A copy of the tokenizer that reads each text as one token of its own."""
    if not texts:
        return tokenizer
    words = copy.deepcopy(tokenizer)
    # Not special: decoding leaves special tokens out, and an answer's <tool> is there to be read.
    words.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    for text in texts:
        if (ids := words(text, add_special_tokens=False)["input_ids"]) != [words.convert_tokens_to_ids(text)]:
            raise BaseError(f"add token {text!r}", f"this tokenizer still reads it as the ids {ids}")
    return words
