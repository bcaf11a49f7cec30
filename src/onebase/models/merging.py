"""Merging a stored base: which tensor each parameter is loaded from, and a check of what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from onebase.adapter import Adapter
from onebase.errors import BaseError, BaseMismatch, DataError
from onebase.format import load_adapter, read_stored
from onebase.injection import injected
from onebase.merge import MergePlan, Skeleton, make_plan, merged
from onebase.models.base import Base, check_folder, family_of, load_base
from onebase.models.fingerprint import fingerprint_files
from onebase.models.gguf import quiet
from onebase.shards import list_tensors, read_tensor

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
    base = open_skeleton(folder)
    if not isinstance(adapter, Adapter):
        return make_plan(base, adapter_for(base, adapter, allow_base_mismatch))
    theirs = adapter.origin.fingerprint
    if theirs and theirs != base.fingerprint and not allow_base_mismatch:
        asked = f"the adapter cannot be merged into {folder}"
        found = f"made for base {adapter.origin.base}, {theirs}; this base has {base.fingerprint}"
        raise BaseMismatch(asked, found, hint="--allow-base-mismatch to go on")
    return make_plan(base, adapter)


def adapter_for(base: Skeleton, folder: str | Path, allow_base_mismatch: bool = False) -> Adapter:
    """`load_adapter` for a base without weights. Of these it reads what the adapter carries a copy of."""
    infos = {info.name: info for info in base.tensors}
    copied = {
        name: read_tensor(infos[base.stored[name]])
        for name in read_stored(folder).base_copies
        if name in base.stored
    }
    base.model.load_state_dict(copied, strict=False, assign=True)
    return load_adapter(folder, base, allow_base_mismatch)


def open_skeleton(folder: str | Path) -> Skeleton:
    """A model folder's modules without their weights, by transformers' own rules for the names in its files."""
    folder = Path(folder)
    check_folder(folder, folder)
    tensors = tuple(list_tensors(folder))
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            family = family_of((config.architectures or ["none named"])[0]) if config.architectures else None
            if family is None:
                raise BaseError(f"cannot merge into {folder}", f"{config.architectures}: not a text model")
            with torch.device("meta"):
                model = family[1].from_config(config)
        except (
            OSError,
            ValueError,
            KeyError,
        ) as error:  # transformers reports a bad configuration in many ways
            raise BaseError(f"cannot merge into {folder}", str(error).strip()) from error
    stored = _stored_names(model, [info.name for info in tensors])
    loose: Any = type(config).from_dict(config.to_dict() | {"tie_word_embeddings": False})
    return Skeleton(
        folder=folder,
        model=model,
        tensors=tensors,
        stored=stored,
        ties=model.all_tied_weights_keys,
        unties=not loose.tie_word_embeddings,
        fingerprint=fingerprint_files(folder),
    )


def _stored_names(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Parameter -> stored tensor, for those that are loaded as they stand; fused or split ones are left out."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    state = model.state_dict()
    found: dict[str, str] = {}
    for name in names:
        own, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if own in state and converted is None:
            found[own] = name
    return found


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

    Without a tokenizer, fixed token ids stand in for the prompts.
    """
    before = load_base(base, "float32")
    rows = _rows(before, prompts)
    with injected(before.model, adapter):
        wanted = [_outputs(before, row) for row in rows]
    with merged(before.model, adapter):
        exact = [_outputs(before, row) for row in rows]
    del before
    after = load_base(output, "float32")
    got = [_outputs(after, row) for row in rows]
    choices = torch.cat([(g.argmax(-1) == w.argmax(-1)).float() for g, w in zip(got, wanted, strict=True)])
    return MergeCheck(
        tokens=len(choices),
        largest=max(float(w.abs().max()) for w in wanted),
        difference=_largest_difference(got, wanted),
        rounding=_largest_difference(got, exact),
        same_choice=float(choices.mean()),
    )


def _rows(base: Base, prompts: Sequence[str]) -> list[Tensor]:
    if base.tokenizer is None:
        words = base.model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
        return [torch.arange(1, 1 + min(8, words - 1), device=base.device)]
    rows = [base.tokenizer(text)["input_ids"][: base.context] for text in prompts]
    if not all(rows):
        raise DataError("check the merge", "a prompt without a single token")
    return [torch.tensor(row, device=base.device) for row in rows]


def _outputs(base: Base, row: Tensor) -> Tensor:
    """(tokens, vocabulary) logits, or an encoder's (tokens, width) hidden states."""
    extra: dict[str, Any] = {"decoder_input_ids": row[None]} if base.kind == "seq2seq" else {}
    with torch.no_grad():
        result: Any = base.model(input_ids=row[None], **extra)
    return (result.logits if "logits" in result else result.last_hidden_state)[0].float()


def _largest_difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))
