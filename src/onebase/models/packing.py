"""Rows put end to end in one sequence, for any model that honours transformers' attention interface.

transformers asks a registered mask function for each attention pattern and hands its answer to every layer.
Ours answers a packed call with the pattern itself, in short: an int64 tensor (1, 1, rows, 2) of each row's
length and window. So the layers need no (T, T) mask and no global state, and a layer that gradient
checkpointing runs again, in whatever thread, still knows its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from onebase.errors import BaseError
from onebase.ops.attention import segmented_attention

NAME = "onebase"

# The row lengths of the current call; None: not packed, so everything goes to transformers' own sdpa.
SEGMENTS: ContextVar[tuple[int, ...] | None] = ContextVar("SEGMENTS", default=None)
# Where a probe counts the packed calls of the attention function.
_CALLS: ContextVar[list[nn.Module] | None] = ContextVar("_CALLS", default=None)


def _anything(value: Any) -> bool:
    return True


def _falsy(value: Any) -> bool:
    return not value


# What a layer may pass besides its tensors: name -> (the values that are safe, why). Whatever is not listed
# (attention sinks, position biases, caches ...) could change the result and is refused; None never can.
SAFE_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "scaling": (_anything, "given to the op"),
    "softcap": (_anything, "given to the op"),
    "sliding_window": (_anything, "compared with the mask's window"),
    "dropout": (_falsy, "the op drops nothing"),
    "is_causal": (bool, "the op is causal"),
    "position_ids": (_anything, "the rotation is already in query and key"),
    "use_cache": (_falsy, "a packed call keeps no cache"),
    "output_router_logits": (_anything, "read outside the attention"),
}

# Largest difference between packed and padded logits, as a part of the largest logit; 3e-2 for narrower types.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2}
PROBE_LENGTHS = (6, 9, 1)


@contextmanager
def segments(lengths: tuple[int, ...]) -> Generator[None]:
    """The model calls inside carry rows of these lengths, end to end: input_ids (1, T), T = sum(lengths).

    Call the model with `position_ids` (1, T) that restart at 0 in each row, `attention_mask=None` and
    `use_cache=False`, inside `packed_attention`. Raises BaseError where a layer asks for what cannot be packed.
    """
    token = SEGMENTS.set(tuple(lengths))
    try:
        yield
    finally:
        SEGMENTS.reset(token)


@contextmanager
def packed_attention(model: PreTrainedModel) -> Generator[None]:
    """The model's attention goes through `segmented_attention` wherever `segments` are set.

    Calls without segments go to transformers' sdpa, unchanged; so let a model that cannot use sdpa (Gemma 2)
    generate outside. On leaving, each config's attention implementation is what it was.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        # Setting a config also sets the ones inside it; these come later in the list, so the last word is theirs.
        for config, implementation in before:
            config._attn_implementation = implementation


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config that a module of the model reads, outer before inner."""
    found: dict[int, Any] = {}
    queue = [getattr(module, "config", None) for module in model.modules()]
    while queue:
        config = queue.pop(0)
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            queue += [getattr(config, key, None) for key in config.sub_configs]
    return list(found.values())


def _refusal(found: str) -> BaseError:
    return BaseError("packed rows", found, hint="use --attention padded")


def _mask(**request: Any) -> Tensor | None:
    """transformers' mask function: outside of `segments` its own, inside the rows' lengths and windows."""
    lengths = SEGMENTS.get()
    if lengths is None:
        return sdpa_mask(**request)
    window = request.get("local_size")
    tokens = request["kv_length"]
    refusals = {
        "the call has an attention mask": request.get("attention_mask") is not None,
        f"the call has {tokens} tokens, its rows {sum(lengths)}": tokens != sum(lengths),
        "the rows must stand in one sequence": request["batch_size"] != 1,
        "the attention is not causal": "allow_is_bidirectional_skip" in request,
        "the model adds a mask function of its own": bool(request.get("use_vmap")),
        "the local attention is no sliding window": window is not None
        and window != getattr(request.get("config"), "sliding_window", None),
    }
    for reason, applies in refusals.items():
        if applies:
            raise _refusal(reason)
    return torch.tensor([[[[length, window or 0] for length in lengths]]])


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query (B, H, T, D) -> ((B, T, H, Dv), None)."""
    # transformers' own masks are boolean or floating point; only ours is an integer.
    if attention_mask is None or attention_mask.dtype != torch.int64:
        if SEGMENTS.get() is not None:
            raise _refusal("the layer did not get the mask that the mask interface made")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    calls = _CALLS.get()
    if calls is not None:
        calls.append(module)
    lengths, windows = zip(*attention_mask[0, 0].tolist(), strict=True)
    window = windows[0] or None
    _check_options(module, options, window)
    scale = options.get("scaling")
    output = segmented_attention(
        query,
        key,
        value,
        lengths,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window=window,
        softcap=options.get("softcap"),
    )
    return output.transpose(1, 2).contiguous(), None


