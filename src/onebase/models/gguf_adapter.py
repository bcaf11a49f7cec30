"""GGUF adapter files for llama.cpp: names, layouts and rotary order of its bases, and the way back to check them.

Written as llama.cpp reads them (its src/llama-adapter.cpp and convert_lora_to_gguf.py): each base tensor's name with
`.lora_a` (r, i) and `.lora_b` (o, r), and one `adapter.lora.alpha`; the update there is alpha / r · B·A.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from onebase.adapters.adapter import Adapter, LowRank
from onebase.errors import BaseError, ConfigError, FormatError, OutputExists, nearest
from onebase.files import atomic_file
from onebase.transforms.export import LIMIT, Difference, differences, require_near
from onebase.transforms.merge import Skeleton

# Shape suffixes: i = in features, o = out features, r = rank.

FileType = Literal["f32", "f16"]
_DTYPES = {"f32": np.float32, "f16": np.float16}
_FILE_TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
LIMITS: dict[FileType, float] = {
    "f32": LIMIT,
    "f16": 1e-2,
}  # largest relative difference that rounding may make


class Architecture(NamedTuple):
    """How llama.cpp holds a family of models, as far as an adapter must know."""

    gguf: gguf.MODEL_ARCH
    rotary: bool = False  # rows of q and k: pairs that turn together are neighbours, not half a head apart


# Bases that llama.cpp holds tensor for tensor, but for the rotary order; benchmarks/llama_parity.py runs each of them.
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(gguf.MODEL_ARCH.LLAMA, rotary=True),
    "MistralForCausalLM": Architecture(gguf.MODEL_ARCH.LLAMA, rotary=True),
    "SmolLM3ForCausalLM": Architecture(gguf.MODEL_ARCH.SMOLLM3, rotary=True),
    "GraniteForCausalLM": Architecture(gguf.MODEL_ARCH.GRANITE, rotary=True),
    "Qwen2ForCausalLM": Architecture(gguf.MODEL_ARCH.QWEN2),
    "Qwen3ForCausalLM": Architecture(gguf.MODEL_ARCH.QWEN3),
    "GemmaForCausalLM": Architecture(gguf.MODEL_ARCH.GEMMA),
    "Gemma2ForCausalLM": Architecture(gguf.MODEL_ARCH.GEMMA2),
    "Gemma3ForCausalLM": Architecture(gguf.MODEL_ARCH.GEMMA3),
    "Phi3ForCausalLM": Architecture(gguf.MODEL_ARCH.PHI3),
    "Olmo2ForCausalLM": Architecture(gguf.MODEL_ARCH.OLMO2),
    "GPT2LMHeadModel": Architecture(gguf.MODEL_ARCH.GPT2),
}
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
EMBEDDING = "token_embd.weight"


def rotary_order(rows: Tensor, heads: int) -> Tensor:
    """Rows (o, ...) of a q or k projection in llama.cpp's order: in each head, row j and row j + half side by side."""
    return rows.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)


