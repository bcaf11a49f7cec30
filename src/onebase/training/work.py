"""What a training step computes, counted from the modules' shapes: matrix products, attention, bytes moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from onebase.adapters.kinds import KINDS, kind_of
from onebase.adapters.layers import base_modules
from onebase.adapters.targets import Coverage, output_head, split_path
from onebase.data.template import Encoded
from onebase.data.trie import Node, layout
from onebase.ops.cross_entropy import CHUNK

# What a step's time goes to. Counted in floating-point operations:
FROZEN, FACTORS, FULL, HEAD, ATTENTION = (
    "frozen layers",
    "low-rank factors",
    "layers trained in full",
    "output head",
    "attention",
)
# and in bytes read and written:
ELEMENTWISE, OPTIMIZER = "elementwise work", "optimiser"

# Elementwise work (norms, gates, rotary, residuals, copies): how often each value that goes into or out of a linear
# layer is read or written, forward and in the backward pass. Counted in the engine on a Llama, as the inputs and
# outputs of its operations other than products, divided by those values.
PASSES = (3, 7)
# The same for the float32 logits: maximum 1, subtraction 2, exponential 2, sum 1; for the gradient two products of 2.
LOGIT_PASSES = (6, 4)
# Reads and writes of a trained float32 value in one step, counted in torch's clipping and AdamW (foreach): norm 1,
# clip 2, lerp 3, mul 2, addcmul 4, sqrt 2, div 2, add 2, addcdiv 4, zeroing 1.
OPTIMIZER_BYTES = 4 * 23


class Product(NamedTuple):
    """A matrix product (rows, inner) x (inner, columns); `added` to what is in its place, which is slower."""

    rows: int
    inner: int
    columns: int
    added: bool = False

    @property
    def flop(self) -> int:
        """A multiplication and an addition for each of rows · inner · columns."""
        return 2 * self.rows * self.inner * self.columns


class Linear(NamedTuple):
    """A linear layer's shape and what training asks of it.

    `rank` 0: it has no update. `gradient`: its input gets one, as above the first trained layer. `full`: it is
    itself trained.
    """

    inputs: int
    outputs: int
    rank: int = 0
    gradient: bool = True
    full: bool = False


class Attention(NamedTuple):
    """All attention layers: `trained` of the `layers` are run backward too. `width` is that of a head."""

    layers: int
    trained: int
    heads: int
    width: int


class Decoder(NamedTuple):
    """The layers that every token goes through, the head that loss tokens go through, and attention."""

    linears: tuple[Linear, ...]
    head: Linear | None
    attention: Attention


class Load(NamedTuple):
    """A batch: tokens computed, those of them that predict, and pairs of a token and one that it attends to."""

    tokens: int
    losses: int
    pairs: int


def load_of(rows: Sequence[Encoded], share: bool) -> Load:
    """The load of these rows as a packed batch, with shared prefixes computed once or not."""
    made = layout(rows, share)
    return Load(len(made.ids), len(made.columns.unique()), attended_pairs(made.nodes))


def padded_load(rows: Sequence[Encoded]) -> Load:
    """The load of these rows as a padded batch: each is as long as the longest, and attention computes all pairs."""
    width = max(len(row.ids) for row in rows)
    losses = sum(row.targets for row in rows)
    return Load(width * len(rows), losses, width * width * len(rows))


def linear_products(linear: Linear, tokens: int, backward: bool = True) -> dict[str, list[Product]]:
    """One layer's products by part (docs/math.md, section 3, has the formulas).

    Forward X·Wᵀ, and with an update H = X·Aᵀ and + H·Bᵀ. Backward dH = dY·B, dA = dHᵀ·X, dBᵀ = Hᵀ·dY, and where
    the input gets a gradient dY·W + dH·A. A layer trained in full has dW = dYᵀ·X.
    """
    inputs, outputs, rank, gradient, full = linear
    frozen = [Product(tokens, inputs, outputs)]
    factors = [Product(tokens, inputs, rank), Product(tokens, rank, outputs, added=True)]
    own: list[Product] = []
    if backward:
        dh, da, db = (
            Product(tokens, outputs, rank),
            Product(rank, tokens, inputs),
            Product(rank, tokens, outputs),
        )
        factors += [dh, da, db]
        if gradient:
            frozen.append(Product(tokens, outputs, inputs))
            factors.append(Product(tokens, rank, inputs, added=True))
        own += [Product(outputs, tokens, inputs)] if full else []
    return {FROZEN: frozen, FACTORS: factors if rank else [], FULL: own}


def step_products(decoder: Decoder, load: Load, backward: bool = True) -> dict[str, Counter[Product]]:
    """Every matrix product of a batch, by part, with how often it comes. The head works by chunks of loss tokens."""
    parts: dict[str, Counter[Product]] = {part: Counter() for part in (FROZEN, FACTORS, FULL, HEAD)}
    for linear in decoder.linears:
        for part, found in linear_products(linear, load.tokens, backward).items():
            parts[part].update(found)
    if decoder.head and load.losses:
        whole, rest = divmod(load.losses, CHUNK)
        for size, times in ((CHUNK, whole), (rest, 1)):
            for part, found in linear_products(decoder.head, size, backward).items():
                parts[HEAD if part == FROZEN else part].update({p: times for p in found if size * times})
    return {part: products for part, products in parts.items() if products}


def product_flop(products: Counter[Product]) -> int:
    """The floating-point operations of products that come so often."""
    return sum(product.flop * times for product, times in products.items())


def attention_flop(attention: Attention, pairs: int, backward: bool = True) -> int:
    """The operations of attention over these pairs.

    Each of two products forward (scores, output) and five backward (scores again, dV, dP, dQ, dK) takes
    2 · width a pair and head: FlashAttention-2, Dao 2023.
    """
    products = 2 * attention.layers + (5 * attention.trained if backward else 0)
    return products * 2 * attention.width * attention.heads * pairs


def attended_pairs(nodes: Sequence[Node]) -> int:
    """The pairs of a layout: a token goes with those up to itself in its node and with all in the nodes above."""
    above: list[int] = []
    for node in nodes:
        above.append(above[node.parent] + nodes[node.parent].length if node.parent >= 0 else 0)
    return sum(
        node.length * before + node.length * (node.length + 1) // 2
        for node, before in zip(nodes, above, strict=True)
    )


def elementwise_bytes(decoder: Decoder, load: Load, itemsize: int, backward: bool = True) -> int:
    """The bytes that elementwise work reads and writes in a batch, by the rules of `PASSES` and `LOGIT_PASSES`."""
    passes = PASSES[0] + PASSES[1] * backward
    body = passes * itemsize * load.tokens * sum(one.inputs + one.outputs for one in decoder.linears)
    over_logits = LOGIT_PASSES[0] + LOGIT_PASSES[1] * backward
    return body + (over_logits * 4 * load.losses * decoder.head.outputs if decoder.head else 0)


def read_decoder(model: nn.Module, coverage: Coverage) -> Decoder | None:
    """The shapes of a transformers decoder, and what a run with this coverage trains of it.

    None where a token's work cannot be told from linear layers: experts, convolutions, an unknown number of heads.
    Layers come in the order in which the model registers them. One that reads the same input as the first trained
    layer is counted with an input gradient, although none is needed: less than 1 % of a step.
    """
    modules, head, config = list(base_modules(model)), output_head(model), _text_config(model)
    heads, layers = (getattr(config, name, 0) for name in ("num_attention_heads", "num_hidden_layers"))
    experts = any(path.endswith("experts") for path, _ in modules)
    if experts or any(p.ndim > 2 for p in model.parameters()) or not heads or not layers:
        return None
    ranks = {target.path: target.rank for target in coverage.targets}
    linears: list[Linear] = []
    top, first = None, None  # first: the layer of the first trained module
    for path, module in modules:
        full = path in coverage.full
        if (kind := kind_of(module)) in ("linear", "transposed"):
            linear = Linear(*KINDS[kind].shape(module), ranks.get(path, 0), first is not None, full)
            top = linear if module is head else top
            linears += [] if module is head else [linear]
        if first is None and (path in ranks or full):
            layer = split_path(path)[1]
            first = layer if layer is not None else layers if module is head else 0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    trained = layers - (layers if first is None else first)
    return Decoder(tuple(linears), top, Attention(layers, trained, heads, width))


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
