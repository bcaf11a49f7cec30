"""Segmented attention against its reference, the reference against plain loops, and no leak between rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.ops.attention import segmented_attention
from onebase.ops.reference import attention_reference
from watching import Largest

# How much larger than the reference's own error against float64 the fast op's may be.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def inputs(lengths, heads=4, kv_heads=2, width=8, value_width=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(heads, width), (kv_heads, width), (kv_heads, value_width or width)]
    # Layers hand over transposed views, so the op must not need contiguous tensors.
    return [
        torch.randn(1, sum(lengths), h, d, generator=generator, dtype=torch.float64).transpose(1, 2).to(dtype)
        for h, d in sizes
    ]


def plain_loops(query, key, value, lengths, scale, window, softcap):
    """The semantics with Python numbers, one score at a time."""
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype)
    for head in range(query.shape[1]):
        kv_head = head * key.shape[1] // query.shape[1]
        start = 0
        for length in lengths:
            for i in range(start, start + length):
                first = start if window is None else max(start, i - window + 1)
                scores = [scale * float(query[0, head, i] @ key[0, kv_head, j]) for j in range(first, i + 1)]
                scores = [softcap * math.tanh(s / softcap) if softcap else s for s in scores]
                weights = [math.exp(s - max(scores)) for s in scores]
                for j, weight in zip(range(first, i + 1), weights, strict=True):
                    out[0, head, i] += weight / sum(weights) * value[0, kv_head, j]
            start += length
    return out


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_reference_is_the_definition(window, softcap):
    lengths = (5, 1, 7)
    tensors = inputs(lengths, heads=6, kv_heads=2, value_width=5, dtype=torch.float64)
    expected = plain_loops(*tensors, lengths, 0.3, window, softcap)
    got = attention_reference(*tensors, lengths, 0.3, window, softcap)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 4, 123, 1000])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "width", "value_width"),
    [
        ((1,), 1, 1, 3, 3),
        ((1, 1, 1), 4, 4, 8, 8),
        ((7, 123, 1, 7), 9, 3, 16, 16),
        ((252,), 5, 1, 33, 33),
        ((4, 5, 4), 4, 2, 24, 16),  # multi-head latent attention: values narrower than keys
    ],
)
def test_the_fast_op_is_as_exact_as_the_reference(
    lengths, heads, kv_heads, width, value_width, window, softcap, dtype
):
    tensors = inputs(lengths, heads, kv_heads, width, value_width, dtype)
    scale = width**-0.5
    truth = attention_reference(*(t.double() for t in tensors), lengths, scale, window, softcap)
    fast = segmented_attention(*tensors, lengths, scale, window, softcap)
    reference = attention_reference(*tensors, lengths, scale, window, softcap)
    assert fast.dtype == reference.dtype == dtype
    assert fast.shape == (1, heads, sum(lengths), value_width)
    error, own = ((x.double() - truth).abs().max() for x in (fast, reference))
    assert error <= own + TOLERANCE[dtype]


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, None), (2, 1.5)])
def test_gradients(window, softcap):
    lengths = (4, 1, 3)
    tensors = [t.requires_grad_() for t in inputs(lengths, heads=2, kv_heads=1, width=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: segmented_attention(q, k, v, lengths, 0.6, window, softcap), tensors
    )


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12).map(tuple),
    window=st.none() | st.integers(1, 10),
    softcap=st.none() | st.floats(0.5, 50),
    seed=st.integers(0, 9),
)
def test_any_lengths(lengths, window, softcap, seed):
    tensors = inputs(lengths, dtype=torch.float64, seed=seed)
    fast = segmented_attention(*tensors, lengths, 0.4, window, softcap)
    reference = attention_reference(*tensors, lengths, 0.4, window, softcap)
    torch.testing.assert_close(fast, reference, rtol=0, atol=1e-12)


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=6).map(tuple),
    window=st.none() | st.integers(1, 20),
    data=st.data(),
)
def test_no_segment_sees_another(lengths, window, data):
    row = data.draw(st.integers(0, len(lengths) - 1))
    before = inputs(lengths, seed=1)
    own = slice(sum(lengths[:row]), sum(lengths[: row + 1]))
    after = [t.clone() for t in before]
    for tensor, other in zip(after, inputs(lengths, seed=2), strict=True):
        tensor[:, :, own] = 100 * other[:, :, own]
    old, new = (segmented_attention(*t, lengths, 0.3, window) for t in (before, after))
    changed = (old != new).any(dim=(0, 1, 3))
    assert changed[own].all()
    assert not changed[: own.start].any()
    assert not changed[own.stop :].any()


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 9.0)])
def test_nothing_of_size_t_squared_is_made(window, softcap):
    lengths = (16,) * 32
    tensors = inputs(lengths, heads=2, kv_heads=2, width=4)
    with Largest() as largest:
        segmented_attention(*tensors, lengths, 0.5, window, softcap)
    assert largest.size == tensors[0].numel() == 2 * 512 * 4 < 512 * 512


@pytest.mark.parametrize(
    ("lengths", "kv_heads", "rows"),
    [((3, 3), 2, 1), ((), 2, 1), ((7, 0), 2, 1), ((8, -1), 2, 1), ((7,), 3, 1), ((7,), 2, 2)],
)
def test_lengths_and_shapes_that_do_not_fit_are_refused(lengths, kv_heads, rows):
    query, key, value = (t.expand(rows, -1, -1, -1) for t in inputs((7,), heads=4, kv_heads=kv_heads))
    with pytest.raises(ValueError, match="do not fit segments"):
        segmented_attention(query, key, value, lengths, 0.5)
