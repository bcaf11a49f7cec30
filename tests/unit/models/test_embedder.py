"""What a sentence-transformers folder states is what is computed, and padding never enters a vector."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from labelled import labelled_base
from onebase.data.template import Encoded
from onebase.errors import BaseError, FormatError
from onebase.models.embedder import POOLS, Embedder, pool, stated
from onebase.models.loss import contrastive_loss, pair_loss, text_vectors
from texts import text_base

# all-MiniLM-L6-v2's own files.
KINDS = ("Transformer", "Pooling", "Normalize")
MODES = {
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
}


def folder(path, kinds=KINDS, pooling=MODES, longest=256):
    (path / "1_Pooling").mkdir(parents=True)
    places = {"Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {
            "idx": n,
            "name": str(n),
            "path": places.get(kind, ""),
            "type": f"sentence_transformers.models.{kind}",
        }
        for n, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 384, **pooling}))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
    return path


def test_the_files_of_minilm(tmp_path):
    assert stated(folder(tmp_path / "a")) == Embedder("mean", True, 20.0, 256)


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, "max"),
        ({"pooling_mode_lasttoken": True}, "last"),
    ],
)
def test_either_form_of_the_file_names_one_pooling(pooling, mode, tmp_path):
    assert stated(folder(tmp_path / "a", KINDS[:2], pooling, 0)) == Embedder(mode, False, 20.0, 0)


def test_a_folder_that_states_nothing_takes_the_mean(tmp_path):
    assert stated(tmp_path) == stated(None) == Embedder("mean", False, 20.0, 0)
    assert stated(tmp_path, "cls", 5.0) == Embedder("cls", False, 5.0, 0)


@pytest.mark.parametrize(
    ("kinds", "pooling", "told"),
    [
        ((*KINDS, "Dense"), MODES, "Dense, which onebase does not compute"),
        (KINDS, {**MODES, "pooling_mode_cls_token": True}, "cls_token and pooling_mode_mean_tokens"),
        (KINDS, {"pooling_mode": "weightedmean"}, "weightedmean, which"),
    ],
)
def test_what_is_not_computed_is_refused_unless_a_pooling_is_named(kinds, pooling, told, tmp_path):
    place = folder(tmp_path / "a", kinds, pooling)
    with pytest.raises(BaseError, match=told):
        stated(place)
    assert stated(place, "mean") == Embedder("mean", True, 20.0, 256)


def test_a_file_that_is_named_and_not_there_is_missed(tmp_path):
    place = folder(tmp_path / "a")
    (place / "1_Pooling" / "config.json").unlink()
    with pytest.raises(BaseError, match=r"1_Pooling/config\.json, which is not there"):
        stated(place)


def test_a_description_survives_json():
    one = Embedder("last", True, 7.5, 99)
    assert Embedder.from_dict(json.loads(json.dumps(one.as_dict()))) == one
    for broken in ({"task": "embed"}, one.as_dict() | {"pooling": "sum"}, one.as_dict() | {"normalize": 1}):
        with pytest.raises(FormatError, match="does not say how a text becomes a vector"):
            Embedder.from_dict(broken)


def test_each_pooling_takes_real_tokens_alone():
    states = torch.tensor([[[1.0, 8.0], [3.0, 2.0], [99.0, 99.0]], [[1.0, 1.0], [2.0, 2.0], [6.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    wanted = {
        "mean": [[2.0, 5.0], [3.0, 1.0]],
        "cls": [[1.0, 8.0], [1.0, 1.0]],
        "last": [[3.0, 2.0], [6.0, 0.0]],
        "max": [[3.0, 8.0], [6.0, 2.0]],
    }
    for name in POOLS:
        assert pool(states, mask, Embedder(name)).tolist() == wanted[name], name
    assert torch.allclose(pool(states, mask, Embedder("mean", True)).norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("pooling", POOLS)
def test_a_vector_does_not_depend_on_its_batch(name, pooling):
    base = (text_base() if name == "llama" else labelled_base(name)).with_embedder(Embedder(pooling))
    texts = [[5, 6, 7], [9] * 11, [8, 30], [40, 41, 42, 43, 44]]
    with torch.no_grad():
        together = text_vectors(base.model, texts, base.embedder, base.pad_id, 4)
        alone = torch.cat([text_vectors(base.model, [text], base.embedder, base.pad_id, 1) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.shape == (4, 32)


def naive(vectors, excluded, scale):
    """The loss anchor by anchor, from its definition, in float64."""
    count, total = len(excluded), 0.0
    for i in range(count):
        cosines = [F.cosine_similarity(vectors[i].double(), v.double(), dim=0) for v in vectors[count:]]
        kept = [scale * c for j, c in enumerate(cosines) if not excluded[i][j]]
        total += torch.logsumexp(torch.stack(kept), 0) - scale * cosines[i]
    return total


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.booleans(), st.integers(0, 2**31), st.sampled_from([1.0, 20.0]))
def test_the_loss_is_its_definition(count, triplets, seed, scale):
    draw = torch.Generator().manual_seed(seed)
    candidates = count * (2 if triplets else 1)
    vectors = torch.randn(count + candidates, 5, generator=draw)
    excluded = (torch.rand(count, candidates, generator=draw) < 0.3).fill_diagonal_(False)
    found = contrastive_loss(vectors, excluded, scale)
    torch.testing.assert_close(found.double(), naive(vectors, excluded, scale), rtol=1e-4, atol=1e-4)


def test_a_false_negative_moves_nothing():
    """Two rows with the same positive: each is judged as if the other were not there."""
    base = labelled_base().with_embedder(Embedder())

    def loss(*rows):
        made = [
            Encoded(n, [*a, *p], [False] * len([*a, *p]), parts=(len(a), len(p)))
            for n, (a, p) in enumerate(rows)
        ]
        with torch.no_grad():
            return float(pair_loss(base.model, made, base.embedder, base.pad_id))

    assert loss(([5, 6], [7, 8]), ([9, 10], [7, 8])) == pytest.approx(0.0, abs=1e-6)
    assert loss(([5, 6], [7, 8]), ([9, 10], [7, 9])) > 1e-3
