"""Tiny random models of many architectures, made from transformers' configs: same seed, same weights."""

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    ViTConfig,
    set_seed,
)

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, **HEADS, **IDS),
    "llama-tied": lambda: LlamaConfig(**SIZES, **HEADS, **IDS, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, **HEADS, **IDS, sliding_window=4),
    "qwen3": lambda: Qwen3Config(**SIZES, **HEADS, **IDS, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **HEADS, **IDS, head_dim=8, sliding_window=4),
    "gpt2": lambda: GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "phi3": lambda: Phi3Config(**SIZES, **HEADS, **IDS),
    "mixtral": lambda: MixtralConfig(**SIZES, **HEADS, **IDS, num_local_experts=4, num_experts_per_tok=2),
    "bert": lambda: BertConfig(**SIZES, num_attention_heads=4, pad_token_id=0),
}
CAUSAL = tuple(name for name in CONFIGS if name != "bert")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MORE = {  # experts stored either way, an encoder-decoder, a vision transformer
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, **HEADS, **IDS, head_dim=8, **EXPERTS),
    "gpt-oss": lambda: GptOssConfig(
        **SIZES, **HEADS, **IDS, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
    ),
    "t5": lambda: T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "vit": lambda: ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        num_labels=5,
    ),
}
FACTORIES = {"bert": AutoModel, "t5": AutoModelForSeq2SeqLM, "vit": AutoModelForImageClassification}


def tiny(name: str, seed: int = 0) -> nn.Module:
    """A tiny random model in eval mode, float32."""
    set_seed(seed)
    factory = FACTORIES.get(name, AutoModelForCausalLM)
    config = (CONFIGS | MORE)[name]()
    model = factory.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():  # the default start is so small that an error in scale could hide
        parameter.data.mul_(0.5 if name == "t5" else 3.0)  # T5 starts large, and does not scale its attention
    return model


def output(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or an encoder's hidden states."""
    with torch.no_grad():
        result = model(input_ids=ids)
    return result.logits if "logits" in result else result.last_hidden_state


def some_ids(rows: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length)."""
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def tiny_inputs(name: str, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a tiny model is called with."""
    ids = some_ids(rows, seed=seed)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if name == "t5" else {})
