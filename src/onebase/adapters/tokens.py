"""Trained token rows: some rows of an embedding, and of the output head, that an adapter replaces or adds.

The rows are what an adapter says, whatever the base or a low-rank update of the embedding makes of these tokens.
A head that shares its weight with the embedding scores with the same rows. Ids beyond the base's vocabulary are new
tokens: the base is never resized, the wrapper has their rows, and the head's output gets a column for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.adapters.adapter import Adapter, TokenRows
from onebase.adapters.kinds import kind_of
from onebase.adapters.layers import Wrapper, bare, base_modules, selection, slot_key, walk
from onebase.adapters.targets import output_head
from onebase.config import LoraConfig
from onebase.errors import TargetError

ID_PREFIX = "id:"


@final
class TokenSlot(nn.Module):
    """One adapter's rows (n, width), and the ids that they stand for."""

    ids: Tensor
    order: Tensor

    def __init__(self, path: str, tokens: TokenRows) -> None:
        super().__init__()
        self.path = path  # names the rows in the adapter: a tied head has its embedding's slot
        self.rows = nn.Parameter(tokens.rows.clone(), requires_grad=False)
        ids = torch.tensor(tokens.ids, dtype=torch.int64)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("order", ids.argsort(), persistent=False)

    @property
    def top(self) -> int:
        """One more than the largest id."""
        return int(self.ids[self.order[-1]]) + 1

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """For each id whether it has a row here, and which (any, where it has none)."""
        last = len(self.ids) - 1
        place = self.order[torch.searchsorted(self.ids, ids, sorter=self.order).clamp(max=last)]
        return self.ids[place] == ids, place

    def tokens(self) -> TokenRows:
        """The rows as they are now, as a value."""
        return TokenRows(tuple(self.ids.tolist()), self.rows.detach().cpu().clone())


class Use(NamedTuple):
    """A slot and the batch's rows that it is used for, (B,) of booleans; None for all."""

    slot: TokenSlot
    mine: Tensor | None

    def choose(self, own: Tensor, other: Tensor) -> Tensor:
        """`own` in this adapter's rows of the batch, `other` in the rest."""
        return own if self.mine is None else torch.where(_over_batch(self.mine, own), own, other)


def _over_batch(mine: Tensor, like: Tensor) -> Tensor:
    return mine.view(-1, *(1,) * (like.ndim - 1))


@final
class TokenLayer(Wrapper):
    """An embedding or an output head, and the token rows of the adapters that train some.

    It stands around every other wrapper of its module, which so never sees an id that the base does not have.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.slots = nn.ModuleDict()

    def slot(self, name: str) -> TokenSlot | None:
        """An adapter's rows, None where it has none here."""
        key = slot_key(name)
        return cast("TokenSlot", self.slots[key]) if key in self.slots else None

    def add(self, name: str, slot: TokenSlot) -> None:
        """Give an adapter its rows, on the base module's device."""
        self.slots[slot_key(name)] = slot.to(self.device()).train(self.training)

    def remove(self, name: str) -> None:
        """Take an adapter's rows away."""
        del self.slots[slot_key(name)]

    def _uses(self, batch: int) -> list[Use]:
        chosen = selection()
        if chosen.rows is None:
            slot = self.slot(chosen.name) if chosen.name is not None else None
            return [] if slot is None else [Use(slot, None)]
        groups = [(self.slot(name), rows) for name, rows in chosen.groups(batch)]
        return [
            Use(slot, torch.zeros(batch, dtype=torch.bool).index_fill(0, rows, True).to(self.device()))
            for slot, rows in groups
            if slot is not None
        ]

    def forward(self, x: Tensor) -> Tensor:
        """The module's output with the chosen adapter's rows, in the base's output dtype."""
        uses = self._uses(x.shape[0])
        if not uses:
            return self.base(x)
        return self._embedded(x, uses) if isinstance(bare(self), nn.Embedding) else self._scored(x, uses)

    def _embedded(self, ids: Tensor, uses: Sequence[Use]) -> Tensor:
        """The embedding of ids (B, T): (B, T, width). Gemma's embeddings multiply by `embed_scale`."""
        found: list[tuple[Tensor, Tensor]] = []
        inside = ids
        for use in uses:
            hit, place = use.slot.find(ids)
            hit = use.choose(hit, torch.zeros_like(hit))
            inside = inside.masked_fill(hit, 0)  # any row that is there
            found.append((hit, place))
        y = self.base(inside)
        for use, (hit, place) in zip(uses, found, strict=True):
            own = F.embedding(place, use.slot.rows) * getattr(bare(self), "embed_scale", 1.0)
            y = torch.where(hit[..., None], own.to(y.dtype), y)
        return y

    def _scored(self, x: Tensor, uses: Sequence[Use]) -> Tensor:
        """The head's output for x (B, ..., width): a token's score changes by x · (row - the base's row).

        So rows that are still the base's give its scores to the bit. A batch's other rows give the columns of tokens
        that are new to their adapter minus infinity: such a token is never chosen and takes no probability.
        """
        y, weight = self.base(x), _weight(bare(self))
        wider = max(use.slot.top for use in uses) - y.shape[-1]
        if wider > 0:
            y = F.pad(y, (0, wider), value=float("-inf"))
        for use in uses:
            slot, known = use.slot, use.slot.ids < len(weight)
            before = torch.zeros_like(slot.rows)
            before[known] = weight[slot.ids[known]].to(before.dtype)
            scores = y.index_select(-1, slot.ids).masked_fill(~known, 0.0)
            scores = scores + F.linear(x.to(slot.rows.dtype), slot.rows - before)
            y = use.choose(y.index_copy(-1, slot.ids, scores.to(y.dtype)), y)
        return y


