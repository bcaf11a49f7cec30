"""Operations counted from shapes: against sums by hand, and against what torch counts in a real step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from onebase.adapters.injection import eject, inject, new_adapter, trainable, use
from onebase.adapters.targets import match
from onebase.config import LoraConfig
from onebase.data.pack import pack
from onebase.data.template import Encoded
from onebase.data.trie import Node, layout
from onebase.models.loss import loss_sum
from onebase.models.packing import packed_attention
from onebase.ops.cross_entropy import CHUNK
from onebase.training.work import (
    FACTORS,
    FROZEN,
    FULL,
    HEAD,
    Attention,
    Decoder,
    Linear,
    Load,
    Product,
    attended_pairs,
    attention_flop,
    elementwise_bytes,
    linear_products,
    load_of,
    padded_load,
    product_flop,
    read_decoder,
    step_products,
)
from tiny import tiny

# SmolLM2-135M's layer as in docs/math.md, section 4.
LAYER = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
NO_ATTENTION = Attention(0, 0, 1, 1)


def smollm2(rank, gradient=True):
    return Decoder(tuple(Linear(*shape, rank, gradient) for shape in LAYER * 30), None, NO_ATTENTION)


def flop(decoder, load, backward=True):
    return {part: product_flop(found) for part, found in step_products(decoder, load, backward).items()}


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_sums_of_the_mathematics_page(rank):
    """4N + 6R a token: docs/math.md, section 6."""
    weights, trained = 106_168_320, rank * 305_280
    assert flop(smollm2(rank), Load(7, 0, 0)) == {FROZEN: 7 * 4 * weights, FACTORS: 7 * 6 * trained}
    assert flop(smollm2(rank), Load(1, 0, 0), backward=False) == {
        FROZEN: 2 * weights,
        FACTORS: 4 * trained / 2,
    }
    # Below the first adapter nothing runs backward; in the first one all but its input's gradient.
    assert flop(smollm2(0, gradient=False), Load(1, 0, 0)) == {FROZEN: 2 * weights}
    assert flop(smollm2(rank, gradient=False), Load(1, 0, 0))[FROZEN] == 2 * weights


def test_the_products_of_one_layer_by_hand():
    assert linear_products(Linear(3, 5, rank=2), tokens=7) == {
        FROZEN: [Product(7, 3, 5), Product(7, 5, 3)],
        FACTORS: [
            Product(7, 3, 2),
            Product(7, 2, 5, added=True),
            Product(7, 5, 2),
            Product(2, 7, 3),
            Product(2, 7, 5),
            Product(7, 2, 3, added=True),
        ],
        FULL: [],
    }
    assert linear_products(Linear(3, 5, full=True), 7)[FULL] == [Product(5, 7, 3)]
    assert linear_products(Linear(3, 5, full=True), 7, backward=False)[FULL] == []
    assert Product(7, 3, 5).flop == 210


def test_the_head_works_in_chunks_at_loss_tokens_alone():
    decoder = Decoder((), Linear(10, 100), NO_ATTENTION)
    assert CHUNK == 128
    parts = step_products(decoder, Load(tokens=999, losses=344, pairs=0))
    assert parts == {
        HEAD: {
            Product(128, 10, 100): 2,
            Product(128, 100, 10): 2,
            Product(88, 10, 100): 1,
            Product(88, 100, 10): 1,
        }
    }
    assert product_flop(parts[HEAD]) == 4 * 344 * 1000
    assert step_products(decoder, Load(999, 0, 0)) == {}
    alone = Decoder((), Linear(10, 100, rank=3, gradient=False), NO_ATTENTION)
    # X·Aᵀ and dA with 10 inputs; H·Bᵀ, dY·B and dB with 100 outputs
    assert flop(alone, Load(9, 5, 0)) == {HEAD: 2 * 5 * 1000, FACTORS: 2 * 5 * 3 * (2 * 10 + 3 * 100)}


def test_attention_and_elementwise_by_hand():
    attention = Attention(layers=3, trained=2, heads=4, width=8)
    assert attention_flop(attention, 10) == (3 * 2 + 2 * 5) * 2 * 8 * 4 * 10
    assert attention_flop(attention, 10, backward=False) == 3 * 2 * 2 * 8 * 4 * 10
    decoder = Decoder((Linear(3, 5), Linear(5, 3)), Linear(3, 7), attention)
    # 16 values a token, 3 + 7 passes of 2 bytes; 7 logits a loss token, 6 + 4 passes of 4 bytes
    assert elementwise_bytes(decoder, Load(10, 4, 0), 2) == 10 * 16 * 10 * 2 + 4 * 7 * 10 * 4
    assert elementwise_bytes(decoder, Load(10, 4, 0), 2, False) == 10 * 16 * 3 * 2 + 4 * 7 * 6 * 4
    assert elementwise_bytes(decoder._replace(head=None), Load(10, 4, 0), 2) == 10 * 16 * 10 * 2


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=6), st.booleans())
def test_pairs_are_the_tokens_before_each(ids, share):
    made = layout([Encoded(0, row, [True] * len(row)) for row in ids], share, shortest=2)
    assert attended_pairs(made.nodes) == int((made.positions + 1).sum())


def test_loads_by_hand():
    rows = [Encoded(0, [*range(10), end], [True] * 11) for end in (20, 21)] + [Encoded(1, [5], [True])]
    assert load_of(rows, share=False) == Load(23, 20, 66 + 66 + 1)
    assert load_of(rows, share=True) == Load(13, 10, 55 + 11 + 11 + 1)  # ten places predict all targets
    assert padded_load(rows) == Load(33, 20, 3 * 121)
    assert attended_pairs([Node(0, 4, -1), Node(4, 2, 0), Node(6, 3, 1)]) == 10 + (8 + 3) + (18 + 6)


def decoder_of(name="llama", **options):
    model = tiny(name)
    return read_decoder(model, match(model, LoraConfig(**options)))


def test_shapes_are_read_from_the_model():
    decoder = decoder_of(rank=3)
    assert decoder.head == Linear(32, 96)
    assert decoder.attention == Attention(layers=2, trained=2, heads=4, width=8)
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)] * 2
    assert decoder.linears == tuple(Linear(*shape, 3, index > 0) for index, shape in enumerate(shapes))
    assert decoder_of("gpt2", rank=3).linears[0] == Linear(32, 96, 3, False)
    assert decoder_of("qwen3").attention.width == 8


def test_what_is_trained_is_read_from_the_coverage():
    upper = decoder_of(rank=2, layers="1", target_modules="v_proj,down_proj")
    assert [one.rank for one in upper.linears] == [0] * 7 + [0, 0, 2, 0, 0, 0, 2]
    assert [one.gradient for one in upper.linears] == [False] * 10 + [True] * 4
    assert upper.attention == Attention(2, 1, 4, 8)
    head = decoder_of(rank=2, target_modules="lm_head")
    assert not any(one.gradient or one.rank for one in head.linears)
    assert (head.head, head.attention.trained) == (Linear(32, 96, 2, False), 0)
    low = decoder_of(rank=2, target_modules="embed_tokens")
    assert all(one.gradient and not one.rank for one in low.linears)
    assert (low.head, low.attention.trained) == (Linear(32, 96), 2)
    full = decoder_of(rank=2, target_modules="q_proj", modules_to_save="lm_head")
    assert full.head == Linear(32, 96, 0, True, True)


def test_experts_cannot_be_counted():
    assert decoder_of("mixtral", target_modules="q_proj") is None


@pytest.mark.parametrize(("name", "beside"), {"llama": (1, 2), "gemma3": (1, 2), "gpt2": ()}.items())
def test_torch_counts_the_same_in_a_real_step(name, beside):
    model, config = tiny(name), LoraConfig(rank=3)
    decoder = read_decoder(model, match(model, config))
    # k and v read what q, the first adapted layer, reads: autograd knows that it needs no gradient.
    linears = [
        one._replace(gradient=one.gradient and index not in beside)
        for index, one in enumerate(decoder.linears)
    ]
    rows = [Encoded(0, torch.arange(3, 3 + n).tolist(), [False] * 3 + [True] * (n - 3)) for n in (9, 5, 7)]
    inject(model, new_adapter(model, config), "a")
    for parameter in trainable(model, "a").values():
        parameter.requires_grad_(True)
    with use(model, "a"), packed_attention(model), FlopCounterMode(display=False) as counter:
        loss_sum(model, pack(rows))[0].backward()
    eject(model)
    counted = counter.get_flop_counts()["Global"]
    products = sum(counted[op] for op in counted if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert products == sum(flop(decoder._replace(linears=tuple(linears)), load_of(rows, False)).values())
