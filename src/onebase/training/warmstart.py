"""Training that goes on from an adapter: its values instead of a fresh start, its settings instead of options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from onebase.adapters.adapter import Adapter
from onebase.adapters.fitting import sites_of
from onebase.adapters.kinds import Target
from onebase.adapters.targets import Coverage, check_dropout
from onebase.adapters.tokens import ID_PREFIX
from onebase.config import LoraConfig, TrainConfig, build, flatten
from onebase.data.checks import Finding
from onebase.errors import BaseMismatch, ConfigError
from onebase.models.base import Base
from onebase.models.fingerprint import fingerprint_tensors
from onebase.models.vocabulary import Vocabulary
from onebase.storage.format import load_adapter, read_adapter

FREE = ("dropout",)  # a setting of the training, not of what the adapter is


class WarmStart(NamedTuple):
    """An adapter to go on from, the modules that it has, and what must be allowed for it to be used."""

    adapter: Adapter
    coverage: Coverage
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]  # for the record: which adapter it was


def with_start(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run, with those that the adapter of `start` decides: rank, targets, variant and so on.

    Raises ConfigError for one of them that was given and is not the adapter's, and what `read_adapter` does.
    """
    folder = options.get("start")
    if not folder:
        return dict(options)
    own = _own_options(read_adapter(str(folder)))
    given = {name: options[name] for name in own.keys() & options.keys()}
    mine, asked = (build(LoraConfig, values) for values in (own, own | given))
    odd = [name for name in given if name not in FREE and _meant(asked, name) != _meant(mine, name)]
    if odd:
        told = "; ".join(f"{name} is {own[name]!r} there, {options[name]!r} here" for name in sorted(odd))
        hint = "leave these out: an adapter that training goes on from decides them"
        raise ConfigError(f"option start={folder}", told, hint=hint)
    return own | dict(options)


def _meant(config: LoraConfig, name: str) -> Any:
    """A setting's value, names in any order."""
    value = getattr(config, name)
    return frozenset(value) if isinstance(value, tuple) else value


def _own_options(adapter: Adapter) -> dict[str, Any]:
    """The adapter's settings as options. What its start held fixed is trained on with the rest."""
    new = {number: text for text, number in adapter.origin.tokens.items()}
    ids = dict.fromkeys(token for tokens in adapter.tokens.values() for token in tokens.ids)
    names = [new.get(token, f"{ID_PREFIX}{token}") for token in ids]
    return flatten(adapter.config) | {"init": "default", "trainable_tokens": names}


def warm_start(base: Base, config: TrainConfig, words: Vocabulary) -> WarmStart | None:
    """The adapter of `start`, proven to fit this base; None where the run starts afresh.

    Another fingerprint is a finding, which `--allow base-mismatch` lets pass. Raises BaseMismatch that lists all
    misfits, ConfigError where the run would delete the adapter, or drop out what has no input.
    """
    if not config.start:
        return None
    folder = Path(config.start).expanduser()
    if config.overwrite and folder.resolve().is_relative_to(Path(config.output).expanduser().resolve()):
        found = "it lies in the output, which --overwrite deletes"
        raise ConfigError(f"option start={folder}", found, hint="choose another output")
    adapter = load_adapter(folder, base, allow_base_mismatch=True)
    if dict(words.new) != dict(adapter.origin.tokens):
        found = f"this tokenizer has them as {dict(words.new)}, the adapter as {dict(adapter.origin.tokens)}"
        raise BaseMismatch(f"new tokens of {folder}", found)
    settings = replace(adapter.config, init="default", dropout=config.lora.dropout)
    targets = tuple(
        Target(path, site, adapter.lowrank[path].rank, adapter.lowrank[path].scale)
        for path, site in sites_of(base.model, adapter).items()
    )
    check_dropout(targets, settings)
    facts = {"adapter": config.start, "digest": fingerprint_tensors(adapter.tensors().items())}
    return WarmStart(
        replace(adapter, config=settings),
        Coverage(targets, tuple(adapter.full)),
        _findings(base, adapter),
        facts,
    )


def _findings(base: Base, adapter: Adapter) -> tuple[Finding, ...]:
    theirs = adapter.origin.fingerprint
    if not theirs or not base.fingerprint or theirs == base.fingerprint:
        return ()
    fix = "train on the base that the adapter was made for"
    told = f"the adapter was made for base {adapter.origin.base}, {theirs}; this base has {base.fingerprint}"
    return (Finding("base-mismatch", (), f"{told}\n    fix: {fix}"),)
