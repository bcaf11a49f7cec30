"""A base with a head that reads a whole row: transformers' own model for it, around the frozen base's modules.

The model has the names and the forward pass of `AutoModelForSequenceClassification`, so that an adapter's paths are
those that PEFT uses. What no base has stored is drawn here, and trained in full by an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from onebase.adapters.adapter import Adapter
from onebase.adapters.variants import generator_for
from onebase.data.labels import CLASSIFY, REGRESS, Head
from onebase.errors import BaseError
from onebase.models.gguf import quiet

HEADS = ("classifier", "score")  # what transformers and PEFT call a head's last module


class Headed(NamedTuple):
    """A model with a head, and the paths of the modules that were drawn for it."""

    model: nn.Module
    drawn: tuple[str, ...]


def add_head(model: Any, outputs: int, seed: int, pad_id: int) -> Headed:
    """The model's body with a new head of this many outputs, frozen and in eval mode.

    The body's modules are the model's own, not copies. Every other module is drawn from (seed, its path), as
    transformers starts it: weights from a normal distribution, biases 0. A decoder's head reads each row's last token
    that is not `pad_id`. Raises BaseError where transformers has no such model for this architecture.
    """
    body, shell = model.base_model, _shell(model, outputs, pad_id)
    own = getattr(shell, shell.base_model_prefix, None)
    if own is None or type(own) is not type(body):
        raise _refusal(
            model, f"transformers builds one around a {type(own).__name__}, not {type(body).__name__}"
        )
    _share(body, own)
    drawn = tuple(_unstored(shell, ""))
    first = next(body.parameters())
    for path in drawn:
        _draw(shell.get_submodule(path), path, seed, getattr(model.config, "initializer_range", 0.02))
        shell.get_submodule(path).to(first.device, first.dtype)
    return Headed(shell.eval().requires_grad_(False), drawn)


def head_of(adapter: Adapter) -> Head:
    """What the adapter's head says: as recorded, else, in an adapter from elsewhere, by its number of outputs.

    transformers calls classes LABEL_0, LABEL_1 and so on where nobody named them, and a single output a regression.
    """
    if adapter.origin.head:
        return Head.from_dict(adapter.origin.head)
    last = {path.rpartition(".")[2]: list(state.items()) for path, state in adapter.full.items()}
    found = [tensors for name in HEADS for tensors in [last.get(name, [])] if tensors]
    weights = [
        tensor for name, tensor in (found[0] if found else []) if name.endswith("weight") and tensor.ndim == 2
    ]
    if not weights:
        raise BaseError("an adapter with a head", f"it has no module named {' or '.join(HEADS)}")
    outputs = len(weights[-1])  # what stands last in a head of several layers
    return Head(REGRESS) if outputs == 1 else Head(CLASSIFY, tuple(f"LABEL_{n}" for n in range(outputs)))


def _refusal(model: Any, found: str) -> BaseError:
    return BaseError(
        f"a head on a {type(model).__name__}", found, hint="use an encoder such as minilm, or a decoder"
    )


def _shell(model: Any, outputs: int, pad_id: int) -> Any:
    """transformers' model with such a head, without memory for its weights."""
    config = copy.deepcopy(model.config)
    config.num_labels = outputs
    config.get_text_config().pad_token_id = pad_id
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(model, "it is an encoder with a decoder")
    with quiet(), torch.device("meta"):
        try:
            attention = (
                model.config._attn_implementation
            )  # the masks are made by the shell, the layers are the body's
            return AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
        except ValueError as error:  # no such model for this kind of config
            raise _refusal(
                model, "transformers has no sequence classification for this architecture"
            ) from error


def _share(body: nn.Module, own: nn.Module) -> None:
    """Put the body's modules and tensors where `own`, of the same class, has such. What the body lacks stays."""
    for kind in ("_modules", "_parameters", "_buffers"):
        theirs, mine = vars(body)[kind], vars(own)[kind]
        mine |= {
            name: theirs[name]
            for name, one in mine.items()
            if one is not None and theirs.get(name) is not None
        }


def _tensors(module: nn.Module, recurse: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]


def _unstored(module: nn.Module, path: str) -> Iterator[str]:
    """The paths of the largest modules of which no tensor is in memory."""
    meta = [tensor.is_meta for tensor in _tensors(module)]
    if path and meta and all(meta):
        yield path
    elif any(meta):
        if any(tensor.is_meta for tensor in _tensors(module, recurse=False)):
            raise BaseError(
                f"a head on module {path!r}", "it has parameters of its own that no base has stored"
            )
        for name, child in module.named_children():
            yield from _unstored(child, f"{path}.{name}" if path else name)


def _draw(module: nn.Module, path: str, seed: int, spread: float) -> None:
    module.to_empty(device="cpu")
    for name, part in module.named_modules(prefix=path):
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, 0.0, spread, generator_for(name, seed))
            for bias in [tensor for tensor in part.parameters() if tensor is not part.weight]:
                nn.init.zeros_(bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif _tensors(part, recurse=False):
            raise BaseError(
                f"a head with a {type(part).__name__}", "how it starts is not known", hint="use another base"
            )
