"""PEFT's adapter_config.json in our terms, both ways, and which of its settings are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from onebase.adapter import Adapter
from onebase.config import ALL_LINEAR, REGEX_PREFIX, LoraConfig, build
from onebase.options import fits, require_pattern

# PEFT settings that change the arithmetic and that onebase does not compute: any other value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    # pissa, olora, corda, loftq and lora_ga also change the base when PEFT applies them
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Settings of PEFT 0.21 that leave the arithmetic of a stored adapter alone, or are read below.
_HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path corda_config "
    "ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core modules_to_save "
    "peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type "
    "use_rslora".split()
)
# Types of the settings that are read; PEFT writes null for what is not set.
_TYPES: dict[str, Any] = {
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float | None,
    "target_modules": str | list[str] | None,
    "exclude_modules": str | list[str] | None,
    "modules_to_save": list[str] | None,
    "layers_to_transform": int | list[int] | None,
    "layers_pattern": str | list[str] | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None,
    "fan_in_fan_out": bool | None,
    "base_model_name_or_path": str | None,
    "task_type": str | None,
}


def type_problems(raw: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting whose value has a type that PEFT never writes."""
    return [
        f"{key}={raw.get(key)!r}: must be {getattr(hint, '__name__', hint)}"
        for key, hint in _TYPES.items()
        if not fits(hint, raw.get(key))
    ]


def to_peft(adapter: Adapter) -> dict[str, Any]:
    """Only keys that PEFT has long known, so that older releases read the file."""
    config = adapter.config
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "task_type": adapter.origin.task or None,
        "base_model_name_or_path": adapter.origin.base or None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "modules_to_save": list(config.modules_to_save) or None,
        "rank_pattern": config.ranks,
        "alpha_pattern": config.alphas,
        "use_rslora": config.rslora,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "fan_in_fan_out": any(low.kind == "transposed" for low in adapter.lowrank.values()),
        "bias": "none",
    }


def is_refused(key: str, value: Any) -> bool:
    """Whether a setting changes the arithmetic in a way that onebase does not compute."""
    if key in _NEUTRAL:
        return value not in _NEUTRAL[key]
    return key not in _HARMLESS and value not in (None, False, {}, [], "")


class TargetSpec(NamedTuple):
    """Which modules a stored adapter targets: names or `re:` and a pattern, exclusions, layer numbers."""

    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether the target names alone say what is meant."""
        return isinstance(self.targets, tuple) and not self.excluded and not self.layers


def target_spec(raw: Mapping[str, Any]) -> TargetSpec:
    """PEFT's target settings in our terms; a layers_pattern becomes part of one regular expression."""
    targets, excluded = (
        _names_or_regex(raw.get("target_modules")),
        _names_or_regex(raw.get("exclude_modules")),
    )
    layers = raw.get("layers_to_transform")
    numbers = (layers,) if isinstance(layers, int) else tuple(layers or ())
    patterns = raw.get("layers_pattern") or ()
    if numbers and patterns and isinstance(targets, tuple):
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        ends, stacks = "|".join(map(re.escape, targets)), "|".join(patterns)
        targets = (
            rf"{REGEX_PREFIX}(?:.*\.)?(?:{stacks})\.(?:{'|'.join(map(str, numbers))})\.(?:.*\.)?(?:{ends})"
        )
        numbers = ()
    return TargetSpec(targets, excluded, numbers)


def _names_or_regex(value: str | Sequence[str] | None) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value if value == ALL_LINEAR else REGEX_PREFIX + value
    return tuple(sorted(value or ()))


def saved_modules(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the modules that were trained in full."""
    return tuple(raw.get("modules_to_save") or ())


def from_peft(raw: Mapping[str, Any], paths: Sequence[str]) -> LoraConfig:
    """Our config for a PEFT one; `paths` are the modules that the file holds. Raises ConfigError."""
    spec = target_spec(raw)
    for pattern in (spec.targets, spec.excluded):
        if isinstance(pattern, str):
            require_pattern(pattern.removeprefix(REGEX_PREFIX))
    options = {
        "rank": raw["r"],
        "alpha": raw["lora_alpha"],
        "dropout": raw.get("lora_dropout") or 0.0,
        "target_modules": spec.targets if spec.plain else list(paths),
        "rank_pattern": raw.get("rank_pattern") or {},
        "alpha_pattern": raw.get("alpha_pattern") or {},
        "rslora": bool(raw.get("use_rslora")),
        "init": "gaussian" if raw.get("init_lora_weights") == "gaussian" else "default",
        "modules_to_save": saved_modules(raw),
    }
    return build(LoraConfig, options)
