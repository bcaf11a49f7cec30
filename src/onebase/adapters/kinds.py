"""What can carry an update, and how: a row for each kind of layer, and the places (sites) that a base has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from onebase.adapters.adapter import LayerKind, LowRank
from onebase.ops.lowrank import effective_weight, lowrank, lowrank_channels, lowrank_rows

# (base layer, input, update) -> s·B·A times the input, to be added to the layer's output
Product = Callable[[Any, Tensor, LowRank], Tensor]


class Kind(NamedTuple):
    """How one sort of base layer meets its update."""

    accepts: Callable[[nn.Module], bool]
    shape: Callable[[Any], tuple[int, int]]  # (in, out); a convolution's in counts kernel positions too
    product: Product
    transposed: bool = False  # the base stores (in, out) instead of (out, in)


def _is(*types: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, types)


def _is_transposed_linear(module: nn.Module) -> bool:
    """transformers' Conv1D, told by its structure: a 2-D (in, out) weight and `nf` = out."""
    weight = getattr(module, "weight", None)
    return (
        hasattr(module, "nf")
        and isinstance(weight, Tensor)
        and weight.ndim == 2
        and weight.shape[1] == module.nf
    )


def _is_convolution(module: nn.Module) -> bool:
    """Not a grouped one: it has no W that a single B·A could be added to (PEFT adapts it, and then cannot merge it)."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1


def _linear(_: nn.Module, x: Tensor, low: LowRank) -> Tensor:
    return lowrank(x, low.factors)


def _embedding(base: nn.Embedding, ids: Tensor, low: LowRank) -> Tensor:
    """Gemma's embeddings multiply their output by `embed_scale`; the update must be multiplied too."""
    return lowrank_rows(ids, low.factors) * getattr(base, "embed_scale", 1.0)


def _convolution(base: Any, x: Tensor, low: LowRank) -> Tensor:
    """The base's own convolution (its stride, padding, padding mode and dilation) with A as its kernel, then B."""
    kernel = low.A.reshape(low.A.shape[0], -1, *low.kernel)
    return lowrank_channels(base._conv_forward(x.to(low.A.dtype), kernel, None), low.factors, len(low.kernel))


def _weight_product(*_: Any) -> Tensor:
    raise AssertionError("a parameter's update is added to the parameter, never to an output")


def _linear_shape(m: nn.Linear) -> tuple[int, int]:
    return m.in_features, m.out_features