def add_tokens(model: nn.Module, name: str, tokens: Mapping[str, TokenRows]) -> None:
    """Give an adapter's rows to the token layers of their modules, and of those tied to them."""
    places = token_places(dict(base_modules(model)), tokens)
    slots = {path: TokenSlot(path, rows) for path, rows in tokens.items()}
    for path, _, around in walk(model):
        for layer in around:
            if path in places and isinstance(layer, TokenLayer):
                layer.add(name, slots[places[path]])


def token_slots(model: nn.Module, name: str) -> dict[str, TokenSlot]:
    """An adapter's rows on a model, by the paths that name them."""
    layers = (layer for _, _, around in walk(model) for layer in around if isinstance(layer, TokenLayer))
    return {slot.path: slot for layer in layers if (slot := layer.slot(name)) is not None}


def _weight(module: nn.Module) -> Tensor:
    return cast("Tensor", module.weight)


def token_ids(config: LoraConfig) -> tuple[int, ...]:
    """The ids that a config names. Raises TargetError for a text: only a tokenizer knows its id."""
    texts = [name for name in config.trainable_tokens if not is_id(name)]
    if texts:
        hint = "name ids here, as id:N; training looks texts up in the base's tokenizer"
        raise TargetError(f"trainable_tokens {','.join(texts)}", "texts, not ids", hint=hint)
    return tuple(sorted({int(name.removeprefix(ID_PREFIX)) for name in config.trainable_tokens}))


def is_id(name: str) -> bool:
    """Whether a name in `trainable_tokens` is `id:N`."""
    return name.startswith(ID_PREFIX) and name.removeprefix(ID_PREFIX).isdecimal()


