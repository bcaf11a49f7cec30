"""A decoder model as the engine sees it: weights and numbers read off transformers' modules, which stay as they are.

A model is accepted only where each of its modules is transformers' or torch's own and accounted for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onebase.adapters.layers import LoraLayer, TrainedModule, Wrapper, bare, walk
from onebase.errors import BaseError
from onebase.models.families import ACTIVATIONS, FAMILIES, LENGTH_DEPENDENT, Family
from onebase.ops.adapted import Linear
from onebase.ops.cross_entropy import Head
from onebase.ops.decoder import Attention, Groups, Layer, Norms
from onebase.ops.norms import Norm
from onebase.ops.prefix import Scoring
from onebase.ops.rotary import Rotation

HARMLESS = (nn.ModuleList, nn.Dropout)  # in eval mode, in which a base always trains


class Unsupported(BaseError):
    """A model or adapter that the engine does not compute; `found` is the reason."""

    def __init__(self, found: str) -> None:
        super().__init__("the training engine", found, hint="the model's own forward takes it")


class ReadLayer(NamedTuple):
    """A decoder layer. `places` hold the adapters of its linear layers; None where there is none."""

    frozen: Layer
    places: Groups[tuple[LoraLayer | None, ...]]
    window: int | None
    rotary_type: str | None  # what the rotary module wants to know, if anything
    rotates: bool


class ReadModel(NamedTuple):
    """A decoder. The embedding and rotary modules are called, all else is read."""

    embed: nn.Module
    embedding: float
    rotary: nn.Module
    interleaved: bool
    layers: tuple[ReadLayer, ...]
    norm: Norm
    head: Head

    def rotations(self, positions: Tensor, like: Tensor) -> dict[str | None, Rotation]:
        """The angles of these positions (T,), in `like`'s dtype, for each type of layer that rotates."""
        found: dict[str | None, Rotation] = {}
        for kind in {layer.rotary_type for layer in self.layers if layer.rotates}:
            with torch.no_grad():
                angles = self.rotary(
                    like.new_empty(1, 1, 1), positions.to(like.device)[None], *([kind] if kind else [])
                )
            # transformers gives each pair's angle twice: once for each of its channels.
            half = angles[0].shape[-1] // 2
            once = slice(None, None, 2) if self.interleaved else slice(half)
            cos, sin = (part[0, :, once].contiguous() for part in angles)
            found[kind] = Rotation(cos, sin, self.interleaved)
        return found


def read_model(model: nn.Module, names: Sequence[str]) -> ReadModel:
    """The model with the adapters of these names, as the engine sees it. Raises Unsupported with the reason."""
    kind = type(model)
    family = FAMILIES.get(kind.__name__)
    if family is None or not kind.__module__.startswith("transformers.models."):
        raise Unsupported(f"{kind.__name__} is not a model that it knows")
    reader = _Reader(model, names, family)
    found = reader.model()
    reader.check_all_known()
    return found


