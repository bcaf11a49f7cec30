"""PEFT's adapter_config.json in our terms, both ways, and which of its settings are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from onebase.adapters.adapter import Adapter
from onebase.adapters.tokens import ID_PREFIX
from onebase.config import ALL_LINEAR, REGEX_PREFIX, Init, LoraConfig, build
from onebase.options import fits, require_pattern
from onebase.storage.peft_tokens import INDICES, index_problems, named_ids, to_peft_indices

# PEFT settings that change the arithmetic and that onebase does not compute: any other value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", "lora_only", "all"),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    # pissa, olora, corda, loftq and lora_ga also change the base when PEFT applies them
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
NO_TARGETS = "dummy-target-modules"  # PEFT's own word for it: it refuses an empty list
_HINTS = {
    "init_lora_weights": "PEFT changed the base for it: save it there with save_pretrained(..., "
    "path_initial_model_for_weight_conversion=FOLDER OF THE ADAPTER'S START), which gives a plain LoRA",
}
# Settings of PEFT 0.21 that leave the arithmetic of a stored adapter alone, or are read below.
_HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path corda_config "
    "ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_core "
    "modules_to_save peft_version qalora_group_size r rank_pattern revision runtime_config target_modules "
    "target_parameters task_type trainable_token_indices use_dora use_rslora".split()
)
# Types of the settings that are read; PEFT writes null for what is not set.
_TYPES: dict[str, Any] = {
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float | None,
    "target_modules": str | list[str] | None,
    "exclude_modules": str | list[str] | None,
    "modules_to_save": list[str] | None,
    "target_parameters": list[str] | None,
    "layers_to_transform": int | list[int] | None,
    "layers_pattern": str | list[str] | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None,
    "use_dora": bool | None,
    "lora_bias": bool | None,
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
    ] + index_problems(raw)


def names_start(config: LoraConfig) -> bool:
    """Whether PEFT's settings can say how the adapter started; the sidecar does where they cannot.

    PEFT of any release knows these two, and with lora_bias it accepts the default alone.
    """
    return config.init == "default" or (config.init == "gaussian" and not config.lora_bias)


def to_peft(adapter: Adapter) -> dict[str, Any]:
    """Keys that PEFT has long known, and newer ones only where needed, so that older releases read the file."""
    config = adapter.config
    newer = {
        "use_dora": config.dora,
        "lora_bias": config.lora_bias,
        "target_parameters": list(config.target_parameters),
        INDICES: to_peft_indices(adapter),
    }
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "task_type": adapter.origin.task or None,
        "base_model_name_or_path": adapter.origin.base or None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets) or NO_TARGETS,
        "modules_to_save": list(config.modules_to_save) or None,
        "rank_pattern": config.ranks,
        "alpha_pattern": config.alphas,
        "use_rslora": config.rslora,
        "init_lora_weights": "gaussian" if config.init == "gaussian" and names_start(config) else True,
        "fan_in_fan_out": any(low.kind == "transposed" for low in adapter.lowrank.values()),
        "bias": "none",
    } | {key: value for key, value in newer.items() if value}


def is_refused(key: str, value: Any) -> bool:
    """Whether a setting changes the arithmetic in a way that onebase does not compute."""
    if key in _NEUTRAL:
        return value not in _NEUTRAL[key]
    return key not in _HARMLESS and value not in (None, False, {}, [], "")


def holds_biases(raw: Mapping[str, Any]) -> bool:
    """Whether the file holds trained biases of the base's modules themselves, in place of the base's."""
    return raw.get("bias") in ("lora_only", "all")


def refusal_hint(settings: Sequence[str]) -> str:
    """What to do about refused settings."""
    known = [_HINTS[key] for key in settings if key in _HINTS]
    general = (
        "these settings change what the adapter computes; loading it as plain LoRA would be silently wrong"
    )
    return "\n  ".join([general, *known])


class TargetSpec(NamedTuple):
    """Which modules a stored adapter targets: names or `re:` and a pattern, exclusions, layer numbers."""

    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...]
    parameters: tuple[str, ...] = ()  # in the order in which their module registers them, where that is known

    @property
    def plain(self) -> bool:
        """Whether the target names alone say what is meant."""
        return isinstance(self.targets, tuple) and not self.excluded and not self.layers


def target_spec(raw: Mapping[str, Any]) -> TargetSpec:
    """PEFT's target settings in our terms; a layers_pattern becomes part of one regular expression.

    Raises ConfigError where a pattern is no regular expression.
    """
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
    for pattern in (targets, excluded):
        if isinstance(pattern, str):
            require_pattern(pattern.removeprefix(REGEX_PREFIX))
    return TargetSpec(targets, excluded, numbers, tuple(raw.get("target_parameters") or ()))


def _names_or_regex(value: str | Sequence[str] | None) -> str | tuple[str, ...]:
    if isinstance(value, str) and value != NO_TARGETS:
        return value if value == ALL_LINEAR else REGEX_PREFIX + value
    if isinstance(value, str):
        return ()
    return tuple(sorted(value or ()))


def saved_modules(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the modules that were trained in full."""
    return tuple(raw.get("modules_to_save") or ())


def from_peft(raw: Mapping[str, Any], paths: Sequence[str], start: str = "") -> LoraConfig:
    """Our config for a PEFT one; `paths` are the modules that the file holds, `start` is the sidecar's `init`.

    Raises ConfigError.
    """
    spec, init = target_spec(raw), raw.get("init_lora_weights")
    options = {
        "rank": raw["r"],
        "alpha": raw["lora_alpha"],
        "dropout": raw.get("lora_dropout") or 0.0,
        "target_modules": spec.targets if spec.plain else list(paths),
        "rank_pattern": raw.get("rank_pattern") or {},
        "alpha_pattern": raw.get("alpha_pattern") or {},
        "rslora": bool(raw.get("use_rslora")),
        "dora": bool(raw.get("use_dora")),
        "lora_bias": bool(raw.get("lora_bias")),
        "init": start or (init if init in get_args(Init) else "default"),
        "target_parameters": spec.parameters,
        "modules_to_save": saved_modules(raw),
        "trainable_tokens": [f"{ID_PREFIX}{token}" for token in named_ids(raw)],
    }
    return build(LoraConfig, options)