def token_targets(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Path -> ids of the rows that a config trains: of the input embedding, and of a head that is not tied to it.

    Raises TargetError where the model names no input embedding.
    """
    ids = token_ids(config)
    if not ids:
        return {}
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    if not isinstance(embedding, nn.Module) or not isinstance(embedding := bare(embedding), nn.Embedding):
        raise TargetError("trainable_tokens", "the model names no input embedding")
    ends: list[nn.Module] = [embedding]
    head = output_head(model)
    if isinstance(head, nn.Linear) and head.weight is not embedding.weight:
        ends.append(head)
    paths = {module: path for path, module in reversed(list(base_modules(model)))}
    return {paths[module]: ids for module in ends}


def start_rows(module: nn.Module, ids: Sequence[int], new: Iterable[int]) -> TokenRows:
    """What training starts from: a token's own row; for the `new` ones, and those beyond the rows, the rows' mean.

    The mean is what transformers' resizing draws new rows around (Hewitt 2021, "Initializing new word embeddings
    for pretrained language models"); without its noise, so that a run is the same each time.
    """
    weight = _weight(module).detach()
    fresh = {token for token in ids if token in set(new) or token >= len(weight)}
    mean = weight.mean(0, dtype=torch.float32) if fresh else torch.empty(0)
    rows = [mean if token in fresh else weight[token].to(torch.float32) for token in ids]
    return TokenRows(tuple(ids), torch.stack(rows))


def tied_places(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """The other modules that use an embedding's weight as theirs; a head's rows are its own."""
    own = modules[path]
    if not isinstance(own, nn.Embedding):
        return []
    return [
        other
        for other, module in modules.items()
        if module is not own and kind_of(module) in ("embedding", "linear") and module.weight is own.weight
    ]


def token_places(modules: Mapping[str, nn.Module], tokens: Mapping[str, TokenRows]) -> dict[str, str]:
    """Module -> the path whose rows it uses: each named one its own, and those tied to it where not named."""
    tied = {other: path for path in tokens for other in tied_places(modules, path)}
    return tied | {path: path for path in tokens}


def token_problems(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[str]:
    """Why token rows do not fit a model: a sentence each, none where they fit."""
    misfits = {path: _misfit(modules, path, tokens) for path, tokens in adapter.tokens.items()}
    problems = [f"{path}: {text}" for path, text in misfits.items() if text]
    if problems:
        return problems
    for place, path in token_places(modules, adapter.tokens).items():
        at = place if place == path else f"{place} (tied to {path})"
        if place in adapter.full:
            problems.append(f"{at}: has trained token rows and is trained in full")
        if place in adapter.lowrank and kind_of(modules[place]) == "linear":
            problems.append(f"{at}: has trained token rows and a low-rank update, which would overlap")
    read, predicted = (_new_ids(modules, adapter.tokens, kind) for kind in ("embedding", "linear"))
    if unread := sorted(predicted - read):
        heads = ", ".join(path for path in adapter.tokens if kind_of(modules[path]) == "linear")
        problems.append(f"{heads}: predicts tokens {unread[:8]}, which no embedding of the adapter reads")
    return problems


def _new_ids(modules: Mapping[str, nn.Module], tokens: Mapping[str, TokenRows], kind: str) -> set[int]:
    """The ids beyond the base's vocabulary that modules of a kind have rows for."""
    named = {path: rows.ids for path, rows in tokens.items() if kind_of(modules[path]) == kind}
    return {token for path, ids in named.items() for token in ids if token >= len(_weight(modules[path]))}


def growth_problems(model: nn.Module, tokens: Mapping[str, TokenRows]) -> list[str]:
    """Why weights cannot grow by new tokens: the embedding and the head must both, and a head's bias could not."""
    modules, head = dict(base_modules(model)), output_head(model)
    read = _new_ids(modules, tokens, "embedding")
    if not read or head is None:
        return []
    places = token_places(modules, tokens)
    served = [place for place in places if modules[place] is head]
    if not served or set(tokens[places[served[0]]].ids) < read:
        return [
            f"the head has no rows for new tokens ({sorted(read)[:8]}), so it cannot grow as the embedding does"
        ]
    if getattr(head, "bias", None) is not None:
        return [f"{served[0]}: its bias has no values for new tokens ({sorted(read)[:8]})"]
    return []


def _misfit(modules: Mapping[str, nn.Module], path: str, tokens: TokenRows) -> str:
    module = modules.get(path)
    if module is None:
        return "the base has no such module"
    if kind_of(module) not in ("embedding", "linear"):
        return f"the base has a {type(module).__name__}, which has no token rows"
    vocabulary, width = _weight(module).shape
    if tokens.rows.shape != (len(tokens.ids), width):
        return f"{len(tokens.ids)} token rows of {tuple(tokens.rows.shape)}, the base's are {width} wide"
    if len(set(tokens.ids)) < len(tokens.ids) or min(tokens.ids, default=-1) < 0:
        return f"token ids {list(tokens.ids)[:8]}: each must be there once, and none negative"
    new = sorted(token for token in tokens.ids if token >= vocabulary)
    if new and new != list(range(vocabulary, vocabulary + len(new))):
        return f"token ids {new[:8]}: the base has {vocabulary} rows, and new ones must follow without a gap"
    return ""
