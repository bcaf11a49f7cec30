"""Rows of texts that belong together: anchor and positive, maybe a negative, as ids; and what is wrong with them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onebase.config import DataConfig
from onebase.data.checks import Finding
from onebase.data.labels import encode_labelled
from onebase.data.read import Example
from onebase.data.template import Encoded, EncodedSet, Tokenizer

NAMES = ("anchor", "positive", "negative")
Ids = tuple[int, ...]


def texts_of(example: Example) -> tuple[str, ...]:
    """The texts of a row: anchor, positive and, where it has one, negative."""
    given = (getattr(example, name) for name in NAMES)
    return tuple(text for text in given if text is not None)


def encode_pairs(
    tokenizer: Tokenizer, examples: Sequence[Example], config: DataConfig, context: int
) -> EncodedSet:
    """The ids of every row's texts end to end, each text as the base's tokenizer makes it, special tokens included.

    The longest length is that of a text. Raises DataError for a text without tokens and, with overlong=error, for one
    that is too long; with overlong=drop its whole row goes.
    """
    texts = [Example(one.row, text=text) for one in examples for text in texts_of(one)]
    coded = encode_labelled(tokenizer, texts, None, config, context)
    dropped = set(coded.dropped)
    parts = iter(row for row in coded.rows if row.row not in dropped)
    kept = [one for one in examples if one.row not in dropped]
    rows = [_joined(one.row, list(itertools.islice(parts, len(texts_of(one))))) for one in kept]
    return EncodedSet(rows, tuple(dict.fromkeys(coded.dropped)))


def _joined(number: int, parts: Sequence[Encoded]) -> Encoded:
    ids = [token for part in parts for token in part.ids]
    lengths = tuple(len(part.ids) for part in parts)
    return Encoded(number, ids, [False] * len(ids), any(part.truncated for part in parts), parts=lengths)


def split_row(row: Encoded) -> list[Encoded]:
    """The texts of a row, each as a row; a row of one text as it is."""
    ends = list(itertools.accumulate(row.parts, initial=0))
    return [Encoded(row.row, row.ids[a:b], row.loss[a:b]) for a, b in itertools.pairwise(ends)] or [row]


def columns(rows: Sequence[Encoded]) -> list[list[Ids]]:
    """The rows' anchors, their positives and, where they have some, their negatives, as ids."""
    return [list(column) for column in zip(*(_texts(row) for row in rows), strict=True)]


def _texts(row: Encoded) -> list[Ids]:
    return [tuple(part.ids) for part in split_row(row)]


def partners(rows: Sequence[Encoded]) -> dict[Ids, set[Ids]]:
    """Each text that is an anchor or a positive -> all that these rows pair it with, whichever way round."""
    found: dict[Ids, set[Ids]] = {}
    for row in rows:
        anchor, positive, *_ = _texts(row)
        found.setdefault(anchor, set()).add(positive)
        found.setdefault(positive, set()).add(anchor)
    return found


def false_negatives(rows: Sequence[Encoded]) -> Tensor:
    """(N, C) bool: which candidate is no negative of which anchor. Candidates: all positives, then all negatives.

    A candidate with the text of the anchor, or of anything that a row of the batch pairs the anchor with, is as right
    as the row's own positive (which stands on the diagonal, and is not marked).
    """
    anchors, *others = columns(rows)
    known, candidates = partners(rows), list(itertools.chain(*others))
    marked = [[text == anchor or text in known[anchor] for text in candidates] for anchor in anchors]
    return torch.tensor(marked).fill_diagonal_(False)


def check_pairs(encoded: EncodedSet, special: Sequence[int]) -> list[Finding]:
    """The gates that fail on these rows: texts without a token of their own, texts that say nothing."""
    texts = {row.row: _texts(row) for row in encoded.rows}
    empty = [row for row, parts in texts.items() if any(set(part) <= set(special) for part in parts)]
    same = [row for row, parts in texts.items() if len(set(parts)) < len(parts)]
    failed = {
        "empty-text": (empty, "a text of the row is empty, or unknown to the base's tokenizer"),
        "same-text": (same, "two texts of the row are the same tokens"),
    }
    return [Finding(gate, tuple(rows), message) for gate, (rows, message) in failed.items() if rows]


def describe_pairs(encoded: EncodedSet) -> Mapping[str, int]:
    """How many pairs or triplets there are, of how many texts, and how many of these stand in several rows."""
    counts = Counter(text for row in encoded.rows for text in set(_texts(row)))
    kind = "triplets" if any(len(row.parts) > 2 for row in encoded.rows) else "pairs"
    return {
        kind: len(encoded.rows),
        "different texts": len(counts),
        "texts in several rows": sum(count > 1 for count in counts.values()),
    }
