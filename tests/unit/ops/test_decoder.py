"""The hand-written decoder layer against the plain one that autograd differentiates, in every shape it may have."""

import pytest
import torch

from onebase.ops.adapted import Dropout, Linear
from onebase.ops.decoder import Attention, Call, Groups, Layer, Norms, Part, decoder_layer
from onebase.ops.lowrank import Factors
from onebase.ops.norms import Norm
from onebase.ops.prefix import Scoring, forest
from onebase.ops.reference import decoder_reference, visible_in_tree
from onebase.ops.rotary import Rotation
from pairs import draw

WIDTH, INNER, HEADS, KEYS, HEAD = 10, 7, 4, 2, 6
NODES = [(0, 4, -1), (4, 2, 0), (6, 3, 0), (9, 2, -1)]
TOKENS = 11
SIZES = [HEADS * HEAD, KEYS * HEAD, KEYS * HEAD]
ALL = Groups((2, 3, 2), (2,), (3, 2), (4,))
NONE = Groups((0, 0, 0), (0,), (0, 0), (0,))


def make_norm(*shape, seed=0, centred=False):
    return Norm(1 + 0.3 * draw(*shape, seed=seed).detach(), 1e-3, centred)


def make_layer(norms="pre", fused=False, head_norms=None, biases=False, **options):
    outs = Groups(SIZES, [WIDTH], [INNER, INNER], [WIDTH])
    if fused:
        outs = outs._replace(qkv=[sum(SIZES)], gate_up=[2 * INNER])
    ins = Groups(WIDTH, HEADS * HEAD, WIDTH, INNER)
    linears = Groups(
        *(
            tuple(
                Linear(
                    0.4 * draw(out, width, seed=n).detach(), draw(out, seed=n).detach() if biases else None
                )
                for n, out in enumerate(group)
            )
            for width, group in zip(ins, outs, strict=True)
        )
    )
    q_norm = k_norm = None
    if head_norms == "head":
        q_norm, k_norm = make_norm(HEAD, seed=5), make_norm(HEAD, seed=6)
    elif head_norms == "each":
        q_norm, k_norm = make_norm(HEADS, HEAD, seed=5, centred=True), make_norm(KEYS, HEAD, centred=True)
    elif head_norms == "all":
        q_norm, k_norm = make_norm(HEADS * HEAD, seed=5), make_norm(KEYS * HEAD, seed=6)
    scoring = Scoring(0.4, options.pop("softcap", None))
    attention = Attention(HEADS, KEYS, HEAD, scoring, q_norm, k_norm, head_norms != "all")
    has = {"pre": (1, 0, 1, 0), "post": (0, 1, 0, 1), "both": (1, 1, 1, 1), "one": (1, 0, 0, 0)}[norms]
    places = Norms(*(make_norm(WIDTH, seed=n) if one else None for n, one in enumerate(has)))
    return Layer(linears, attention, places, options.pop("activation", "silu"), **options)


LAYERS = {
    "llama": {},
    "biases": {"biases": True},
    "fused": {"fused": True},
    "head norms": {"head_norms": "head"},
    "norms over all heads, after": {"head_norms": "all", "norms": "post"},
    "sandwich": {"norms": "both", "activation": "gelu_tanh", "softcap": 0.8},
    "multiplied": {"residual": 0.3},
    "parallel": {"norms": "one", "parallel": True, "head_norms": "each"},
    "parallel, multiplied": {"norms": "one", "parallel": True, "residual": 1.5},
}


def make_updates(layer, ranks):
    def low(linear, rank, seed):
        out, width = linear.weight.shape
        return Factors(0.3 * draw(rank, width, seed=seed), 0.3 * draw(out, rank, seed=seed + 1), 0.5 + seed)

    groups = [
        tuple(
            low(linear, rank, n) if rank else None
            for n, (linear, rank) in enumerate(zip(group, own, strict=False))
        )
        for group, own in zip(layer.linears, ranks, strict=True)
    ]
    leaves = [
        low._replace(A=low.A.detach().requires_grad_(), B=low.B.detach().requires_grad_()) if low else None
        for group in groups
        for low in group
    ]
    left = iter(leaves)
    return Groups(*(tuple(next(left) for _ in group) for group in groups))


def factors_of(updates):
    return [tensor for group in updates for low in group if low for tensor in (low.A, low.B)]


def whole(updates, dropout=None):
    """One adapter for all tokens."""
    return [Part(0, TOKENS, updates, dropout)]


