"""The decoder families that the engine computes: a row for each, with what is particular to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

# transformers' activation modules, by class name -> their name in ops.gates.
ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}
# Rotary frequencies that change with the longest row of a batch: rows together would not be rows alone.
LENGTH_DEPENDENT = {"dynamic", "longrope"}

# The names of a layer's norms: before and after the attention, before and after the MLP.
NormNames = tuple[str | None, str | None, str | None, str | None]
PRE: NormNames = ("input_layernorm", None, "post_attention_layernorm", None)
POST: NormNames = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
BOTH: NormNames = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
ONE: NormNames = ("input_layernorm", None, None, None)


def _none(_: Any) -> None:
    return None


def _one(_: Any) -> float:
    return 1.0


def _true(_: Any) -> bool:
    return True


def _layer_window(attention: Any) -> int | None:
    return attention.sliding_window


def _config_window(attention: Any) -> int | None:
    return attention.config.sliding_window


def _logit_softcap(config: Any) -> float | None:
    return config.final_logit_softcapping


class Family(NamedTuple):
    """What is particular to a family; functions take a layer's attention module, or the model's config."""

    norms: NormNames = PRE
    norm_offset: float = 0.0  # added to every norm's weight
    centred: bool = False  # layer norms
    fused: bool = False  # q, k, v are one layer, gate and up too
    window: Callable[[Any], int | None] = _none  # of the attention
    softcap: Callable[[Any], float | None] = _none  # of the attention
    rotates: Callable[[Any], bool] = _true  # whether this attention does
    rotary_type: Callable[[Any], str | None] = _none  # what the rotary module wants to know of the attention
    interleaved: bool = False  # the rotation turns neighbouring channels
    parallel: bool = False
    embedding: Callable[[Any], float] = (
        _one  # of the config: what embeddings, residuals and logits are multiplied by
    )
    residual: Callable[[Any], float] = _one
    logits: Callable[[Any], float] = _one
    logit_softcap: Callable[[Any], float | None] = _none


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(window=_config_window),
    "Qwen2ForCausalLM": Family(window=_layer_window),
    "Qwen3ForCausalLM": Family(window=_layer_window),
    "GemmaForCausalLM": Family(norm_offset=1.0),
    "Gemma2ForCausalLM": Family(
        norms=BOTH,
        norm_offset=1.0,
        window=_layer_window,
        softcap=lambda attention: attention.attn_logit_softcapping,
        logit_softcap=_logit_softcap,
    ),
    "Gemma3ForCausalLM": Family(
        norms=BOTH,
        norm_offset=1.0,
        window=_layer_window,
        rotary_type=lambda attention: attention.layer_type,
        logit_softcap=_logit_softcap,
    ),
    "Phi3ForCausalLM": Family(fused=True, window=_config_window),
    "GraniteForCausalLM": Family(
        embedding=lambda config: config.embedding_multiplier,
        residual=lambda config: config.residual_multiplier,
        logits=lambda config: 1 / config.logits_scaling,
    ),
    "Olmo2ForCausalLM": Family(norms=POST),
    "Olmo3ForCausalLM": Family(
        norms=POST, window=_layer_window, rotary_type=lambda attention: attention.attention_type
    ),
    "MinistralForCausalLM": Family(window=_layer_window),
    "SeedOssForCausalLM": Family(),
    "Exaone4ForCausalLM": Family(
        norms=POST,
        window=lambda attention: attention.sliding_window if attention.is_sliding else None,
        rotates=lambda attention: attention.sliding_window is None or attention.is_sliding,
    ),
    "Cohere2ForCausalLM": Family(
        norms=ONE,
        centred=True,
        interleaved=True,
        parallel=True,
        window=_layer_window,
        rotates=lambda attention: attention.sliding_window is not None,
        logits=lambda config: config.logit_scale,
    ),
    "SmolLM3ForCausalLM": Family(window=_layer_window, rotates=lambda attention: bool(attention.use_rope)),
    "CohereForCausalLM": Family(
        norms=ONE,
        centred=True,
        interleaved=True,
        parallel=True,
        logits=lambda config: config.logit_scale,
    ),
}