def _check_options(module: nn.Module, options: dict[str, Any], window: int | None) -> None:
    for name, value in options.items():
        if value is None:
            continue
        if name not in SAFE_OPTIONS:
            raise _refusal(f"the attention takes {name}, which packing does not know")
        safe, why = SAFE_OPTIONS[name]
        if not safe(value):
            raise _refusal(f"the attention has {name}={value}, but {why}")
    if not getattr(module, "is_causal", True):
        raise _refusal("the attention is not causal")
    if options.get("sliding_window") not in (None, window):
        raise _refusal(f"the layer's window is {options['sliding_window']}, its mask's {window}")


def packing_problem(model: PreTrainedModel, pad_id: int) -> str | None:
    """Why this model's rows cannot be packed, in one sentence; None where packing is proved exact.

    Runs a few random tokens in eval mode, as onebase keeps a base while it trains an adapter. Every layer must
    call the attention function once, the packed logits must equal the padded ones, and the gradient of the
    other rows' logits on the first row's embeddings must be zero to the bit. The model's modes and torch's
    random state are as before. Raises what the model's own padded forward raises, if it does.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            found = _difference(model, pad_id)
    finally:
        for module, training in modes:
            module.training = training
    return f"{model.config.model_type} cannot be trained on packed rows: {found}" if found else None


def _difference(model: PreTrainedModel, pad_id: int) -> str:
    """What tells the packed forward of a few random rows from the padded one; empty if nothing does."""
    model.eval()
    rows = _random_rows(model, pad_id)
    padded = _padded_logits(model, rows, pad_id)
    calls: list[nn.Module] = []
    token = _CALLS.set(calls)
    try:
        with packed_attention(model):
            packed, leak = _packed_logits_and_leak(model, rows)
    except BaseError as error:
        return error.found
    except Exception as error:
        # Whatever a foreign model raises on packed rows is the reason not to pack them.
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return text if calls else f"its attention does not use transformers' attention interface ({text})"
    finally:
        _CALLS.reset(token)
    count, layers = len(calls), model.config.get_text_config().num_hidden_layers
    error = float((packed - padded).abs().max() / padded.abs().max())
    tolerance = TOLERANCE.get(model.dtype, 3e-2)
    problems = {
        f"transformers' attention interface was called {count} times for {layers} layers": count != layers,
        f"the logits differ by {error:.1e} of the largest ({tolerance:.0e} allowed)": not error <= tolerance,
        "one row's tokens change another row's logits": leak,
    }
    return next((problem for problem, found in problems.items() if found), "")


def _packed_logits_and_leak(model: PreTrainedModel, rows: list[Tensor]) -> tuple[Tensor, bool]:
    """The packed logits, and whether the first row's embeddings reach the other rows' logits.

    The gradient tells, for it is zero to the bit without a leak, even where the rows share matrix products
    (a mixture's experts), whose last bits depend on every row.
    """
    embeddings: list[Tensor] = []

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # a leaf itself may not be changed in place, as some models do

    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            logits = _packed_logits(model, rows)
    finally:
        hook.remove()
    first = len(rows[0])
    gradients = torch.autograd.grad(logits[first:].float().sum(), embeddings)
    return logits.detach(), any(bool(gradient[:, :first].any()) for gradient in gradients)


def _random_rows(model: PreTrainedModel, pad_id: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = model.config.get_text_config().vocab_size - 1
    ids = torch.randint(count, (sum(PROBE_LENGTHS),), generator=generator)
    ids = ids + (ids >= pad_id)  # never the padding
    return list(ids.to(model.device).split(PROBE_LENGTHS))


def _padded_logits(model: PreTrainedModel, rows: list[Tensor], pad_id: int) -> Tensor:
    """The rows' logits (T, vocabulary) from a padded batch, through the model's own attention."""
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def _packed_logits(model: PreTrainedModel, rows: list[Tensor]) -> Tensor:
    """The rows' logits (T, vocabulary) from one packed call."""
    lengths = tuple(len(row) for row in rows)
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])
    with segments(lengths):
        output = model(input_ids=torch.cat(rows)[None], position_ids=positions[None], use_cache=False)
    return output.logits[0]
