"""Exported GGUF adapters in llama.cpp against onebase in float32: the same greedy tokens, and how far the logits are.

Bases: the built-in one, made dense from its own GGUF file (so names and orders are not ours), and a tiny random model
of every architecture that `onebase export --to gguf` knows. llama.cpp is run through llama-cpp-python, which may live
in an environment of its own: `pip install onebase[bench]`, or `--python` and the path of an interpreter that has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from benchmarks.common import Gate, Result, show
from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import injected, new_adapter
from onebase.adapters.targets import adaptable
from onebase.config import LoraConfig
from onebase.files import cache_home
from onebase.models.base import load_base, locate_base
from onebase.models.builtin import BUILTINS, fetch_builtin
from onebase.models.gguf_adapter import ARCHITECTURES, architecture, rotary_order, save_gguf_adapter
from onebase.models.merging import PROMPTS, open_skeleton
from onebase.storage.shards import list_tensors, read_tensor
from onebase.transforms.export import portable
from onebase.transforms.merge import Skeleton

SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TYPES = {"GPT2LMHeadModel": "gpt2", "Gemma3ForCausalLM": "gemma3_text"}  # where the name does not say it
EXTRA: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 6.0, "residual_multiplier": 0.5},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "phi3": {"original_max_position_embeddings": 256},
    "smollm3": {"no_rope_layers": [1, 1]},
}
ALLOWED = 1e-3  # of the largest logit: sums in another order; and llama.cpp looks GELU up in a table of half precision


class Case(NamedTuple):
    """A base as a folder and as a dense GGUF file, and the token ids of its prompts."""

    name: str
    folder: Path
    gguf: Path
    prompts: list[list[int]]


class Answers(NamedTuple):
    """Greedy tokens, and the logits (tokens, vocabulary) that chose them, the prompt's last one first."""

    tokens: list[list[int]]
    logits: list[np.ndarray[Any, Any]]


def dense_copy(source: Path, target: Path) -> None:
    """The same GGUF file with every tensor in float32."""
    reader = gguf.GGUFReader(source)
    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    assert field is not None
    writer = gguf.GGUFWriter(target, field.contents())
    for name, one in reader.fields.items():
        if not name.startswith("GGUF.") and name != gguf.Keys.General.ARCHITECTURE:
            inner = one.types[-1] if one.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, one.contents(), one.types[0], inner)
    for one in reader.tensors:
        writer.add_tensor(one.name, gguf.dequantize(one.data, one.tensor_type).astype(np.float32))
    finish(writer)


def dense_base(folder: Path, target: Path) -> None:
    """A model folder as a float32 GGUF without a vocabulary: token ids are enough here."""
    base = open_skeleton(folder)
    config: Any = base.model.config
    row = architecture(base)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[row.gguf])
    writer.add_tokenizer_model("none")
    settings(writer, config)
    names = gguf.get_tensor_name_map(row.gguf, config.num_hidden_layers)
    for info in list_tensors(folder):
        name = names.get_name(info.name, try_suffixes=(".weight", ".bias"))
        assert name, info.name
        writer.add_tensor(name, in_llama_cpp(info.name, read_tensor(info), config, row.rotary).numpy())
    finish(writer)


def in_llama_cpp(name: str, tensor: torch.Tensor, config: Any, rotary: bool) -> torch.Tensor:
    """A base tensor as llama.cpp's converter leaves it (its conversion/*.py)."""
    if rotary and "q_proj" in name:
        return rotary_order(tensor, config.num_attention_heads).contiguous()
    if rotary and "k_proj" in name:
        return rotary_order(tensor, config.num_key_value_heads).contiguous()
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T.contiguous()
    return tensor


def settings(writer: Any, config: Any) -> None:
    """The hyperparameters that llama.cpp reads, for those of them that the configuration has."""
    heads, width = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or width // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    window = getattr(config, "sliding_window", None) or 0
    given = {
        "feed_forward_length": getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None),
        "head_count_kv": getattr(config, "num_key_value_heads", heads),
        "layer_norm_rms_eps": getattr(config, "rms_norm_eps", None),
        "layer_norm_eps": getattr(config, "layer_norm_epsilon", None),
        "rope_freq_base": rope.get("rope_theta"),
        "rope_dimension_count": head if rope else None,
        "key_length": head,
        "value_length": head,
        "sliding_window": window if config.model_type in ("gemma2", "gemma3_text", "phi3") else None,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "attention_scale": getattr(config, "attention_multiplier", None),
        "embedding_scale": getattr(config, "embedding_multiplier", None),
        "residual_scale": getattr(config, "residual_multiplier", None),
        "logit_scale": getattr(config, "logits_scaling", None),
        "rope_scaling_orig_ctx_len": getattr(config, "original_max_position_embeddings", None),
    }
    for name, value in given.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_cases(place: Path, only: str) -> Iterator[Case]:
    """A random model of each architecture, with logits that spread enough to choose by."""
    for name in ARCHITECTURES:
        kind = TYPES.get(name, name.removesuffix("ForCausalLM").lower())
        sizes = {"vocab_size": 128} if kind == "gpt2" else SMALL | HEADS
        config = AutoConfig.for_model(kind, **sizes, **IDS, **EXTRA.get(kind, {}))
        if only not in ("all", name):
            continue
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.mul_(3.0)
        folder = place / name
        model.save_pretrained(folder)
        dense_base(folder, folder.with_suffix(".gguf"))
        prompts = [torch.randint(3, 128, (size,)).tolist() for size in (5, 9, 14)]
        yield Case(f"{name} (tiny)", folder, folder.with_suffix(".gguf"), prompts)


