"""Merging a stored base: the empty model that its files are for, and a check of what was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import injected
from onebase.errors import BaseError, BaseMismatch, DataError
from onebase.models.base import Base, check_folder, family_of, load_base, wrap_base
from onebase.models.fingerprint import fingerprint_files
from onebase.models.gguf import quiet
from onebase.models.stored import sources_of
from onebase.models.vocabulary import tokenizer_files
from onebase.storage.format import load_adapter, read_files, read_stored
from onebase.storage.shards import list_tensors, read_tensor
from onebase.transforms.merge import MergePlan, Skeleton, make_plan, merged, stored_name

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small robot that",
    "def add(a, b):\n    return",
)


def plan_merge(
    folder: str | Path, adapter: Adapter | str | Path, allow_base_mismatch: bool = False
) -> MergePlan:
    """Check that an adapter (or its folder) fits a model folder, and plan its merge; no weight is loaded.

    Raises BaseMismatch that lists every problem at once, FormatError for broken files, BaseError for a folder
    that is no model. `allow_base_mismatch` lets another fingerprint pass, nothing else.
    """
    if not isinstance(adapter, Adapter):
        return plan_for(*open_pair(folder, adapter, allow_base_mismatch))
    base, theirs = open_skeleton(folder, _paths(adapter)), adapter.origin.fingerprint
    if theirs and theirs != base.fingerprint and not allow_base_mismatch:
        asked = f"the adapter cannot be merged into {folder}"
        found = f"made for base {adapter.origin.base}, {theirs}; this base has {base.fingerprint}"
        raise BaseMismatch(asked, found, hint="--allow-base-mismatch to go on")
    return plan_for(base, adapter)


def plan_for(base: Skeleton, adapter: Adapter) -> MergePlan:
    """`make_plan`, with a tokenizer that knows the tokens which the adapter added."""
    return replace(make_plan(base, adapter), files=tokenizer_files(base.folder, adapter.origin.tokens))


def open_pair(
    base: str | Path, adapter: str | Path, allow_base_mismatch: bool = False
) -> tuple[Skeleton, Adapter]:
    """A base without weights, and an adapter's folder as `load_adapter` proves that it belongs to it.

    Of the base's weights it reads those that the adapter carries a copy of, and the vectors beside a copied bias.
    """
    files = read_files(adapter)
    stored = read_stored(files)
    skeleton = open_skeleton(base, _paths(stored.adapter))
    infos = {info.name: info for info in skeleton.tensors}
    copied = {
        name: read_tensor(infos[owner])
        for name in (*stored.base_copies, *_beside_biases(skeleton.model, stored.base_copies))
        if (owner := stored_name(skeleton, name))
    }
    skeleton.model.load_state_dict(copied, strict=False, assign=True)
    return skeleton, load_adapter(files, skeleton, allow_base_mismatch)


def _beside_biases(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The other vectors of the modules that these biases belong to: a norm's weight, not a layer's."""
    modules = dict(model.named_modules())
    paths = [name.removesuffix(".bias") for name in names if name.endswith(".bias")]
    found = [(path, n, t) for path in paths if path in modules for n, t in modules[path].state_dict().items()]
    return [f"{path}.{name}" for path, name, tensor in found if tensor.ndim == 1 and name != "bias"]


def _paths(adapter: Adapter) -> list[str]:
    return [*adapter.lowrank, *adapter.full, *adapter.tokens]


def open_skeleton(folder: str | Path, paths: Iterable[str] = ()) -> Skeleton:
    """A model folder's modules without their weights, by transformers' own rules for the names in its files.

    The model is the one that `load_base` gives; or the architecture that the configuration names (an encoder with
    its task head, a vision transformer), where that has modules of these paths and the other has not.
    """
    folder = Path(folder)
    check_folder(folder, folder)
    tensors = tuple(list_tensors(folder))
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                model = _model_with(config, set(paths))
        except (
            OSError,
            ValueError,
            KeyError,
        ) as error:  # transformers reports a bad configuration in many ways
            raise BaseError(f"cannot merge into {folder}", str(error).strip()) from error
    loose: Any = type(config).from_dict(config.to_dict() | {"tie_word_embeddings": False})
    sources = sources_of(model, tensors, folder / "config.json")
    return Skeleton(
        folder=folder,
        model=model,
        tensors=tensors,
        stored=sources.plain,
        ties=model.all_tied_weights_keys,
        # Encoder-decoders scale their output by the setting (Switch, UMT5), or force it (T5).
        unties=not loose.tie_word_embeddings and not config.is_encoder_decoder,
        fingerprint=fingerprint_files(folder),
        fusions=sources.fusions,
    )


def _model_with(config: Any, paths: set[str]) -> Any:
    """An empty model of this configuration that has these paths, if one of two does; else the first."""
    name = (config.architectures or ["none named"])[0]
    family, own = family_of(name) if config.architectures else None, getattr(transformers, name, None)
    makers: list[Any] = [family[1].from_config] if family else []
    if isinstance(own, type) and issubclass(own, PreTrainedModel):
        makers.append(own)
    if not makers:
        raise ValueError(f"{name}: not an architecture that transformers has")
    models = [makers[0](config)]
    if len(makers) > 1 and not paths <= _names(models[0]):
        models.append(makers[1](config))
    return next((model for model in models if paths <= _names(model)), models[0])


def _names(model: nn.Module) -> set[str]:
    """The paths of all modules and parameters."""
    return {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}


