"""The kernels in C against their torch twins and float64: as exact, in odd shapes, and the same bits on any threads."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoders import adapted, decoder, gradients, some_layout
from forests import forests, size
from onebase.models.engine import Engine
from onebase.ops import adapted as updates
from onebase.ops import cross_entropy, gates, kernels, norms, prefix, rotary
from onebase.ops.adapted import Share
from onebase.ops.cross_entropy import Head
from onebase.ops.gates import Halves
from onebase.ops.lowrank import Factors
from onebase.ops.norms import Norm
from onebase.ops.prefix import Forest, Heads, Scoring, blocks, forest
from onebase.ops.reference import prefix_attention_reference, visible_in_tree
from onebase.ops.rotary import Rotation
from pairs import draw

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2}  # of the largest value, beside the twin's own error
TOKENS, WIDTHS = (1, 33), (123, 252, 507)

pytestmark = pytest.mark.skipif(
    isinstance(kernels.library(torch.float32), str),
    reason=f"no kernels here: {kernels.library(torch.float32)}",
)


def numbers(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (scale * draw(*shape, seed=seed)).detach().to(dtype)


def as_exact(fast, plain, truth, dtype):
    """The kernel's error against float64 is at most its twin's and a small part of the largest value."""
    errors = [float((found.double() - truth).abs().max()) for found in (fast, plain)]
    assert errors[0] <= errors[1] + TOLERANCE[dtype] * max(float(truth.abs().max()), 0.2)


def strided(x):
    """The same numbers with gaps between the rows."""
    wide = torch.full((len(x), x[0].numel() + 5), torch.nan, dtype=x.dtype)
    wide[:, : x[0].numel()] = x.flatten(1)
    return wide[:, : x[0].numel()].view(x.shape)


@pytest.fixture
def used(monkeypatch):
    """The names of the kernels that ran."""
    names, call = [], kernels.call

    def watched(name, *arguments):
        names.append(name)
        call(name, *arguments)

    monkeypatch.setattr(kernels, "call", watched)
    return names


def wide(*tensors):
    return tuple(t.double() for t in tensors)


@pytest.mark.parametrize(("tokens", "width", "dtype"), list(product(TOKENS, WIDTHS, DTYPES)))
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("heads", [None, 1, 3])
def test_norms(tokens, width, dtype, centred, heads, used):
    shape = (tokens, width) if heads is None else (tokens, 3, width)
    weight = numbers(*((3, width) if heads == 3 else (width,)), seed=1)
    x, dy, more = (numbers(*shape, seed=seed, dtype=dtype, scale=3) for seed in range(3))
    spec, exact = Norm(weight, 1e-5, centred), Norm(weight.double(), 1e-5, centred)
    fast = norms.norm(strided(x), spec)
    as_exact(fast, norms.norm.__wrapped__(x, spec), norms.norm(x.double(), exact), dtype)
    back = norms.norm_backward(strided(dy), strided(x), spec, strided(more))
    plain = norms.norm_backward.__wrapped__(dy, x, spec, more)
    as_exact(back, plain, norms.norm_backward(*wide(dy, x), exact, more.double()), dtype)
    assert used == ["norm", "norm_backward"]
    assert fast.dtype == back.dtype == dtype


@pytest.mark.parametrize(("tokens", "pairs", "dtype"), list(product(TOKENS, (1, 13, 32), DTYPES)))
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(tokens, pairs, dtype, interleaved, used):
    angles = torch.arange(tokens)[:, None] * torch.linspace(1, 0.1, pairs)
    spec = Rotation(angles.cos().to(dtype), angles.sin().to(dtype), interleaved)
    x = numbers(tokens, 2, 3, 2 * pairs + 3, dtype=dtype)
    truth = rotary.rotate_(x.double(), Rotation(*wide(*spec[:2]), interleaved))
    as_exact(rotary.rotate_(strided(x), spec), rotary.rotate_.__wrapped__(x.clone(), spec), truth, dtype)
    assert used == ["rotate"]


@pytest.mark.parametrize(("tokens", "width", "dtype"), list(product(TOKENS, WIDTHS, DTYPES)))
@pytest.mark.parametrize("activation", kernels.GATES)
def test_gates(tokens, width, dtype, activation, used):
    x = Halves(numbers(tokens, width, dtype=dtype, scale=4), numbers(tokens, width, seed=1, dtype=dtype))
    x.gate[0, :4] = torch.tensor([-1e4, 1e4, -90, 0])
    dz, exact = numbers(tokens, width, seed=2, dtype=dtype), Halves(*wide(*x))
    gaps = Halves(*map(strided, x))
    as_exact(
        gates.gated(gaps, activation),
        gates.gated.__wrapped__(x, activation),
        gates.gated(exact, activation),
        dtype,
    )
    fast, plain, truth = (Halves(*map(torch.empty_like, halves)) for halves in (x, x, exact))
    gates.gated_backward(strided(dz), gaps, activation, Halves(*map(strided, fast)))
    gates.gated_backward(dz.clone(), gaps, activation, fast)
    gates.gated_backward.__wrapped__(dz.clone(), x, activation, plain)
    gates.gated_backward(dz.double(), exact, activation, truth)
    for one, other, expected in zip(fast, plain, truth, strict=True):
        as_exact(one, other, expected, dtype)
    assert used == ["gate", "gate_backward", "gate_backward"]


def test_the_exact_gelu_stays_torchs(used):
    x = Halves(numbers(3, 5), numbers(3, 5, seed=1))
    assert torch.equal(gates.gated(x, "gelu"), torch.nn.functional.gelu(x.gate) * x.up)
    assert used == []


@pytest.mark.parametrize(("rows", "vocabulary", "dtype"), list(product((1, 5), (123, 507, 4099), DTYPES)))
@pytest.mark.parametrize("head", [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.7, "softcap": 0.9}])
def test_cross_entropy(rows, vocabulary, dtype, head, used):
    spec = Head(torch.empty(0), **head)
    y = numbers(rows, vocabulary, dtype=dtype, scale=3)
    edges = torch.arange(rows + 1) * 3
    ids = torch.randint(vocabulary, (3 * rows,), generator=torch.Generator().manual_seed(0))
    ids[1] = ids[0]
    targets = cross_entropy.Targets(edges, ids)
    loss, fast = cross_entropy._losses(strided(y), targets, spec, True)
    other, plain = cross_entropy._losses.__wrapped__(y.clone(), targets, spec, True)
    exact, truth = cross_entropy._losses(y.double(), targets, spec, True)
    as_exact(loss, other, exact, torch.float32)
    as_exact(fast, plain, truth, dtype)
    assert used == ["cross_entropy"]
    loss, nothing = cross_entropy._losses(y, targets, spec, False)
    assert nothing is None
    as_exact(loss, other, exact, torch.float32)


def low(width, out, rank, seed):
    return Factors(numbers(rank, width, seed=seed), numbers(out, rank, seed=seed + 1), 0.5 + seed)


@pytest.mark.parametrize(("tokens", "width", "dtype"), list(product((1, 50, 123), WIDTHS, DTYPES)))
@pytest.mark.parametrize("ranks", [(8,), (1, 0, 20), (3, 16, 5)])
def test_low_rank_updates(tokens, width, dtype, ranks, used):
    outs = [70, 33, 507][: len(ranks)]
    lows = [
        low(width, out, rank, 2 * n) if rank else None
        for n, (out, rank) in enumerate(zip(outs, ranks, strict=True))
    ]
    exact = [one and Factors(one.A.double(), one.B.double(), one.scale) for one in lows]
    share, x = Share(0, tokens, lows), numbers(tokens, width, dtype=dtype, scale=0.1)
    dy = [numbers(tokens, out, seed=7, dtype=dtype, scale=0.1) for out in outs]
    found = []
    for update, back, own, change in (
        (updates._add_updates, updates._update_gradients, share, strided),
        (updates._add_updates.__wrapped__, updates._update_gradients.__wrapped__, share, torch.clone),
        (updates._add_updates, updates._update_gradients, Share(0, tokens, exact), torch.Tensor.double),
    ):
        y, dx = [change(one) for one in dy], change(x)
        h = update(change(x), y, own)
        found.append([*y, *back([change(one) for one in dy], (change(x), h), dx, own), dx])
    for fast, plain, truth in zip(*found, strict=True):
        as_exact(fast, plain, truth, dtype)
    assert used == ["update", "update_backward"]
    assert all(one.is_contiguous() for one in found[0][len(outs) : -1])


def heads(tokens, dtype, key_heads=2, groups=3, width=20, value_width=12):
    shapes = [
        (tokens, key_heads, groups, width),
        (tokens, key_heads, width),
        (tokens, key_heads, value_width),
    ]
    return Heads(*(numbers(*shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes)))


def attended(x, made, scoring, d_out):
    out = prefix.prefix_attention(x, made, scoring)
    into = Heads(*map(torch.empty_like, x))
    prefix.prefix_attention_backward(d_out.to(out.dtype), out, x, made, scoring, into)
    return [out, *into]


def check_attention(nodes, window, softcap, dtype):
    x, scoring = heads(size(nodes), dtype), Scoring(0.3, softcap)
    d_out = numbers(size(nodes), 2, 3, 12, seed=9, dtype=dtype)
    made = forest([(0, nodes)], window, (2, 3), x.q)
    assert made.table is not None
    fast = attended(Heads(*map(strided, x)), made, scoring, strided(d_out))
    plain = attended(x, Forest(blocks(nodes, window, (2, 3), x.q)), scoring, d_out)
    exact = Heads(*wide(*x))
    truth = attended(exact, Forest(blocks(nodes, window, (2, 3), exact.q)), scoring, d_out.double())
    for one, other, expected in zip(fast, plain, truth, strict=True):
        as_exact(one, other, expected, dtype)


@settings(max_examples=60, deadline=None)
@given(
    nodes=forests(longest=40),
    window=st.none() | st.integers(1, 50),
    softcap=st.sampled_from([None, 0.7]),
    dtype=st.sampled_from(DTYPES),
)
def test_attention_over_any_forest(nodes, window, softcap, dtype):
    check_attention(nodes, window, softcap, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 77])
def test_attention_over_long_rows(window, dtype):
    check_attention([(0, 507, -1), (507, 252, 0), (759, 123, 0), (882, 1, -1)], window, None, dtype)


def test_attention_is_that_of_the_unpacked_rows():
    nodes = [(0, 12, -1), (12, 5, 0), (17, 30, 0), (47, 9, -1)]
    x = heads(56, torch.float32)
    fast = prefix.prefix_attention(x, forest([(0, nodes)], None, (2, 3), x.q), Scoring(0.3))
    for places in ([*range(17)], [*range(12), *range(17, 47)], [*range(47, 56)]):
        row = [t[places].transpose(0, 1) for t in x]
        seen = visible_in_tree([(0, len(places), -1)], None)
        alone = prefix_attention_reference(*row, seen, Scoring(0.3)).transpose(0, 1)
        torch.testing.assert_close(fast[places], alone, rtol=1e-5, atol=1e-6)


def test_several_forests_where_they_stand():
    nodes = [(0, 5, -1), (5, 3, 0), (8, 4, 0)]
    x = heads(24, torch.float32)
    both = prefix.prefix_attention(x, forest([(0, nodes), (12, nodes)], None, (2, 3), x.q), Scoring(0.3))
    for start in (0, 12):
        own = Heads(*(t[start : start + 12] for t in x))
        alone = prefix.prefix_attention(own, forest([(0, nodes)], None, (2, 3), x.q), Scoring(0.3))
        assert torch.equal(both[start : start + 12], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_any_number_of_threads(dtype):
    nodes = [(0, 60, -1), (60, 33, 0), (93, 70, 0), (163, 90, -1)]
    tokens = size(nodes)
    x, d_out = heads(tokens, dtype), numbers(tokens, 2, 3, 12, seed=9, dtype=dtype)
    wide_x, share = (
        numbers(tokens, 252, dtype=dtype),
        Share(0, tokens, [low(252, 507, 8, 0), low(252, 70, 5, 3)]),
    )
    dy = [numbers(tokens, out, seed=7, dtype=dtype) for out in (507, 70)]
    targets = cross_entropy.Targets(torch.arange(tokens + 1), torch.arange(tokens) % 70)

    def everything():
        outputs = [one.clone() for one in dy]
        h, dx = updates._add_updates(wide_x, outputs, share), wide_x.clone()
        back = updates._update_gradients(dy, (wide_x, h), dx, share)
        made = forest([(0, nodes)], None, (2, 3), x.q)
        spec = Norm(torch.ones(252), 1e-5, True)
        return [
            *attended(x, made, Scoring(0.3), d_out),
            *outputs,
            *back,
            dx,
            norms.norm(wide_x, spec),
            norms.norm_backward(wide_x, wide_x, spec),
            *cross_entropy._losses(dy[0].clone(), targets, Head(torch.empty(0)), True),
        ]

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_not_a_number_stays_one():
    x = numbers(2, 40, dtype=torch.bfloat16)
    x[0, 3] = torch.nan
    spec = Norm(torch.ones(40), 1e-5)
    assert norms.norm(x, spec)[0].isnan().all()
    assert not norms.norm(x, spec)[1].isnan().any()
    assert gates.gated(Halves(x, x), "silu").isnan().sum() == 1


def test_what_the_kernels_do_not_take():
    assert kernels.takes(torch.zeros(1))
    assert not kernels.takes(torch.zeros(1, dtype=torch.float64))
    assert not kernels.takes(torch.zeros(1, device="meta"))
    assert kernels.library(torch.float16) == "no kernels for torch.float16"


def test_without_a_compiler_the_engine_computes_the_same(monkeypatch, used):
    model = decoder("qwen2")
    parameters = adapted(model)
    layout, _ = some_layout([(0, 9, -1), (9, 4, 0), (13, 6, 0), (19, 12, -1)])
    found = []
    for there in (True, False):
        if not there:
            monkeypatch.setattr(kernels, "library", lambda dtype: "no C compiler was found")
        loss = Engine(model, "default").loss(layout)
        found.append((float(loss.detach()), gradients(loss, parameters), set(used)))
        used.clear()
    (with_kernels, ours, names), (without, theirs, nothing) = found
    assert with_kernels == pytest.approx(without, rel=1e-6)
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-3, atol=1e-5)
    assert names == {*kernels.SIGNATURES}
    assert nothing == set()
