"""Tiny decoders of every family that the engine knows, their rows and trees, and their loss row by row."""

import torch
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from adapters import trained
from onebase.adapters.injection import inject, trainable
from onebase.config import LoraConfig
from onebase.data.trie import Layout, Node

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = {
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# What differs from SIZES: name -> (transformers' model type, options). Windows of 4 are shorter than the rows.
DECODERS = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied, yarn": ("llama", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "gemma": ("gemma", {"head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {**SLIDING, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**SLIDING, "final_logit_softcapping": 3.0}),
    "phi3": ("phi3", {"sliding_window": 4, "partial_rotary_factor": 0.5}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {key: SLIDING[key] for key in ("sliding_window", "layer_types")}),
    "ministral": ("ministral", SLIDING),
    "seed_oss": ("seed_oss", {"head_dim": 8, "attention_bias": True}),
    "exaone4": ("exaone4", {key: SLIDING[key] for key in ("sliding_window", "layer_types")}),
    "cohere2": ("cohere2", {**SLIDING, "logit_scale": 0.3}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "cohere": ("cohere", {"use_qk_norm": True, "logit_scale": 0.3}),
    "cohere without head norms": ("cohere", {"logit_scale": 0.3}),
}


def decoder(name, dtype=torch.float32, **changes):
    """A tiny random model of this family, its norms' and biases' weights random too."""
    torch.manual_seed(0)
    kind, options = DECODERS[name]
    config = AutoConfig.for_model(kind, **{**SIZES, **options, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():  # the default start is so small that an error in scale could hide
        parameter.mul_(2.0) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def adapted(model, dtype=None, **options):
    """The model with an adapter that is away from 0 and wants gradients; its parameters by name."""
    inject(model, trained(model, LoraConfig(**{"rank": 4, "alpha": 8, **options})))
    if dtype is not None:
        model.to(dtype)
    parameters = trainable(model, "default")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


class Wide(TorchFunctionMode):
    """transformers' models compute norms and angles in float32 even in float64; inside this they stay in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        narrowed = torch.float32 in (*args[1:], *kwargs.values()) or func is torch.Tensor.float
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64 and narrowed:
            if func in (torch.Tensor.float, torch.Tensor.to):
                return args[0]
            kwargs = {
                key: torch.float64 if value == torch.float32 else value for key, value in kwargs.items()
            }
        return func(*args, **kwargs)


def some_layout(nodes, seed=0, share_of_loss=0.7, every_node=True):
    """(a layout of random tokens, its rows as (ids, which carry loss)).

    A row for each leaf and, with `every_node`, one that ends with each inner node; token 0 never is a target.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (sum(length for _, length, _ in nodes),), generator=generator)
    positions = torch.zeros_like(ids)
    parents = {parent for _, _, parent in nodes}
    rows, columns, targets, paths, owners = [], [], [], {-1: []}, torch.zeros_like(ids)
    for number, (start, length, parent) in enumerate(nodes):
        paths[number] = paths[parent] + list(range(start, start + length))
        positions[paths[number]] = torch.arange(len(paths[number]))
        if every_node or number not in parents:
            loss = torch.rand(len(paths[number]), generator=generator) < share_of_loss
            loss[0] = False
            owners[paths[number]] = len(rows)
            rows.append((ids[paths[number]], loss))
            places = torch.tensor(paths[number])
            columns.append(places[:-1][loss[1:]])
            targets.append(ids[places[1:]][loss[1:]])
    nodes = tuple(Node(*node) for node in nodes)
    return Layout(ids, positions, nodes, torch.cat(columns), torch.cat(targets), owners), rows


def loss_row_by_row(model, rows):
    """The summed loss (nats), each row alone through the model's own forward."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, loss in rows:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][loss[1:]]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = total + cross_entropy(wide, ids[1:][loss[1:]], reduction="sum").double()
    return total


def gradients(loss, parameters):
    """The loss's gradient for each parameter, by name; zeros where it has none."""
    found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, found, strict=True))
