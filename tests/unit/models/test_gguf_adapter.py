"""GGUF adapters: llama.cpp's names, shapes and rotary order, read with gguf's own reader; and what is refused."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters import every_kind, trained
from merges import save
from onebase.config import LoraConfig
from onebase.errors import BaseError, ConfigError, FormatError, OutputExists
from onebase.models.gguf_adapter import (
    ARCHITECTURES,
    gguf_places,
    read_gguf_adapter,
    rotary_order,
    save_gguf_adapter,
    stored_order,
)
from onebase.models.merging import open_skeleton
from onebase.transforms.export import portable
from tiny import tiny

ARCHES = ["llama", "llama-tied", "mistral", "qwen3", "gemma3", "gpt2", "phi3"]


@pytest.fixture
def skeleton(tmp_path):
    return lambda arch: open_skeleton(save(tiny(arch), tmp_path / arch))


def some(base, seed=0, **options):
    """A portable adapter and its source, on all linear layers."""
    source = trained(
        tiny("llama") if base is None else base, LoraConfig(**{"rank": 4, "alpha": 6, **options}), seed
    )
    return portable(source), source


def test_rotary_order_by_hand():
    rows = torch.arange(8)[:, None]
    assert rotary_order(rows, 1).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert rotary_order(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_rotary_order_and_back(heads, half, rank):
    rows = torch.randn(heads * half * 2, rank)
    assert torch.equal(stored_order(rotary_order(rows, heads), heads), rows)
    # llama.cpp's converter: reshape(n_head, 2, rows / n_head / 2, ...), swap the inner two, back
    array = rows.numpy().reshape(heads, 2, half, rank).swapaxes(1, 2).reshape(rows.shape)
    assert np.array_equal(rotary_order(rows, heads).numpy(), array)


@pytest.mark.parametrize("arch", ARCHES)
def test_written_and_read_back(arch, skeleton, tmp_path):
    base = skeleton(arch)
    result, source = some(tiny(arch), rslora=True)
    found = save_gguf_adapter(tmp_path / "a.gguf", result, source, base)
    assert found.relative <= 1e-6
    places = gguf_places(base, result)
    read = read_gguf_adapter(tmp_path / "a.gguf", places)
    for path, low in result.lowrank.items():
        assert torch.equal(read[path].A, low.A)
        assert torch.equal(read[path].B, low.B)
        assert read[path].scale == 1.0
    assert len({place.name for place in places.values()}) == len(result.lowrank)


def test_what_the_file_says(skeleton, tmp_path):
    base = skeleton("llama")
    result, source = some(tiny("llama"))
    save_gguf_adapter(tmp_path / "a.gguf", result, source, base)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    facts = {
        name: field.contents() for name, field in reader.fields.items() if "." in name and "GGUF" not in name
    }
    assert facts["general.type"] == "adapter"
    assert facts["general.architecture"] == "llama"
    assert facts["adapter.type"] == "lora"
    assert facts["adapter.lora.alpha"] == 4.0
    tensors = {one.name: one for one in reader.tensors}
    q, down = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    a, b = tensors["blk.1.ffn_down.weight.lora_a"], tensors["blk.1.ffn_down.weight.lora_b"]
    assert a.tensor_type == b.tensor_type == gguf.GGMLQuantizationType.F32
    assert np.array_equal(a.data, result.lowrank[down].A.numpy())  # (r, in)
    assert np.array_equal(b.data, result.lowrank[down].B.numpy())  # (out, r)
    turned = rotary_order(result.lowrank[q].B, 4).numpy()
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_b"].data, turned)
    assert not np.array_equal(turned, result.lowrank[q].B.numpy())
    k = "model.layers.0.self_attn.k_proj"  # two heads of keys, not four
    assert np.array_equal(
        tensors["blk.0.attn_k.weight.lora_b"].data, rotary_order(result.lowrank[k].B, 2).numpy()
    )
    assert len(tensors) == 2 * len(result.lowrank)


def test_no_other_architecture_turns_rows(skeleton):
    for arch in ("qwen3", "gemma3", "phi3", "gpt2"):
        base = skeleton(arch)
        assert {place.heads for place in gguf_places(base, some(tiny(arch))[0]).values()} == {0}


def test_embedding_and_head_of_an_untied_base(skeleton, tmp_path):
    base = skeleton("llama")
    source = trained(tiny("llama"), every_kind(tiny("llama")))
    result = portable(source)
    save_gguf_adapter(tmp_path / "a.gguf", result, source, base)
    tensors = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    embed, head = result.lowrank["model.embed_tokens"], result.lowrank["lm_head"]
    assert np.array_equal(
        tensors["token_embd.weight.lora_a"], embed.A.T.numpy()
    )  # (vocabulary, r): rows are looked up
    assert np.array_equal(tensors["token_embd.weight.lora_b"], embed.B.numpy())
    assert np.array_equal(tensors["output.weight.lora_a"], head.A.numpy())


@pytest.mark.parametrize(
    ("arch", "name", "message"),
    [
        ("llama-tied", "embed_tokens", "model.embed_tokens: this base ties it"),
        ("llama-tied", "lm_head", "lm_head: this base ties it"),
        ("gpt2", "wte", "transformer.wte: this base ties it"),
        ("gpt2", "wpe", "transformer.wpe: llama.cpp would overlook it"),
    ],
)
def test_tensors_that_llama_cpp_would_overlook_or_trip_over(arch, name, message, skeleton, tmp_path):
    result, source = some(tiny(arch), target_modules=[name])
    with pytest.raises(ConfigError, match=f"(?s){message}.*--to merged"):
        save_gguf_adapter(tmp_path / "a.gguf", result, source, skeleton(arch))
    assert not (tmp_path / "a.gguf").exists()


def test_an_unknown_architecture_is_refused_by_name(skeleton, tmp_path):
    result, source = some(tiny("mixtral"), target_modules=["q_proj"])
    with pytest.raises(BaseError, match=r"(?s)MixtralForCausalLM.*nearest valid: MistralForCausalLM"):
        save_gguf_adapter(tmp_path / "a.gguf", result, source, skeleton("mixtral"))


def test_half_precision_rounds_and_says_where_it_cannot(skeleton, tmp_path):
    base = skeleton("llama")
    result, source = some(tiny("llama"))
    found = save_gguf_adapter(tmp_path / "a.gguf", result, source, base, "f16")
    assert 1e-5 < found.relative < 2e-3
    assert {one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "a.gguf").tensors} == {"F16"}
    for factor in (1e6, 1e-7):  # above what a half can hold, and below
        scaled = {p: low._replace(B=low.B * factor) for p, low in source.lowrank.items()}
        odd = replace(source, lowrank=scaled)
        with pytest.raises(FormatError, match="--dtype f32"):
            save_gguf_adapter(tmp_path / "b.gguf", portable(odd), odd, base, "f16")
        assert [path.name for path in tmp_path.glob("*b.gguf*")] == []
        assert save_gguf_adapter(tmp_path / f"{factor}.gguf", portable(odd), odd, base).relative <= 1e-6


def test_a_file_that_exists_and_one_that_is_another(skeleton, tmp_path):
    base = skeleton("llama")
    result, source = some(tiny("llama"))
    save_gguf_adapter(tmp_path / "a.gguf", result, source, base)
    with pytest.raises(OutputExists, match="exists already"):
        save_gguf_adapter(tmp_path / "a.gguf", result, source, base)
    places = gguf_places(base, result)
    places.pop("model.layers.0.mlp.up_proj")
    with pytest.raises(FormatError, match=r"other tensors than expected.*ffn_up"):
        read_gguf_adapter(tmp_path / "a.gguf", places)
    other = some(tiny("llama"), seed=1)[1]
    with pytest.raises(FormatError, match="further from the source adapter"):
        save_gguf_adapter(tmp_path / "b.gguf", result, other, base)
    assert not (tmp_path / "b.gguf").exists()


def test_every_architecture_in_the_table_is_one_of_ggufs():
    for row in ARCHITECTURES.values():
        assert gguf.MODEL_ARCH_NAMES[row.gguf]
        assert (
            gguf.get_tensor_name_map(row.gguf, 1).get_name("model.layers.0.mlp.down_proj")
            or row.gguf.name == "GPT2"
        )
