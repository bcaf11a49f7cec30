"""`Adapter`: a plain, frozen value. Training makes it, the format stores it, injection puts it on a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from onebase.config import LoraConfig
from onebase.ops.lowrank import Factors

LayerKind = Literal["linear", "transposed", "embedding", "conv", "parameter", "parameter_transposed"]
"""What an update belongs to: a linear layer, one whose weight is stored (in, out) (GPT-2's Conv1D), an embedding,
a convolution, or a parameter that its module uses directly (fused attention inputs, experts), stored either way.
"""


class LowRank(NamedTuple):
    """One module's update, all in float32: the weight changes by scale·B·A.

    A: (g·r, i), B: (g·o, r). g is the number of `blocks`: 1, or the experts of a three-dimensional parameter, each
    with factors of its own. For a convolution i counts input channels times kernel positions.
    """

    A: Tensor
    B: Tensor
    scale: float
    kind: LayerKind = "linear"
    blocks: int = 1
    kernel: tuple[int, ...] = ()  # a convolution's
    bias: Tensor | None = None  # (o,): the output moves by scale·bias (PEFT's lora_bias)
    magnitude: Tensor | None = None  # (o,): the norms that the rows of W + scale·B·A are given (DoRA)

    @property
    def rank(self) -> int:
        """The number of rows of A, in each block."""
        return self.A.shape[0] // self.blocks

    @property
    def factors(self) -> Factors:
        """What the ops work on."""
        return Factors(self.A, self.B, self.scale, self.blocks)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field name."""
        found = {"A": self.A, "B": self.B, "bias": self.bias, "magnitude": self.magnitude}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class TokenRows(NamedTuple):
    """What stands in an embedding's rows for some tokens, in place of its own: rows (n, width), float32.

    Rows, not differences (PEFT's trainable tokens). An id beyond the base's vocabulary is a new token.
    """

    ids: tuple[int, ...]
    rows: Tensor


def joined(first: LowRank, second: LowRank) -> LowRank:
    """One update of both ranks whose B·A is the sum of theirs; the first one's scale and other fields stay."""
    parts = (first, second)
    a = torch.cat([low.A.unflatten(0, (low.blocks, -1)) for low in parts], dim=1).flatten(0, 1)
    return first._replace(A=a, B=torch.cat([low.B for low in parts], dim=1))


def parted(low: LowRank, rank: int) -> tuple[LowRank, LowRank]:
    """The update's first `rank` ranks, and the others: what `joined` puts together."""
    blocks = low.A.unflatten(0, (low.blocks, -1))
    head, tail = blocks[:, :rank].flatten(0, 1), blocks[:, rank:].flatten(0, 1)
    return low._replace(A=head, B=low.B[:, :rank]), low._replace(A=tail, B=low.B[:, rank:])


def block(low: LowRank, number: int) -> LowRank:
    """One block of an update as an update of its own, such as the one of a single expert."""
    own = {name: t.unflatten(0, (low.blocks, -1))[number] for name, t in low.tensors().items()}
    return low._replace(blocks=1, **own)


HEAD_TASK = "SEQ_CLS"  # PEFT's task_type of adapters that carry a head for whole rows
VECTOR_TASK = "FEATURE_EXTRACTION"  # and of those whose base gives states, of which vectors are made


@dataclass(frozen=True)
class Origin:
    """Where an adapter came from: what must be known to use it rightly, and what is good to know."""

    base: str = ""  # base_model_name_or_path
    fingerprint: str = ""  # digest of the base's stored tensors; empty where the maker did not record it
    task: str = "CAUSAL_LM"  # PEFT's task_type; empty for none
    prompt: Mapping[str, Any] = field(default_factory=dict[str, Any])  # how training rendered a prompt
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])  # steps, data, settings
    tokens: Mapping[str, int] = field(default_factory=dict[str, int])  # new to the tokenizer: text -> id
    head: Mapping[str, Any] = field(
        default_factory=dict[str, Any]
    )  # what a head's outputs mean (data.labels.Head), or how vectors are made (models.embedder.Embedder)

    @property
    def has_head(self) -> bool:
        """Whether the adapter reads whole texts, with a head of its own, instead of writing them."""
        return self.task == HEAD_TASK

    @property
    def embeds(self) -> bool:
        """Whether the adapter makes a vector of a text."""
        return self.task == VECTOR_TASK

    @property
    def writes(self) -> bool:
        """Whether the adapter is for a base that writes text."""
        return not self.has_head and not self.embeds


@dataclass(frozen=True, eq=False)
class Adapter:
    """A set of low-rank updates, and the few modules that were trained in full.

    `lowrank` maps a module's path in the base to its update; `full` maps a module's path to that module's
    own tensors; `tokens` maps an embedding's path to the rows of some tokens. Two adapters are
    equal when their configs, origins and tensors are, bit for bit.
    """

    config: LoraConfig
    lowrank: Mapping[str, LowRank]
    full: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Mapping[str, Tensor]])
    origin: Origin = Origin()
    tokens: Mapping[str, TokenRows] = field(default_factory=dict[str, TokenRows])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a readable name: `path.A`, `path.B` and so on, `path.rows`, or `path.<parameter>`."""
        named = {f"{path}.{n}": t for path, low in self.lowrank.items() for n, t in low.tensors().items()}
        named |= {f"{path}.{name}": t for path, state in self.full.items() for name, t in state.items()}
        return named | {f"{path}.rows": tokens.rows for path, tokens in self.tokens.items()}

    @property
    def parameters(self) -> int:
        """The number of trained values."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        mine, theirs = self.tensors(), other.tensors()
        facts = [
            (
                *(a.config, a.origin, {p: low[2:6] for p, low in a.lowrank.items()}),  # scale to kernel
                {p: tokens.ids for p, tokens in a.tokens.items()},
            )
            for a in (self, other)
        ]
        return (
            facts[0] == facts[1]
            and mine.keys() == theirs.keys()
            and all(_same_bits(tensor, theirs[name]) for name, tensor in mine.items())
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # holds tensors: compared, never hashed


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype, shape and every bit: unlike torch.equal, -0.0 is not 0.0 and a NaN equals itself."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)
