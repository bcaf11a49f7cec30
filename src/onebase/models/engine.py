"""The fast path of training: a decoder and its adapter, computed by `ops` instead of by the model's own modules.

Exact: the same function as the model's forward, proved on the model itself by `engine_problem`. Rows are packed, and
what rows share at their beginning is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.data.trie import Layout, Node
from onebase.injection import eval_mode, trainable, use
from onebase.layers import LoraLayer
from onebase.models.reading import ReadLayer, Unsupported, read_model
from onebase.ops.adapted import Dropout
from onebase.ops.cross_entropy import frozen_cross_entropy
from onebase.ops.decoder import Call, Groups, Updates, decoder_layer
from onebase.ops.lowrank import Factors
from onebase.ops.norms import normed
from onebase.ops.prefix import Block, blocks
from onebase.ops.rotary import Rotation

# How far engine and model may be apart: (the loss, the gradient's norm), relative; wider for narrower dtypes.
TOLERANCE = {torch.float64: (1e-6, 1e-5), torch.float32: (1e-4, 1e-3)}
NARROW_TOLERANCE = (3e-2, 3e-1)
# The probe's rows: two that share their first tokens, and one that shares nothing.
SHARED, BRANCHES, ALONE = 6, (3, 4), 5


class Engine:
    """A model and one of its adapters, ready for the fast path. Raises Unsupported where they do not fit.

    The base's tensors are read where they are, so an engine is built again after the model was moved or changed.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._read, self._name = read_model(model, name), name

    def loss(self, layout: Layout, checkpoint: bool = False) -> Tensor:
        """The summed cross-entropy, in nats, of a layout's targets: a scalar in at least float32.

        Attached to autograd with gradients for the adapter's parameters alone. Adapters drop out as `adapter_dropout`
        says. With `checkpoint` each layer keeps its input alone and computes the rest again in the backward pass.
        """
        read = self._read
        device = read.head.weight.device
        with torch.no_grad():
            hidden = read.embed(layout.ids.to(device))
            if read.embedding != 1.0:
                hidden = hidden * read.embedding
        rotations = self._rotations(hidden, layout)
        masks = self._masks(hidden, layout)
        for layer in read.layers:
            places = [place for group in layer.places for place in group if place is not None]
            call = Call(
                layer.frozen,
                masks[layer.window],
                rotations[layer.rotary_type] if layer.rotates else None,
                _dropout(places, self._name),
                checkpoint,
            )
            hidden = decoder_layer(hidden, call, self._updates(layer))
        columns, rows = layout.columns.to(device).unique(return_inverse=True)
        states = normed(hidden.index_select(0, columns), read.norm)
        return frozen_cross_entropy(states, read.head, rows, layout.targets.to(device))

    def _rotations(self, hidden: Tensor, layout: Layout) -> dict[str | None, Rotation]:
        """The angles of the layout's positions, for each type of layer that rotates."""
        positions = layout.positions.to(hidden.device)[None]
        found: dict[str | None, Rotation] = {}
        for kind in {layer.rotary_type for layer in self._read.layers if layer.rotates}:
            with torch.no_grad():
                angles = self._read.rotary(hidden[None], positions, *([kind] if kind else []))
            # transformers gives each pair's angle twice: once for each of its channels.
            half = angles[0].shape[-1] // 2
            once = slice(None, None, 2) if self._read.interleaved else slice(half)
            cos, sin = (part[0, :, once] for part in angles)
            found[kind] = Rotation(cos, sin, self._read.interleaved)
        return found

    def _masks(self, hidden: Tensor, layout: Layout) -> dict[int | None, list[Block]]:
        """The attention's blocks, for each window that a layer has."""
        spec = self._read.layers[0].frozen.attention
        like = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        groups = (spec.kv_heads, spec.heads // spec.kv_heads)
        windows = {layer.window for layer in self._read.layers}
        return {window: blocks(layout.nodes, window, groups, like) for window in windows}

    def _updates(self, layer: ReadLayer) -> Updates:
        return Groups(*(tuple(_factors(place, self._name) for place in group) for group in layer.places))


def _factors(place: LoraLayer | None, name: str) -> Factors | None:
    slot = place and place.slot(name)
    return slot.low().factors if slot else None


def _dropout(places: Sequence[LoraLayer], name: str) -> Dropout | None:
    """An adapter's dropout, the same at all its places, with a seed from torch's random state."""
    for place in places:
        slot = place.slot(name)
        if slot and slot.dropout and place.training:
            return Dropout(slot.dropout, int(torch.randint(2**62, ())))
    return None


def engine_problem(model: nn.Module, name: str, text: Sequence[int] = ()) -> str | None:
    """Why this model with this adapter cannot go through the engine, in one sentence; None where it is proved exact.

    The model's modules must be known, and on a few rows, two of which share a prefix, the engine's loss and its
    gradients must be those of the model's own forward, row by row. The rows' tokens come from `text`, or are random:
    on these a trained model is so sensitive that in bfloat16 its own rounding hides what is compared. Nothing is changed. Raises what the model's
    own forward raises, if it does. Call it with the attention implementation that the model came with.
    """
    try:
        engine = Engine(model, name)
    except Unsupported as reason:
        return f"the engine cannot compute this model: {reason.found}"
    parameters = trainable(model, name)
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with eval_mode(model), use(model, name), torch.enable_grad():
            found = _difference(model, engine, list(parameters.values()), text)
    finally:
        for key, parameter in parameters.items():
            parameter.requires_grad_(before[key])
    return f"the engine does not compute this model: {found}" if found else None


def _difference(model: Any, engine: Engine, parameters: Sequence[nn.Parameter], text: Sequence[int]) -> str:
    """What tells the engine from the model on a few rows; empty if nothing does."""
    layout, rows = _probe(_tokens(model, text))
    theirs = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0, :-1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        theirs = theirs + F.cross_entropy(wide, row[1:].to(model.device), reduction="sum").double().cpu()
    ours = engine.loss(layout)
    losses, gradients = TOLERANCE.get(model.dtype, NARROW_TOLERANCE)
    apart = float(abs(ours.detach().double().cpu() - theirs.detach()) / theirs.detach())
    if not apart <= losses:
        return f"the losses differ by {apart:.1e} ({losses:.0e} allowed)"
    one, other = (_flat_gradient(loss, parameters) for loss in (ours, theirs))
    apart = float((one - other).norm() / other.norm().clamp_min(torch.finfo(other.dtype).tiny))
    return "" if apart <= gradients else f"the gradients differ by {apart:.1e} ({gradients:.0e} allowed)"


def _tokens(model: Any, text: Sequence[int]) -> Tensor:
    count = SHARED + sum(BRANCHES) + ALONE
    if text:
        return torch.tensor((list(text) * count)[:count])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (count,), generator=generator)


def _probe(ids: Tensor) -> tuple[Layout, list[Tensor]]:
    """These tokens as a layout, and its rows."""
    first, second = SHARED + BRANCHES[0], SHARED + sum(BRANCHES)
    nodes = (
        Node(0, SHARED, -1),
        Node(SHARED, BRANCHES[0], 0),
        Node(first, BRANCHES[1], 0),
        Node(second, ALONE, -1),
    )
    places = [
        torch.arange(first),
        torch.cat([torch.arange(SHARED), torch.arange(first, second)]),
        torch.arange(second, len(ids)),
    ]
    positions = torch.cat(
        [torch.arange(first), torch.arange(SHARED, SHARED + BRANCHES[1]), torch.arange(ALONE)]
    )
    columns = torch.cat([place[:-1] for place in places])
    targets = torch.cat([ids[place[1:]] for place in places])
    return Layout(ids, positions, nodes, columns, targets), [ids[place] for place in places]


def _flat_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([gradient.flatten().cpu().double() for gradient in found])