def stored_order(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `rotary_order`."""
    return rows.unflatten(0, (heads, -1, 2)).swapaxes(1, 2).flatten(0, 2)


class Place(NamedTuple):
    """Where an update goes in the file: the base tensor's name there, and heads whose rows change order (0: none)."""

    name: str
    heads: int = 0


def gguf_places(base: Skeleton, adapter: Adapter) -> dict[str, Place]:
    """Module path -> its place in a GGUF adapter for this base.

    Raises BaseError for an architecture that is not in the table, ConfigError that names each update that llama.cpp
    has no place for.
    """
    config: Any = base.model.config
    row = architecture(base)
    names = gguf.get_tensor_name_map(row.gguf, config.num_hidden_layers)
    tied = {*base.ties, *base.ties.values()}
    places: dict[str, Place] = {}
    problems: list[str] = []
    for path, low in adapter.lowrank.items():
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if f"{path}.weight" in tied:
            problems.append(
                f"{path}: this base ties it to the other end, and llama.cpp keeps one tensor for both"
            )
        elif name is None:
            problems.append(f"{path}: llama.cpp's {gguf.MODEL_ARCH_NAMES[row.gguf]} has no such tensor")
        elif low.kind == "embedding" and name != EMBEDDING:
            problems.append(
                f"{path}: llama.cpp would overlook it, for it adapts the embedding of tokens alone"
            )
        else:
            heads = _HEADS.get(path.rpartition(".")[2]) if row.rotary else None
            places[path] = Place(name, getattr(config, heads) if heads else 0)
    if problems:
        hint = "onebase export --to merged, then llama.cpp's own converter, puts everything into the base"
        raise ConfigError("export to GGUF", "\n  " + "\n  ".join(problems), hint=hint)
    return places


def architecture(base: Skeleton) -> Architecture:
    """The base's row in ARCHITECTURES. Raises BaseError with the nearest names."""
    name = type(base.model).__name__
    if name not in ARCHITECTURES:
        found = f"{name} is not among the architectures whose adapters llama.cpp reads as they stand"
        near = nearest(name, ARCHITECTURES)
        raise BaseError(
            "export to GGUF", found, near, hint="onebase export --to merged, then llama.cpp's converter"
        )
    return ARCHITECTURES[name]


def save_gguf_adapter(
    path: str | Path, adapter: Adapter, source: Adapter, base: Skeleton, kind: FileType = "f32"
) -> Difference:
    """Write what `export.portable` made of `source` as a GGUF adapter, and read it back with gguf's own reader.

    Returns the largest difference from the source. Raises OutputExists, OutputError, what `gguf_places` raises, and
    FormatError where the difference is more than rounding to `kind`; nothing is left then.
    """
    target = Path(path)
    if target.exists():
        raise OutputExists(f"export to {target}", "it exists already", hint="choose another file")
    places = gguf_places(base, adapter)
    with atomic_file(target) as temporary:
        _write(temporary, adapter, architecture(base), places, kind)
        hint = "some values are too small or too large for f16: --dtype f32" if kind == "f16" else ""
        return require_near(differences(source, read_gguf_adapter(temporary, places)), LIMITS[kind], hint)


def _write(path: Path, adapter: Adapter, row: Architecture, places: dict[str, Place], kind: FileType) -> None:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[row.gguf])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.config.alpha))
        for name, tensor in _tensors(adapter, places):
            with np.errstate(over="ignore"):  # what f16 cannot hold is found when the file is read back
                values = tensor.numpy().astype(_DTYPES[kind])
            writer.add_tensor(name, np.ascontiguousarray(values))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _tensors(adapter: Adapter, places: dict[str, Place]) -> Iterator[tuple[str, Tensor]]:
    for path, (name, heads) in places.items():
        low = adapter.lowrank[path]
        a = low.A.T if name == EMBEDDING else low.A  # llama.cpp looks up rows of it
        yield f"{name}.lora_a", a
        yield f"{name}.lora_b", rotary_order(low.B, heads) if heads else low.B


def read_gguf_adapter(path: str | Path, places: dict[str, Place]) -> dict[str, LowRank]:
    """The updates of a GGUF adapter, under the paths and in the order of the base. Raises FormatError.

    A layer that stores (in, out) comes out as kind linear: the file does not know the difference.
    """
    reader = gguf.GGUFReader(path)
    alpha = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    if alpha is None:
        raise FormatError(f"read {path}", f"no {gguf.Keys.Adapter.LORA_ALPHA}")
    # A copy: what the reader gives is a view of the mapped file.
    stored = {one.name: torch.tensor(np.array(one.data, np.float32)) for one in reader.tensors}
    wanted = {f"{place.name}.lora_{side}" for place in places.values() for side in "ab"}
    if stored.keys() != wanted:
        raise FormatError(
            f"read {path}", f"other tensors than expected: {sorted(stored.keys() ^ wanted)[:5]}"
        )
    found: dict[str, LowRank] = {}
    for module, (name, heads) in places.items():
        a, b = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
        a, b = a.T if name == EMBEDDING else a, stored_order(b, heads) if heads else b
        found[module] = LowRank(a, b, float(alpha.contents()) / b.shape[1])
    return found
