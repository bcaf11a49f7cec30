"""Retrieval by known answers: ties, several right texts, the anchor itself, and what is beyond the tenth rank."""

import pytest
import torch

from onebase.data.template import Encoded
from onebase.embedding import Search, embed, retrieval, search_of
from onebase.errors import BaseError
from onebase.storage.format import HEAD_TASK
from paired import PAIRS
from texts import text_base


def row(*texts):
    ids = [token for text in texts for token in text]
    return Encoded(1, ids, [False] * len(ids), parts=tuple(map(len, texts)))


def test_candidates_are_the_distinct_positives_and_negatives():
    found = search_of([row([1], [2], [3]), row([1], [4], [5]), row([2], [6], [3])])
    assert found.anchors == [(1,), (2,)]
    assert found.candidates == [(2,), (4,), (6,), (3,), (5,)]
    assert found.right.tolist() == [[True, True, False, False, False], [False, False, True, False, False]]
    assert found.barred.tolist() == [
        [False] * 5,
        [True, False, False, False, False],
    ]  # 2 does not find itself


def searched(scores, right, barred=None):
    count = len(scores[0])
    none = [[False] * count for _ in scores]
    search = Search(
        [(n,) for n in range(len(scores))],
        [(n,) for n in range(count)],
        *map(torch.tensor, (right, barred or none)),
    )
    found = torch.tensor(scores, dtype=torch.float64).masked_fill(search.barred, float("-inf"))
    return retrieval(search, found)


@pytest.mark.parametrize(
    ("scores", "right", "wanted"),
    [
        ([[0.9, 0.1]], [[True, False]], (1.0, 1.0)),
        ([[0.1, 0.9]], [[True, False]], (0.0, 0.5)),
        ([[0.5, 0.5]], [[True, False]], (0.0, 0.5)),  # a tie is no hit
        ([[0.1, 0.8, 0.9]], [[True, True, False]], (0.0, 0.5)),  # the best of several
        (
            [[0.9, 0.8, 0.1], [0.9, 0.8, 0.1]],
            [[True, False, False], [False, False, True]],
            (0.5, (1 + 1 / 3) / 2),
        ),
        ([[-float(n) for n in range(12)]], [[n == 9 for n in range(12)]], (0.0, 0.1)),
        ([[-float(n) for n in range(12)]], [[n == 10 for n in range(12)]], (0.0, 0.0)),
    ],
)
def test_known_ranks(scores, right, wanted):
    assert searched(scores, right) == pytest.approx(wanted)


def test_what_does_not_count_is_not_in_the_way():
    assert searched([[0.9, 0.5]], [[False, True]], [[True, False]]) == (1.0, 1.0)


def test_a_plain_base_makes_vectors():
    base = text_base()
    texts = [one["anchor"] for one in PAIRS[:5]]
    vectors = embed(base, texts, batch_size=2)
    assert vectors.shape == (5, 32)
    assert vectors.dtype == torch.float32
    assert not torch.allclose(embed(base, texts, pooling="last"), vectors)
    torch.testing.assert_close(embed(base, texts, batch_size=5), vectors, rtol=1e-5, atol=1e-5)


def test_other_adapters_make_none():
    class Adapter:
        class origin:
            embeds, task = False, HEAD_TASK

    with pytest.raises(BaseError, match="--task embed"):
        embed(text_base(), ["x"], Adapter())
