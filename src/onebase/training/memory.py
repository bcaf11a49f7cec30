"""What a run holds in memory at its peak, counted from the bytes that its way of scoring keeps for a backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from onebase.adapters.kinds import KINDS, kind_of
from onebase.adapters.layers import base_modules
from onebase.adapters.targets import Target, first_layer, output_head, split_path
from onebase.models.reading import read_model
from onebase.ops.cross_entropy import CHUNK
from onebase.ops.decoder import Layer
from onebase.ops.forest import MOST_QUERIES

# Python, PyTorch, transformers and their libraries' buffers, as measured once all is imported, and after a first step.
IMPORTED, RUNTIME = 360 << 20, 520 << 20
# What the library keeps of each length that a run's batches have (data.trie.filled_length), as measured with 135 M
# parameters: 14 MB in float32, 18 in bfloat16; code, so it does not depend on the base's width.
LENGTH = 16 << 20
ROW_TOKEN = 48  # bytes of a row's token in Python: two list entries and a number
TRAINED = 16  # bytes of a trained value: itself, its gradient and AdamW's two moments, in float32


class Kept(NamedTuple):
    """What one decoder layer keeps of each token, as a table of the values of each tensor; by `ops.decoder`'s names."""

    x: Callable[[Layer], int]
    raw_q: Callable[[Layer], int]
    raw_k: Callable[[Layer], int]
    q: Callable[[Layer], int]
    k: Callable[[Layer], int]
    v: Callable[[Layer], int]
    attended: Callable[[Layer], int]
    a: Callable[[Layer], int]
    mid: Callable[[Layer], int]
    gate: Callable[[Layer], int]
    up: Callable[[Layer], int]
    m: Callable[[Layer], int]


def width(layer: Layer) -> int:
    """The columns of the hidden states."""
    return layer.linears.qkv[0].weight.shape[1]


KEPT = Kept(
    x=width,
    raw_q=lambda layer: layer.attention.sizes[0] if layer.attention.q_norm else 0,
    raw_k=lambda layer: layer.attention.sizes[1] if layer.attention.k_norm else 0,
    q=lambda layer: layer.attention.sizes[0],
    k=lambda layer: layer.attention.sizes[1],
    v=lambda layer: layer.attention.sizes[2],
    attended=lambda layer: layer.attention.sizes[0],
    a=lambda layer: width(layer) if layer.norms.after_attention else 0,
    mid=lambda layer: 0 if layer.parallel else width(layer),
    gate=lambda layer: layer.inner[0],
    up=lambda layer: layer.inner[1],
    m=lambda layer: width(layer) if layer.norms.after_mlp else 0,
)


class Batch(NamedTuple):
    """The largest batch: tokens computed, those that predict, the longest row; how many lengths batches have."""

    tokens: int
    losses: int
    longest: int
    lengths: int


def layer_bytes(layer: Layer, ranks: int, size: int) -> int:
    """What a decoder layer keeps of a token, of `size` bytes a value; `ranks`: of its updates together.

    Their x·Aᵀ is kept too, in float32 at least (torch's twin of the kernels keeps it in the base's dtype).
    """
    return size * sum(count(layer) for count in KEPT) + max(size, 4) * ranks


def ranks_by_layer(targets: Sequence[Target]) -> Mapping[int | None, int]:
    """The ranks of all updates in each layer."""
    found: defaultdict[int | None, int] = defaultdict(int)
    for target in targets:
        found[split_path(target.path)[1]] += target.rank
    return found


def kept_bytes(layers: Sequence[Layer], targets: Sequence[Target], size: int, recompute: bool) -> int:
    """What all layers keep of a token until the backward pass. Below the first that is trained: nothing."""
    ranks = ranks_by_layer(targets)
    first = first_layer(targets)
    if recompute:
        return size * sum(width(layer) for layer in layers[first:])
    return sum(
        layer_bytes(layer, ranks[number], size) for number, layer in enumerate(layers) if number >= first
    )


def engine_bytes(model: nn.Module, targets: Sequence[Target], batch: Batch, recompute: bool) -> int:
    """What the engine holds at most of a batch: what the layers keep, and one layer's or the head's own work.

    With `recompute` each layer keeps its input alone, and the rest is there of the one that runs backward.
    """
    read, size = read_model(model, ()), _itemsize(model)
    layers = [one.frozen for one in read.layers]
    kept = kept_bytes(layers, targets, size, recompute)
    if recompute:
        ranks = ranks_by_layer(targets)
        kept += max(layer_bytes(layer, ranks[number], size) for number, layer in enumerate(layers))
    # Backward through a layer: gradients of gate, up and their product, of q, k, v and the attention's output, of the
    # hidden states, and a normed input.
    working = max(3 * layer.inner[0] + 2 * sum(layer.attention.sizes) + 4 * width(layer) for layer in layers)
    scores = 3 * 4 * layers[0].attention.heads * min(batch.longest, MOST_QUERIES) * batch.longest
    # A chunk's logits as they are multiplied, in float32, and their gradient; the states and their gradient.
    head = CHUNK * read.head.weight.shape[0] * (8 + size) + 3 * size * batch.losses * width(layers[0])
    return batch.tokens * kept + max(batch.tokens * working * size + scores, head)


def autograd_bytes(model: nn.Module, targets: Sequence[Target], batch: Batch, recompute: bool = False) -> int:
    """What autograd keeps of a batch in the model's own layers.

    About the input and output of every linear layer for each token, in the base's dtype and for A in float32, and
    three float32 copies of the logits where there is loss.
    """
    head, size = output_head(model), _itemsize(model)
    linears = [m for _, m in base_modules(model) if isinstance(m, nn.Linear) and m is not head]
    kept = sum(sum(KINDS["linear"].shape(m)) for m in linears)
    vocabulary = KINDS[kind].shape(head)[1] if head is not None and (kind := kind_of(head)) else 0
    return batch.tokens * kept * (size + 4) + batch.losses * vocabulary * (size + 12)


def _itemsize(model: nn.Module) -> int:
    return next(model.parameters()).element_size()


# What each way of scoring (models.scoring) holds of a batch.
WAYS: dict[str, Callable[[nn.Module, Sequence[Target], Batch, bool], int]] = {
    "engine": engine_bytes,
    "packed": autograd_bytes,
    "padded": autograd_bytes,
}
