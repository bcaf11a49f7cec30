"""Vectors of texts, with an adapter or without, and how well they find what belongs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import injected
from onebase.config import DataConfig
from onebase.data.pairs import Ids, columns, encode_pairs, partners
from onebase.data.read import Example
from onebase.data.template import Encoded, EncodedSet
from onebase.errors import BaseError, ConfigError
from onebase.models.base import Base
from onebase.models.embedder import stated
from onebase.models.loss import text_vectors
from onebase.models.vocabulary import for_adapter
from onebase.prediction import encode_rows, read_as_trained, reading
from onebase.tasks import EMBED

RANKS = 10  # MRR looks at so many


class Retrieval(NamedTuple):
    """How well anchors find their positives among all texts that they could be (see `retrieval`). Fractions."""

    accuracy_at_1: float
    mrr_at_10: float


def embed(
    base: Base, texts: Sequence[str], adapter: Adapter | None = None, batch_size: int = 16, **options: Any
) -> Tensor:
    """The vector of each text, (texts, width) in float32, by the adapter; None: by the plain base.

    `options`: max_length and overlong as in DataConfig, and for the plain base pooling; an adapter has its own.
    Raises BaseError for an adapter that makes no vectors, DataError for a text without tokens or one that is too long.
    """
    base = with_its_embedder(base, adapter, options.pop("pooling", ""))
    config = longest_of(base, read_as_trained(adapter, {"task": EMBED, **options}))
    examples = [Example(row, text=text) for row, text in enumerate(texts, 1)]
    rows = encode_rows(base, examples, None, config).rows
    with injected(base.model, adapter, "embed"):
        return vectors_of(base, [row.ids for row in rows], batch_size)


def with_its_embedder(base: Base, adapter: Adapter | None, pooling: str = "") -> Base:
    """The base as the adapter was trained on it; a plain one as its folder states, or with this pooling.

    Raises BaseError for an adapter that makes no vectors, ConfigError for a pooling that is not the adapter's.
    """
    if adapter is not None and not adapter.origin.embeds:
        hint = "train one with --task embed; for labels there is onebase predict, for text onebase generate"
        raise BaseError("a vector for a text", "the adapter makes none", hint=hint)
    if adapter is None:
        return base.with_embedder(stated(base.folder, pooling))
    base = for_adapter(base.for_adapter(adapter), adapter)
    own = base.embedder.pooling if base.embedder else ""
    if pooling not in ("", own):
        raise ConfigError(f"option pooling={pooling}", f"the adapter was trained with {own}")
    return base


def longest_of(base: Base, config: DataConfig) -> DataConfig:
    """The config with the longest text that the base's own files state, where nothing else was asked for."""
    told = base.embedder.longest if base.embedder else 0
    limit = min(told, base.context) if told else 0
    return replace(config, max_length=config.max_length or limit)


def encode_texts(base: Base, examples: Sequence[Example], config: DataConfig) -> EncodedSet:
    """The rows' texts as ids. Raises BaseError without a tokenizer, and what `encode_pairs` does."""
    return encode_pairs(reading(base), examples, longest_of(base, config), base.context)


def vectors_of(base: Base, texts: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """The vectors of texts as ids by the adapter that is chosen on the base, on the CPU."""
    assert base.embedder is not None
    with torch.no_grad():
        return text_vectors(base.model, texts, base.embedder, base.pad_id, batch_size).cpu()


class Search(NamedTuple):
    """What each anchor may find: distinct anchors and candidates as ids; (A, C) which are right, which do not count."""

    anchors: list[Ids]
    candidates: list[Ids]
    right: Tensor
    barred: Tensor


def search_of(rows: Sequence[Encoded]) -> Search:
    """Distinct anchors look among the rows' distinct positives and negatives.

    Right is every text that some row pairs the anchor with. The anchor's own text is no candidate for it, unless a
    row says that it is right.
    """
    parts, known = columns(rows), partners(rows)
    anchors = list(dict.fromkeys(parts[0]))
    candidates = list(dict.fromkeys(text for column in parts[1:] for text in column))
    right = torch.tensor([[text in known[anchor] for text in candidates] for anchor in anchors])
    same = torch.tensor([[text == anchor for text in candidates] for anchor in anchors])
    return Search(anchors, candidates, right, same & ~right)


def similarities(base: Base, search: Search, batch_size: int) -> Tensor:
    """(A, C) cosine similarities in float64, -inf for candidates that do not count."""
    vectors = vectors_of(base, [*search.anchors, *search.candidates], batch_size)
    unit = F.normalize(vectors.double(), dim=-1)
    found = unit[: len(search.anchors)] @ unit[len(search.anchors) :].T
    return found.masked_fill(search.barred, float("-inf"))


def retrieval(search: Search, found: Tensor) -> Retrieval:
    """Accuracy@1: anchors whose likest candidate is right. MRR@10: mean of 1/rank of the first right one, 0 beyond 10.

    As in sentence-transformers' InformationRetrievalEvaluator; among candidates that are equally like, wrong ones
    come first.
    """
    best = found.masked_fill(~search.right, float("-inf")).amax(1, keepdim=True)
    ranks = 1 + ((found >= best) & ~search.right & ~search.barred).sum(1)
    gains = torch.where(ranks <= RANKS, 1.0 / ranks, 0.0)
    return Retrieval(float((ranks == 1).double().mean()), float(gains.mean()))