class _Reader:
    """Reads a model by its family's row, and remembers which modules were accounted for."""

    def __init__(self, model: nn.Module, names: Sequence[str], family: Family) -> None:
        self.root, self.names, self.family = model, names, family
        self.config: Any = model.config
        self.known: set[nn.Module] = {model}
        self.places: set[LoraLayer] = set()

    def take(self, parent: nn.Module, child: str) -> Any:
        """A module's child, without the wrappers around it."""
        module = getattr(parent, child, None)
        if not isinstance(module, nn.Module):
            raise Unsupported(f"{type(parent).__name__} has no {child}")
        module = bare(module)
        self.known.add(module)
        return module

    def model(self) -> ReadModel:
        """The whole model."""
        family, config = self.family, self.config
        body = self.take(self.root, "model")
        rotary = self.take(body, "rotary_emb")
        types = rotary.rope_type.values() if isinstance(rotary.rope_type, dict) else [rotary.rope_type]
        if changing := LENGTH_DEPENDENT.intersection(types):
            raise Unsupported(f"its rotary frequencies change with the length of a row ({min(changing)})")
        layers = self.take(body, "layers")
        if len(layers) != config.num_hidden_layers:
            raise Unsupported(f"it has {len(layers)} layers and uses {config.num_hidden_layers}")
        head, _ = self.linears(self.root, ["lm_head"], adapted=False)
        return ReadModel(
            self.take(body, "embed_tokens"),
            family.embedding(config),
            rotary,
            family.interleaved,
            tuple(self.layer(bare(layer)) for layer in layers),
            self.norm(body, "norm"),
            Head(*head[0], family.logits(config), family.logit_softcap(config)),
        )

    def layer(self, layer: nn.Module) -> ReadLayer:
        """A decoder layer."""
        self.known.add(layer)
        family = self.family
        attention, mlp = self.take(layer, "self_attn"), self.take(layer, "mlp")
        names = Groups(["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"])
        if family.fused:
            names = names._replace(qkv=["qkv_proj"], gate_up=["gate_up_proj"])
        owners = Groups(attention, attention, mlp, mlp)
        read = [self.linears(owner, group) for owner, group in zip(owners, names, strict=True)]
        linears = Groups(*(group for group, _ in read))
        norms = Norms(*(self.norm(layer, name) if name else None for name in family.norms))
        act = "activation_fn" if family.fused else "act_fn"
        activation = ACTIVATIONS.get(type(self.take(mlp, act)).__name__)
        if activation is None:
            raise Unsupported(f"its activation is a {type(getattr(mlp, act)).__name__}")
        spec = self.attention(attention)
        if sum(spec.sizes) != sum(linear.weight.shape[0] for linear in linears.qkv):
            raise Unsupported(f"its attention's projections do not have the sizes {spec.sizes}")
        return ReadLayer(
            Layer(linears, spec, norms, activation, family.residual(self.config), family.parallel),
            Groups(*(places for _, places in read)),
            family.window(attention),
            family.rotary_type(attention),
            family.rotates(attention),
        )

    def attention(self, module: Any) -> Attention:
        """An attention module's shapes, scores and norms."""
        if not module.is_causal:
            raise Unsupported("its attention is not causal")
        q_norm, k_norm = (
            self.norm(module, name) if hasattr(module, name) else None for name in ("q_norm", "k_norm")
        )
        heads, width = self.config.num_attention_heads, module.head_dim
        return Attention(
            heads,
            self.config.num_key_value_heads,
            width,
            Scoring(module.scaling, self.family.softcap(module)),
            q_norm,
            k_norm,
            per_head=q_norm is None or q_norm.weight.shape[-1] == width,
        )

    def norm(self, parent: nn.Module, name: str) -> Norm:
        """A norm with its weight as it is multiplied by, in at least float32."""
        module = self.take(parent, name)
        if type(module).__module__ != type(self.root).__module__:
            raise Unsupported(f"its {name} is a {type(module).__name__} of {type(module).__module__}")
        weight = module.weight.detach()
        eps = getattr(module, "variance_epsilon", None)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.family.norm_offset
        return Norm(wide, module.eps if eps is None else eps, self.family.centred)

    def linears(
        self, parent: nn.Module, names: list[str], adapted: bool = True
    ) -> tuple[tuple[Linear, ...], tuple[LoraLayer | None, ...]]:
        """Linear layers, and the wrappers that hold these adapters' updates of them."""
        layers: list[Linear] = []
        places: list[LoraLayer | None] = []
        for name in names:
            module, outer = self.take(parent, name), getattr(parent, name)
            if type(module) is not nn.Linear or not module.weight.is_floating_point():
                raise Unsupported(f"its {name} is a {type(module).__name__}")
            tensors = {key: tensor.detach() for key, tensor in module.named_parameters()}
            layers.append(Linear(tensors["weight"], tensors.get("bias")))
            held = adapted and isinstance(outer, LoraLayer) and any(map(outer.slot, self.names))
            places.append(outer if held else None)
        self.places.update(place for place in places if place is not None)
        return tuple(layers), tuple(places)

    def check_all_known(self) -> None:
        """Raise Unsupported where a module, a hook or a part of an adapter would be passed over."""
        home = type(self.root).__module__
        for path, module, around in walk(self.root):
            own = type(module).__module__
            if module not in self.known and not isinstance(module, HARMLESS):
                raise Unsupported(f"it does not know {path} ({type(module).__name__})")
            if own != home and not own.startswith(("torch.nn.", "transformers.activations")):
                raise Unsupported(f"{path} is a {type(module).__name__} of {own}")
            if "forward" in vars(module) or _hooks(module) or any(map(_hooks, around)):
                raise Unsupported(f"{path} has a hook or a forward of its own")
            for wrapper in around:
                for name in self.names:
                    self.check_wrapper(path, wrapper, name)

    def check_wrapper(self, path: str, wrapper: Wrapper, name: str) -> None:
        """Raise Unsupported where this adapter changes something that the engine does not compute."""
        if not isinstance(wrapper, LoraLayer):
            held = wrapper.copy if isinstance(wrapper, TrainedModule) else wrapper.slot
            if held(name) is not None:
                raise Unsupported(f"the adapter has more than an update at {path} ({type(wrapper).__name__})")
        elif (slot := wrapper.slot(name)) is not None:
            low = slot.low()
            if wrapper not in self.places or low.kind != "linear" or low.blocks != 1:
                raise Unsupported(f"the adapter changes {path}, of kind {low.kind}")
            if low.magnitude is not None or low.bias is not None:
                raise Unsupported(f"the adapter has a magnitude or a bias at {path}")


def _hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward; a wrapper's own hook does nothing."""
    own = 1 if isinstance(module, Wrapper) else 0
    return bool(module._forward_hooks) or len(module._forward_pre_hooks) > own  # pyright: ignore[reportPrivateUsage]
