"""The fast path of training: a decoder and its adapter, computed by `ops` instead of by the model's own modules.

Exact: the same function as the model's forward, proved on the model itself by `engine_problem`. Rows are packed, and
what rows share at their beginning is computed once. Several adapters may share one pass over the frozen weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.adapters.injection import eval_mode, trainable, use
from onebase.adapters.layers import Slot
from onebase.data.trie import Layout, Node, filled, filled_length
from onebase.models.reading import ReadLayer, Unsupported, read_model
from onebase.ops.adapted import Dropout
from onebase.ops.cross_entropy import frozen_cross_entropy
from onebase.ops.decoder import Call, Groups, Part, Updates, decoder_layer
from onebase.ops.norms import normed
from onebase.ops.prefix import Forest, forest

# How far engine and model may be apart: (the loss, the gradient's norm), relative; wider for narrower dtypes.
TOLERANCE = {torch.float64: (1e-6, 1e-5), torch.float32: (1e-4, 1e-3)}
NARROW_TOLERANCE = (3e-2, 3e-1)
# The probe's rows: two that share their first tokens, and one that shares nothing.
SHARED, BRANCHES, ALONE = 6, (3, 4), 5


Slots = Groups[tuple[Slot | None, ...]]  # an adapter's, in one layer


class Member(NamedTuple):
    """One adapter's rows in a joint batch, and its dropout in each layer."""

    name: str
    layout: Layout
    dropouts: tuple[Dropout | None, ...]


