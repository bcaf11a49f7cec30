"""Which places of a model can carry an update, and what their merged weight is."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from onebase.adapters.adapter import LowRank
from onebase.adapters.kinds import KINDS, Site, find_site, kind_of, merged_weight, why_not
from tiny import tiny


def modules(**children):
    return dict(nn.ModuleDict(children).named_modules())


def site(path, **children):
    return find_site(modules(**children), path)


def test_the_kind_of_a_module_and_its_shape():
    found = {
        "linear": (nn.Linear(3, 5), (3, 5)),
        "transposed": (Conv1D(5, 3), (3, 5)),
        "embedding": (nn.Embedding(7, 4), (7, 4)),
        "conv": (nn.Conv2d(3, 5, (2, 4)), (3 * 2 * 4, 5)),
    }
    for kind, (module, shape) in found.items():
        assert kind_of(module) == kind
        assert KINDS[kind].shape(module) == shape
        assert site("x", x=module) == Site("x", "weight", kind, shape, 1, (2, 4) if kind == "conv" else ())
    assert [
        kind_of(m) for m in (nn.LayerNorm(3), nn.MultiheadAttention(4, 2), nn.ConvTranspose1d(1, 1, 1))
    ] == [None] * 3


def test_a_convolution_in_groups_carries_none_and_says_why():
    assert site("x", x=nn.Conv1d(4, 4, 3, groups=2)) is None
    assert why_not(nn.Conv1d(4, 4, 3, groups=2)) == (
        "a Conv1d of 2 groups, which has no single W that B·A could be added to"
    )
    assert why_not(nn.LayerNorm(3)).startswith("a LayerNorm, which carries no update")


def test_attention_is_adapted_through_the_weights_that_it_reads():
    whole, apart = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    assert site("m.in_proj_weight", m=whole) == Site("m", "in_proj_weight", "parameter", (8, 24))
    assert site("m.out_proj.weight", m=whole) == Site("m", "out_proj.weight", "parameter", (8, 8))
    assert (
        site("m.out_proj", m=whole) is None
    )  # never called: an update on it would be silently without effect
    assert site("m.k_proj_weight", m=apart) == Site("m", "k_proj_weight", "parameter", (6, 8))
    assert site("m", m=whole) is None
    assert site("m.in_proj_bias", m=whole) is None


def test_experts_have_blocks_and_may_be_stored_either_way():
    mixtral = dict(tiny("mixtral").named_modules())
    path = "model.layers.0.mlp.experts.gate_up_proj"
    assert find_site(mixtral, path) == Site(path.rpartition(".")[0], "gate_up_proj", "parameter", (32, 96), 4)
    turned = find_site(dict(tiny("gpt-oss").named_modules()), path)
    assert (turned.kind, turned.shape, turned.blocks) == ("parameter_transposed", (32, 96), 4)
    assert turned.tensor == path


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5)])
def test_a_parameter_that_is_no_matrix_carries_none(shape):
    inner = nn.Module()
    inner.p = nn.Parameter(torch.zeros(shape))
    assert site("inner.p", inner=inner) is None
    assert site("inner.q", inner=inner) is None
    assert site("nowhere.p", inner=inner) is None


def test_a_parameter_of_the_model_itself_has_nothing_around_it():
    model = nn.Module()
    model.p = nn.Parameter(torch.zeros(2, 3))
    assert find_site(dict(model.named_modules()), "p") is None


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_merged_weights_of_experts_are_those_of_each_expert():
    a, b, w = random(3 * 2, 5), random(3 * 4, 2), random(3, 4, 5)
    expected = torch.stack([w[e] + 0.5 * b[4 * e : 4 * e + 4] @ a[2 * e : 2 * e + 2] for e in range(3)])
    torch.testing.assert_close(merged_weight(w, LowRank(a, b, 0.5, "parameter", 3)), expected)
    turned = merged_weight(w.mT.contiguous(), LowRank(a, b, 0.5, "parameter_transposed", 3))
    torch.testing.assert_close(turned, expected.mT)


def test_merged_weights_of_a_convolution_are_those_of_the_matrix_over_channels_and_positions():
    a, b, w = random(2, 3 * 4), random(5, 2), random(5, 3, 2, 2)
    low = LowRank(a, b, 2.0, "conv", kernel=(2, 2))
    torch.testing.assert_close(merged_weight(w, low), w + 2.0 * (b @ a).reshape(5, 3, 2, 2))
    x = random(1, 3, 6, 6)
    layer = nn.Conv2d(3, 5, 2, bias=False)
    delta = KINDS["conv"].product(layer, x, low)
    torch.testing.assert_close(delta, nn.functional.conv2d(x, 2.0 * (b @ a).reshape(5, 3, 2, 2)))


def test_a_magnitude_gives_the_rows_their_norms():
    a, b, w, norms = random(2, 5), random(4, 2), random(4, 5), torch.tensor([1.0, 2.0, 0.5, 3.0])
    merged = merged_weight(w, LowRank(a, b, 1.0, magnitude=norms))
    torch.testing.assert_close(merged.norm(dim=1), norms)
    torch.testing.assert_close(nn.functional.normalize(merged), nn.functional.normalize(w + b @ a))
    turned = merged_weight(w.T.contiguous(), LowRank(a, b, 1.0, "transposed", magnitude=norms))
    torch.testing.assert_close(turned, merged.T)