def builtin_case(place: Path) -> Case:
    name = "smollm2-135m"
    dense_copy(fetch_builtin(BUILTINS[name], cache_home()), place / "builtin.gguf")
    folder = locate_base(name)
    words: Any = load_base(folder, "float32").tokenizer
    return Case(name, folder, place / "builtin.gguf", [words(text)["input_ids"] for text in PROMPTS])


def of_onebase(case: Case, adapter: Adapter | None, count: int) -> Answers:
    base = load_base(case.folder, "float32")
    made = Answers([], [])
    with injected(base.model, adapter), torch.no_grad():
        for prompt in case.prompts:
            ids, rows = list(prompt), list[np.ndarray[Any, Any]]()
            for _ in range(count):
                result: Any = base.model(input_ids=torch.tensor([ids]))
                rows.append(result.logits[0, -1].numpy())
                ids.append(int(rows[-1].argmax()))
            made.tokens.append(ids[len(prompt) :])
            made.logits.append(np.stack(rows))
    return made


def of_llama_cpp(python: str, case: Case, adapter: Path, count: int) -> Answers:
    """What llama.cpp answers, in a process of its own."""
    output = adapter.with_suffix(".npz")
    task = {"model": str(case.gguf), "lora": str(adapter), "prompts": case.prompts, "count": count}
    script = Path(__file__).with_name("llama_greedy.py")
    command = [python, str(script), json.dumps(task | {"output": str(output)})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name}: llama.cpp failed:\n{done.stderr[-2000:]}")
    stored = np.load(output)
    rows = range(len(case.prompts))
    return Answers([stored[f"tokens{n}"].tolist() for n in rows], [stored[f"logits{n}"] for n in rows])


def varied_update(base: Skeleton) -> Adapter:
    """Random updates of two ranks, scaled as in rsLoRA, on all linear layers, and on embedding and head if untied."""
    tied = {*base.ties, *base.ties.values()}
    paths = [path for path in adaptable(base.model) if f"{path}.weight" not in tied and "wpe" not in path]
    first = {r"(.*\.)?(layers|h)\.0\..*": 8}
    config = LoraConfig(rank=16, alpha=12, rslora=True, rank_pattern=first, target_modules=paths)
    adapter, draw = new_adapter(base.model, config), torch.Generator().manual_seed(0)
    low = {
        path: one._replace(
            **{side: torch.randn(getattr(one, side).shape, generator=draw) * 0.02 for side in "AB"}
        )
        if one.kind == "embedding"
        else one._replace(B=torch.randn(one.B.shape, generator=draw) * 0.01)
        for path, one in adapter.lowrank.items()
    }
    return replace(adapter, lowrank=low)


def compare(case: Case, options: argparse.Namespace, place: Path) -> dict[str, float]:
    skeleton = open_skeleton(case.folder)
    adapter = varied_update(skeleton)
    path = place / f"{case.folder.name}-adapter.gguf"
    written = save_gguf_adapter(path, portable(adapter), adapter, skeleton, options.dtype)
    mine, plain = of_onebase(case, adapter, options.count), of_onebase(case, None, 1)
    theirs = of_llama_cpp(options.python, case, path, options.count)
    pairs = zip(np.concatenate(mine.tokens), np.concatenate(theirs.tokens), strict=True)
    return {
        "tokens": float(options.count * len(case.prompts)),
        "same": float(sum(one == other for one, other in pairs)),
        "logits": furthest(mine.logits, theirs.logits),
        "effect": furthest([one[:1] for one in mine.logits], plain.logits),
        "largest": max(float(np.abs(one).max()) for one in mine.logits),
        "file": written.relative,
    }


def furthest(some: Sequence[np.ndarray[Any, Any]], others: Sequence[np.ndarray[Any, Any]]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(some, others, strict=True))


def main(options: argparse.Namespace) -> None:
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        place = Path(temporary)
        cases = [] if options.only == "builtin" else list(tiny_cases(place, options.only))
        cases += [builtin_case(place)] if options.only in ("all", "builtin") else []
        for case in cases:
            found[case.name] = compare(case, options, place)
            print(case.name, found[case.name], file=sys.stderr)
    rows = [
        (
            name,
            f"{one['same']:.0f} of {one['tokens']:.0f}",
            f"{one['logits']:.1e}",
            f"{one['effect']:.2g}",
            f"{one['largest']:.3g}",
            f"{one['file']:.1e}",
        )
        for name, one in found.items()
    ]
    head = ("base", "same tokens", "logits differ by", "adapter's effect", "largest logit", "file differs by")
    show("adapters in llama.cpp against onebase, greedy", head, rows)
    same, every = (sum(one[name] for one in found.values()) for name in ("same", "tokens"))
    far = max(one["logits"] / one["largest"] for one in found.values())
    unit = {
        "tokens": "greedy tokens that are llama.cpp's too",
        "logits": "largest difference over the largest logit",
    }
    ours, peer = {"tokens": same, "logits": far}, {"tokens": every, "logits": ALLOWED}
    gate = Gate("greedy tokens that are not llama.cpp's", every - same, 0)
    print(Result("llama_parity", ours, peer, unit, {"tokens": 1.0, "logits": 1.0}, gate, 1).line())


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--python", default=sys.executable, help="interpreter that has llama-cpp-python")
    arguments.add_argument(
        "--only", default="all", choices=["all", "builtin", *ARCHITECTURES], help="one base"
    )
    arguments.add_argument("--count", type=int, default=24, help="tokens after each prompt (default: 24)")
    arguments.add_argument("--dtype", default="f32", choices=["f32", "f16"], help="of the adapter file")
    arguments.add_argument("--folder", help="where files go for a while (default: the temporary folder)")
    main(arguments.parse_args())