def _stored_shape(m: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer that stores its weight so: Conv1D, and an embedding (vocabulary, width)."""
    rows, columns = cast("Tensor", m.weight).shape
    return rows, columns


def _convolution_shape(m: nn.Module) -> tuple[int, int]:
    weight = cast("Tensor", m.weight)
    return weight[0].numel(), weight.shape[0]


def _never(module: nn.Module) -> bool:
    return False


KINDS: dict[LayerKind, Kind] = {
    "linear": Kind(_is(nn.Linear), _linear_shape, _linear),
    "transposed": Kind(_is_transposed_linear, _stored_shape, _linear, transposed=True),
    "embedding": Kind(_is(nn.Embedding), _stored_shape, _embedding, transposed=True),
    "conv": Kind(_is_convolution, _convolution_shape, _convolution),
    # A parameter is no module: `find_site` finds it, and its module is called with W + s·B·A in its place.
    "parameter": Kind(_never, _stored_shape, _weight_product),
    "parameter_transposed": Kind(_never, _stored_shape, _weight_product, transposed=True),
}


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a base layer, None where it cannot carry an update as a module."""
    return next((name for name, kind in KINDS.items() if kind.accepts(module)), None)


def why_not(module: nn.Module) -> str:
    """What to say of a module that cannot carry an update."""
    name = f"a {type(module).__name__}"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"{name} of {module.groups} groups, which has no single W that B·A could be added to"
    return f"{name}, which carries no update (kinds: {', '.join(KINDS)})"


def is_parameter(kind: LayerKind) -> bool:
    """Whether the update belongs to a parameter that its module uses without calling a layer."""
    return kind in ("parameter", "parameter_transposed")


class Site(NamedTuple):
    """A place for an update: a module's weight, or a parameter. `shape` is (in, out), of each block."""

    owner: str  # path of the module that carries it
    name: str  # the parameter that changes, seen from the owner
    kind: LayerKind
    shape: tuple[int, int]
    blocks: int = 1
    kernel: tuple[int, ...] = ()

    @property
    def tensor(self) -> str:
        """The full name of the parameter that changes."""
        return f"{self.owner}.{self.name}" if self.owner else self.name


class Target(NamedTuple):
    """A site that gets an update, under the path that names it in an adapter."""

    path: str
    site: Site
    rank: int
    scale: float


def find_site(modules: Mapping[str, nn.Module], path: str) -> Site | None:
    """The site of this path (a module's, or a parameter's full name) among a base's modules, None if there is none."""
    owner, _, name = path.rpartition(".")
    attention, _, inner = owner.rpartition(".")
    if path in modules:
        # nn.MultiheadAttention reads its projection's weight and never calls it: only that weight is a site.
        read = isinstance(modules.get(owner), nn.MultiheadAttention)
        return None if read else _module_site(path, modules[path])
    if isinstance(modules.get(attention), nn.MultiheadAttention):
        owner, name = attention, f"{inner}.{name}"
    return _parameter_site(owner, name, modules[owner]) if owner in modules else None


def _module_site(path: str, module: nn.Module) -> Site | None:
    kind = kind_of(module)
    if kind is None:
        return None
    kernel = tuple(cast("Tensor", module.weight).shape[2:]) if kind == "conv" else ()
    return Site(path, "weight", kind, KINDS[kind].shape(module), kernel=kernel)


def _parameter_site(owner: str, name: str, module: nn.Module) -> Site | None:
    try:
        weight = module.get_parameter(name)
    except AttributeError:
        return None
    # A parameter of the model itself has no module around it that could stand aside for a changed one.
    if weight.ndim not in (2, 3) or not weight.is_floating_point() or not owner:
        return None
    # transformers marks experts that are stored (experts, in, out) so; PEFT reads the same mark.
    turned = weight.ndim == 3 and bool(getattr(module, "is_transposed", False))
    rows, columns = weight.shape[-2:]
    shape = (rows, columns) if turned else (columns, rows)
    blocks = weight.shape[0] if weight.ndim == 3 else 1
    return Site(owner, name, "parameter_transposed" if turned else "parameter", shape, blocks)


def merged_weight(weight: Tensor, low: LowRank, in_place: bool = False) -> Tensor:
    """W + s·B·A (with DoRA's magnitude, if any) in the base layer's own shape and orientation.

    `in_place`: the weight's memory may become the result's; there is no way back, and no gradient.
    """
    transposed = KINDS[low.kind].transposed
    rows = weight.transpose(-1, -2) if transposed else weight
    merged = effective_weight(rows.reshape(low.B.shape[0], -1), low.factors, low.magnitude, in_place)
    merged = merged.reshape(rows.shape)
    return merged.transpose(-1, -2) if transposed else merged


def over_channels(vector_o: Tensor, low: LowRank) -> Tensor:
    """A vector with a value for each output, shaped to broadcast over the layer's output."""
    return vector_o.view(-1, *(1,) * len(low.kernel))


def as_rows(weight: Tensor, low: LowRank) -> Tensor:
    """A base weight as the (out, in) matrix that B·A is added to."""
    rows = weight.transpose(-1, -2) if KINDS[low.kind].transposed else weight
    return rows.detach().to(torch.promote_types(rows.dtype, torch.float32)).reshape(low.B.shape[0], -1)


def blocks_of(site: Site, weight: Tensor) -> Tensor:
    """The site's weight as (g, o, i), the matrices that its blocks' B·A are added to, in at least float32."""
    rows = weight.mT if KINDS[site.kind].transposed else weight
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide.reshape(site.blocks, site.shape[1], site.shape[0])