class Engine:
    """A model and some of its adapters, ready for the fast path. Raises Unsupported where they do not fit.

    The base's tensors are read where they are, so an engine is built again after the model was moved or changed.
    """

    def __init__(self, model: nn.Module, *names: str) -> None:
        self._read, self._names = read_model(model, names), names
        self._slots = {name: [_slots(layer, name) for layer in self._read.layers] for name in names}

    @property
    def first(self) -> int:
        """The number of the lowest layer that an adapter changes: below it, states are the plain base's."""
        changed = (any(place for group in layer.places for place in group) for layer in self._read.layers)
        return next((number for number, found in enumerate(changed) if found), len(self._read.layers))

    def loss(self, layout: Layout, checkpoint: bool = False, below: Tensor | None = None) -> Tensor:
        """`joint_loss` for one layout and the first adapter alone."""
        member = self.member(self._names[0], layout)
        if below is not None:  # the member's rows were filled up at their end
            below = F.pad(below, (0, 0, 0, len(member.layout.ids) - len(below)))
        return self.joint_loss([member], checkpoint, below)[0]

    def states_below(self, layout: Layout) -> Tensor:
        """The hidden states (T, D) that enter the `first` adapted layer, without a graph."""
        with torch.no_grad():
            member = self.member(self._names[0], layout)
            hidden = self._embedded([member.layout])
            hidden = self._through(hidden, [member], range(self.first), checkpoint=False)
            return hidden[: len(layout.ids)]

    def member(self, name: str, layout: Layout) -> Member:
        """An adapter's rows, ready for `joint_loss`. Its masks are drawn from torch's random state, now.

        Adapters drop out as `adapter_dropout` says. The rows are filled up to one of few lengths (`trie.filled`).
        """
        return Member(name, filled(layout), tuple(map(_dropout, self._read.layers, self._slots[name])))

    def joint_loss(
        self, members: Sequence[Member], checkpoint: bool = False, below: Tensor | None = None
    ) -> list[Tensor]:
        """The summed cross-entropy, in nats, of each member's targets: scalars in at least float32.

        All members' tokens go through the frozen weights as one batch; each adapter works on its own rows alone, and
        no row sees another member's. Attached to autograd with gradients for the adapters' parameters, each from its
        own loss; one backward pass of the losses' sum gives them all. With `checkpoint` each layer keeps its input
        alone and computes the rest again in the backward pass. `below` (T, D): the layouts' `states_below`, where they
        are known already; the layers that made them are not run again.
        """
        read, layouts = self._read, [member.layout for member in members]
        device = read.head.weight.device
        edges = _edges(layouts)
        hidden = self._embedded(layouts) if below is None else below.to(device)
        layers = range(0 if below is None else self.first, len(read.layers))
        hidden = self._through(hidden, members, layers, checkpoint)
        picked = [layout.columns.unique(return_inverse=True) for layout in layouts]
        picked = [(_filled_up(own), rows) for own, rows in picked]
        columns = torch.cat([own + start for (own, _), start in zip(picked, edges, strict=False)])
        states = normed(hidden.index_select(0, columns.to(device)), read.norm)
        return [
            frozen_cross_entropy(own, read.head, rows.to(device), layout.targets.to(device))
            for own, (_, rows), layout in zip(
                states.split([len(own) for own, _ in picked]), picked, layouts, strict=True
            )
        ]

    def _embedded(self, layouts: Sequence[Layout]) -> Tensor:
        read = self._read
        with torch.no_grad():
            hidden = read.embed(torch.cat([layout.ids for layout in layouts]).to(read.head.weight.device))
            return hidden if read.embedding == 1.0 else hidden * read.embedding

    def _through(self, hidden: Tensor, members: Sequence[Member], layers: range, checkpoint: bool) -> Tensor:
        """The hidden states (T, D) behind these layers."""
        layouts = [member.layout for member in members]
        edges = _edges(layouts)
        rotations = self._read.rotations(torch.cat([layout.positions for layout in layouts]), hidden)
        forests = self._forests(hidden, layouts, edges)
        for number in layers:
            layer = self._read.layers[number]
            parts = [
                Part(*edge, _updates(self._slots[member.name][number]), member.dropouts[number])
                for edge, member in zip(pairwise(edges), members, strict=True)
            ]
            rotation = rotations[layer.rotary_type] if layer.rotates else None
            call = Call(layer.frozen, forests[layer.window], rotation, checkpoint)
            hidden = decoder_layer(hidden, call, parts)
        return hidden

    def _forests(
        self, hidden: Tensor, layouts: Sequence[Layout], starts: Sequence[int]
    ) -> dict[int | None, Forest]:
        """The layouts' token trees where they stand, for each window that a layer has."""
        spec = self._read.layers[0].frozen.attention
        heads = (spec.kv_heads, spec.heads // spec.kv_heads)
        placed = [(start, layout.nodes) for start, layout in zip(starts, layouts, strict=False)]
        windows = {layer.window for layer in self._read.layers}
        return {window: forest(placed, window, heads, hidden) for window in windows}


def _edges(layouts: Sequence[Layout]) -> list[int]:
    """Where each layout begins in the batch, and the batch's end."""
    return [0, *accumulate(len(layout.ids) for layout in layouts)]


def _filled_up(columns: Tensor) -> Tensor:
    """The columns (N,), the last one repeated up to one of few numbers; a state without targets adds nothing."""
    return torch.cat([columns, columns[-1:].expand(filled_length(len(columns)) - len(columns))])


def _slots(layer: ReadLayer, name: str) -> Slots:
    return Groups(*(tuple(place and place.slot(name) for place in group) for group in layer.places))


def _updates(slots: Slots) -> Updates:
    return Groups(*(tuple(slot and slot.low().factors for slot in group) for group in slots))


def _dropout(layer: ReadLayer, slots: Slots) -> Dropout | None:
    """An adapter's dropout, the same at all its places, with a seed from torch's random state."""
    for places, group in zip(layer.places, slots, strict=True):
        for place, slot in zip(places, group, strict=True):
            if place and slot and slot.dropout and place.training:
                return Dropout(slot.dropout, int(torch.randint(2**62, ())))
    return None


def engine_problem(model: nn.Module, name: str, text: Sequence[int] = ()) -> str | None:
    """Why this model with this adapter cannot go through the engine, in one sentence; None where it is proved exact.

    The model's modules must be known, and on a few rows, two of which share a prefix, the engine's loss and its
    gradients must be those of the model's own forward, with each row a row of one batch. The rows' tokens come from
    `text`, or are random: on these a trained model is so sensitive that in bfloat16 its own rounding hides what is
    compared. Nothing is changed. Raises what the model's own forward raises, if it does. Call it with the attention
    implementation that the model came with.
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
    theirs, ours = _own_loss(model, rows), engine.loss(layout)
    losses, gradients = TOLERANCE.get(model.dtype, NARROW_TOLERANCE)
    apart = float(abs(ours.detach().double().cpu() - theirs.detach()) / theirs.detach())
    if not apart <= losses:
        return f"the losses differ by {apart:.1e} ({losses:.0e} allowed)"
    one, other = (_flat_gradient(loss, parameters) for loss in (ours, theirs))
    apart = float((one - other).norm() / other.norm().clamp_min(torch.finfo(other.dtype).tiny))
    return "" if apart <= gradients else f"the gradients differ by {apart:.1e} ({gradients:.0e} allowed)"


def _own_loss(model: Any, rows: Sequence[Tensor]) -> Tensor:
    """The summed nats of the rows through the model's own forward, each a row of one batch, in float64.

    Rows are filled up at their end, where no token of theirs looks, so they need no mask.
    """
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = torch.cat([part[: len(row) - 1] for part, row in zip(wide, rows, strict=True)])
    targets = torch.cat([row[1:] for row in rows]).to(model.device)
    return F.cross_entropy(own, targets, reduction="none").double().sum().cpu()


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
    owners = torch.tensor([0] * first + [1] * BRANCHES[1] + [2] * ALONE)
    return Layout(ids, positions, nodes, columns, targets, owners), [ids[place] for place in places]


def _flat_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([gradient.flatten().cpu().double() for gradient in found])