class MergeCheck(NamedTuple):
    """A merged model against base and adapter, in logits (an encoder: in hidden states), all computed in float32."""

    tokens: int
    largest: float  # the largest absolute logit, to compare the others with
    difference: float  # largest difference, merged file against base and adapter
    rounding: float  # of that: merged file against the same weights kept in float32
    same_choice: float  # share of the positions where both have the same likeliest token


def check_merge(
    base: str | Path, adapter: Adapter, output: str | Path, prompts: Sequence[str] = PROMPTS
) -> MergeCheck:
    """Compare a merged model with its base and adapter on a few prompts. Loads one model at a time.

    Fixed token ids stand in for the prompts where there is no tokenizer, fixed noise for pictures.
    """
    before = _loaded(base, adapter)
    rows = _rows(before, prompts)
    with injected(before.model, adapter):
        wanted = [_outputs(before, row) for row in rows]
    with merged(before.model, adapter):
        exact = [_outputs(before, row) for row in rows]
    del before
    after = _loaded(output, adapter)
    got = [_outputs(after, row) for row in rows]
    choices = torch.cat([(g.argmax(-1) == w.argmax(-1)).float() for g, w in zip(got, wanted, strict=True)])
    return MergeCheck(
        tokens=len(choices),
        largest=_largest(wanted),
        difference=_largest_difference(got, wanted),
        rounding=_largest_difference(got, exact),
        same_choice=float(choices.mean()),
    )


class LogitCheck(NamedTuple):
    """Two adapters on the same base, in logits (an encoder: in hidden states), computed in float32."""

    tokens: int
    largest: float  # the largest absolute logit, to compare the difference with
    difference: float
    same_choice: float  # share of the positions where both have the same likeliest token


def check_adapters(
    base: str | Path, source: Adapter, result: Adapter, prompts: Sequence[str] = PROMPTS
) -> LogitCheck:
    """Compare what two adapters make of a base on a few prompts."""
    loaded = _loaded(base, source)
    rows = _rows(loaded, prompts)
    wanted, got = _outputs_with(loaded, (source, result), rows)
    return _logit_check(got, wanted)


class TunedCheck(NamedTuple):
    """An adapter on its base, and the plain base, each against a tuned model of the same architecture."""

    adapter: LogitCheck
    plain: LogitCheck


def check_tuned(
    base: str | Path, adapter: Adapter, tuned: str | Path, prompts: Sequence[str] = PROMPTS
) -> TunedCheck:
    """How near an adapter brings a base to a tuned model on a few prompts. Loads one model at a time."""
    before = _loaded(base, adapter)
    rows = _rows(before, prompts)
    found = _outputs_with(before, (adapter, None), rows)
    del before
    after = _loaded(tuned, adapter)
    wanted = [_outputs(after, row) for row in rows]
    return TunedCheck(*(_logit_check(got, wanted) for got in found))


def _outputs_with(
    base: Base, adapters: Iterable[Adapter | None], rows: Sequence[Mapping[str, Tensor]]
) -> list[list[Tensor]]:
    """For each adapter, None for the plain base, the outputs of each row."""
    found: list[list[Tensor]] = []
    for adapter in adapters:
        with injected(base.model, adapter):
            found.append([_outputs(base, row) for row in rows])
    return found


def _logit_check(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> LogitCheck:
    choices = torch.cat([(g.argmax(-1) == w.argmax(-1)).float() for g, w in zip(got, wanted, strict=True)])
    largest = _largest(wanted)
    return LogitCheck(len(choices), largest, _largest_difference(got, wanted), float(choices.mean()))


def _loaded(folder: str | Path, adapter: Adapter) -> Base:
    """The model that `open_skeleton` chooses for this adapter, with its weights, in float32."""
    kind: Any = type(open_skeleton(folder, _paths(adapter)).model)
    base = load_base(folder, "float32")
    if type(base.model) is kind:
        return base
    with quiet():
        model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return wrap_base(model, base.tokenizer, base.name)


def _rows(base: Base, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    """The model's inputs for each prompt, a batch of one."""
    model: Any = base.model
    if model.main_input_name == "pixel_values":
        shape = (1, model.config.num_channels, *_pair(model.config.image_size))
        return [{"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}]
    if base.tokenizer is None:
        words = model.get_input_embeddings().weight.shape[0]
        rows = [list(range(1, 1 + min(8, words - 1)))]
    else:
        rows = [base.tokenizer(text)["input_ids"][: base.context] for text in prompts]
    if not all(rows):
        raise DataError("check the merge", "a prompt without a single token")
    names = ("input_ids", "decoder_input_ids") if base.kind == "seq2seq" else ("input_ids",)
    return [dict.fromkeys(names, torch.tensor([row], device=base.device)) for row in rows]


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


def _outputs(base: Base, inputs: Mapping[str, Tensor]) -> Tensor:
    """(positions, vocabulary or classes) logits, or an encoder's (positions, width) hidden states."""
    with torch.no_grad():
        result: Any = base.model(**inputs)
    values = result.logits if "logits" in result else result.last_hidden_state
    return values.float().flatten(0, -2)


def _largest_difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return _largest([a - b for a, b in zip(some, others, strict=True)])


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest absolute value of all; NaN where one is (Python's max would lose it)."""
    return float(torch.stack([tensor.abs().max() for tensor in tensors]).max())