def make_call(layer, window=None, rotated=True, **options):
    angles = torch.tensor([0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1])[:, None] * torch.tensor([1.0, 0.3])
    rotation = Rotation(angles.cos().double(), angles.sin().double()) if rotated else None
    made = forest([(0, NODES)], window, (KEYS, HEADS // KEYS), torch.zeros(1, dtype=torch.float64))
    return Call(layer, made, rotation, **options)


def check(layer, ranks, wants_x=True, window=None, rotated=True, **options):
    updates, call = make_updates(layer, ranks), make_call(layer, window, rotated, **options)
    x = draw(TOKENS, WIDTH).requires_grad_(wants_x)
    inputs = [x] * wants_x + factors_of(updates)
    ours = decoder_layer(x, call, whole(updates))
    plain = decoder_reference(x, layer, updates, call.rotation, visible_in_tree(NODES, window))
    torch.testing.assert_close(ours, plain)
    gradient = draw(TOKENS, WIDTH, seed=4).detach()
    one, other = (torch.autograd.grad(y, inputs, gradient) for y in (ours, plain))
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_every_kind_of_layer(options, checkpoint):
    check(make_layer(**options), ALL, checkpoint=checkpoint)


@pytest.mark.parametrize("window", [1, 3])
def test_a_window(window):
    check(make_layer(), ALL, window=window)


def test_no_rotation():
    check(make_layer(head_norms="head"), ALL, rotated=False)


SOME = {
    "none": NONE,
    "q and v": NONE._replace(qkv=(2, 0, 1)),
    "out": NONE._replace(out=(2,)),
    "up": NONE._replace(gate_up=(0, 3)),
    "down": NONE._replace(down=(1,)),
    "out and gate": NONE._replace(out=(2,), gate_up=(1, 0)),
}


@pytest.mark.parametrize("wants_x", [True, False])
@pytest.mark.parametrize("ranks", SOME.values(), ids=SOME)
@pytest.mark.parametrize("kind", ["llama", "parallel", "sandwich"])
def test_some_layers_adapted_with_and_without_an_input_gradient(kind, ranks, wants_x):
    if wants_x or any(map(any, ranks)):
        check(make_layer(**LAYERS[kind]), ranks, wants_x)


@pytest.mark.parametrize("options", [LAYERS["llama"], LAYERS["parallel"]], ids=["llama", "parallel"])
@pytest.mark.parametrize("dropout", [None, Dropout(0.4, 3)])
def test_gradcheck(options, dropout):
    layer = make_layer(**options)
    updates, call = make_updates(layer, ALL), make_call(layer)

    def run(x, *factors):
        left = iter(factors)
        lows = Groups(
            *(tuple(low and Factors(next(left), next(left), low.scale) for low in group) for group in updates)
        )
        return decoder_layer(x, call, whole(lows, dropout))

    assert torch.autograd.gradcheck(run, [draw(TOKENS, WIDTH), *factors_of(updates)], fast_mode=True)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_parts_are_their_tokens_alone(options, checkpoint):
    """The first tree with one adapter, the second with another of other ranks and places."""
    layer = make_layer(**options)
    call = make_call(layer, checkpoint=checkpoint)
    ranks = Groups((0, 1, 0)[: len(layer.linears.qkv)], (3,), (0, 2)[: len(layer.linears.gate_up)], (0,))
    parts = [Part(0, 9, make_updates(layer, ALL)), Part(9, 11, make_updates(layer, ranks))]
    x, gradient = draw(TOKENS, WIDTH), draw(TOKENS, WIDTH, seed=4).detach()
    seen = visible_in_tree(NODES, None)
    together = decoder_layer(x, call, parts)
    for part in parts:
        inputs, rows = factors_of(part.updates), slice(part.start, part.stop)
        alone = decoder_reference(x, layer, part.updates, call.rotation, seen)
        torch.testing.assert_close(together[rows], alone[rows])
        expected = torch.autograd.grad(alone[rows], [x, *inputs], gradient[rows])
        found = torch.autograd.grad(together, [x, *inputs], gradient, retain_graph=not checkpoint)
        torch.testing.assert_close(found[0][rows], expected[0][rows], rtol=1e-9, atol=1e-11)
        for one, other in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        together = decoder_layer(x, call, parts)


def test_tokens_in_no_part_run_without_an_adapter():
    layer = make_layer()
    x, call, seen = draw(TOKENS, WIDTH), make_call(layer), visible_in_tree(NODES, None)
    plain = decoder_reference(x, layer, make_updates(layer, NONE), call.rotation, seen)
    ours = decoder_layer(x, call, [])
    torch.testing.assert_close(ours, plain)
    one, other = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, plain))
    torch.testing.assert_close(one, other)
    some = decoder_layer(x, call, [Part(0, 9, make_updates(layer, ALL))])
    torch.testing.assert_close(some[9:], plain[9:])
    assert not torch.allclose(some[:9], plain[:9])


def test_checkpointing_gives_the_same_bits_and_keeps_less():
    layer = make_layer(norms="both", head_norms="head")
    x, updates = draw(TOKENS, WIDTH), make_updates(layer, ALL)
    found, kept = [], []
    for checkpoint in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t
        ):
            y = decoder_layer(x, make_call(layer, checkpoint=checkpoint), whole(updates, Dropout(0.5, 1)))
        found.append([y, *torch.autograd.grad(y.sum(), [x, *factors_of(updates)])])
        kept.append(sum(saved))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    factors = sum(tensor.numel() for tensor in factors_of(updates))
    assert kept[1] == factors + x.numel() < kept[0]


def test_a_layer_without_any_gradient_keeps_nothing():
    layer = make_layer()
    y = decoder_layer(draw(TOKENS, WIDTH).detach(), make_call(layer), whole(make_updates(layer, NONE)))
    assert y.grad_fn is None


def test_a_second_backward_is_refused():
    layer = make_layer()
    x = draw(TOKENS, WIDTH)
    loss = decoder_layer(x, make_call(layer), whole(make_updates(layer, ALL))).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
