"""GGUF files to safetensors folders: a tiny real one, written here with llama.cpp's own writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from onebase.errors import BaseError
from onebase.models.gguf import convert_gguf, quiet, require_complete
from onebase.storage.shards import list_tensors, read_tensor

WIDTH, HIDDEN, HEADS, KV_HEADS, CONTEXT = 32, 64, 4, 2, 48
TOKENS = ["<|end|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "th"]
Q8 = gguf.GGMLQuantizationType.Q8_0
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def weights() -> dict[str, np.ndarray]:
    """The tensors of a one-layer Llama under GGUF's names."""
    block = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (WIDTH // 2, WIDTH),
        "attn_v": (WIDTH // 2, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    random = np.random.default_rng(0)
    return {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, tensors: dict[str, np.ndarray], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors.items():
        blocks = tensor.ndim == 2
        stored = gguf.quants.quantize(tensor, Q8) if blocks else tensor
        writer.add_tensor(name, stored, raw_dtype=Q8 if blocks else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def left(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "bases").glob("*") if path.suffix != ".lock")


def test_the_folder_holds_the_same_weights_tokenizer_and_template(tmp_path: Path, home: Path, capfd):
    tensors = weights()
    said: list[str] = []
    file = write_gguf(tmp_path / "tiny.gguf", tensors)
    folder = convert_gguf(file, home, said.append)
    assert convert_gguf(file, home, said.append) == folder
    assert len(said) == 1
    assert "tiny.gguf" in said[0]
    assert capfd.readouterr() == ("", ""), "neither bars nor notices"

    stored = {info.name: read_tensor(info) for info in list_tensors(folder)}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert len(stored) == len(tensors), "tied head left out"
    up = gguf.quants.dequantize(gguf.quants.quantize(tensors["blk.0.ffn_up.weight"], Q8), Q8)
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], torch.from_numpy(up))
    norm = torch.from_numpy(tensors["blk.0.attn_norm.weight"])
    assert torch.equal(stored["model.layers.0.input_layernorm.weight"], norm)

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == CONTEXT
    assert "quantization_config" not in config

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("th<|im_end|>a").input_ids == [TOKENS.index("th"), 2, TOKENS.index("a")]
    assert tokenizer.chat_template == TEMPLATE
    assert left(home) == [folder.name]


@pytest.mark.parametrize("share", [0.99, 0.5, 0.05, 0.005])
def test_a_cut_file_says_so_and_leaves_nothing(tmp_path: Path, home: Path, share: float):
    file = write_gguf(tmp_path / "tiny.gguf", weights())
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(BaseError, match=r"tiny\.gguf: cut short, damaged or not supported \("):
        convert_gguf(file, home)
    assert left(home) == []


@pytest.mark.parametrize("content", [b"", b"GG", b"<html>not found</html>"])
def test_what_is_no_gguf_says_so(tmp_path: Path, home: Path, content: bytes):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(BaseError, match="not a GGUF file"):
        convert_gguf(tmp_path / "x.gguf", home)
    assert not home.exists()


def test_an_unknown_architecture_is_named(tmp_path: Path, home: Path):
    file = write_gguf(tmp_path / "tiny.gguf", weights(), architecture="perceptron")
    with pytest.raises(BaseError, match="perceptron"):
        convert_gguf(file, home)


def test_a_missing_tensor_is_named_instead_of_filled_with_noise(tmp_path: Path, home: Path):
    tensors = weights()
    del tensors["blk.0.ffn_up.weight"]
    file = write_gguf(tmp_path / "tiny.gguf", tensors)
    with pytest.raises(BaseError, match=r"missing keys: model\.layers\.0\.mlp\.up_proj\.weight"):
        convert_gguf(file, home)
    assert left(home) == []


def test_all_misfits_are_listed_at_once():
    require_complete("base", {"missing_keys": set(), "unexpected_keys": [], "mismatched_keys": None})
    report = {"missing_keys": {"b", "a"}, "unexpected_keys": {"c"}, "error_msgs": ["broken"]}
    with pytest.raises(BaseError) as caught:
        require_complete("base", report)
    for text in ("missing keys: a, b", "unexpected keys: c", "error msgs: broken"):
        assert text in str(caught.value)


@pytest.mark.parametrize("shown", [True, False])
def test_quiet_gives_back_what_it_changed(shown: bool):
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub = are_progress_bars_disabled()
    switch = {
        True: transformers_logging.enable_progress_bar,
        False: transformers_logging.disable_progress_bar,
    }
    try:
        switch[shown]()
        transformers_logging.set_verbosity_info()
        with quiet():
            assert not transformers_logging.is_progress_bar_enabled()
            assert transformers_logging.get_verbosity() == transformers_logging.ERROR
        assert transformers_logging.is_progress_bar_enabled() == shown
        assert are_progress_bars_disabled() != shown
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
    finally:
        transformers_logging.set_verbosity(level)
        switch[bars]()
    assert are_progress_bars_disabled() == hub


CONVERT = """
import sys
from pathlib import Path
from onebase.models.gguf import convert_gguf
print(convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]), lambda text: print("said", text)))
"""


def test_two_processes_convert_once(tmp_path: Path, home: Path):
    file = write_gguf(tmp_path / "tiny.gguf", weights())
    command = [sys.executable, "-c", CONVERT, str(file), str(home)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum(line.startswith("said") for lines in said for line in lines) == 1
    assert said[0][-1] == said[1][-1]
    assert left(home) == [Path(said[0][-1]).name]
    assert list_tensors(said[0][-1])
