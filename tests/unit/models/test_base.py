"""Finding, checking and loading bases: tiny random models saved the way users save them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from onebase.errors import BaseError, FormatError
from onebase.models.base import UNBOUNDED, load_base, open_tokenizer, wrap_base
from onebase.storage.shards import INDEX, SINGLE
from tiny import CONFIGS, output, some_ids, tiny


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("ONEBASE_HOME", str(home))
    return home


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def add_tokenizer(folder: Path, size: int, **special: str) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<eot>": 3} | {f"w{n}": n for n in range(4, size)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_gives_the_model_that_was_saved(tmp_path: Path, name: str):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path, dtype="float32", device="cpu")
    assert torch.equal(output(base.model, some_ids()), output(model, some_ids()))
    assert base.kind == ("encoder" if name == "bert" else "causal")
    assert base.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.ref == base.name == str(tmp_path)
    assert (base.dtype, base.dtype_reason) == ("float32", "float32: asked for")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "bert"])
def test_memory_and_files_give_one_fingerprint_and_size(tmp_path: Path, name: str):
    """Tied weights are stored once and counted once. (A mixture of experts is stored under other names.)"""
    model = tiny(name)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path, dtype="float32")
    assert wrap_base(base.model).fingerprint == base.fingerprint
    assert wrap_base(model).stored_bytes == base.stored_bytes == 4 * base.parameters


def test_sharded_equals_single(tmp_path: Path, llama: Path):
    tiny("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / INDEX).exists()
    one, many = (load_base(folder, dtype="float32") for folder in (llama, tmp_path / "sharded"))
    assert one.fingerprint == many.fingerprint
    assert one.stored_bytes == many.stored_bytes
    assert torch.equal(output(one.model, some_ids()), output(many.model, some_ids()))


def test_bfloat16_is_the_rounded_float32_and_keeps_the_fingerprint(llama: Path):
    full, half = load_base(llama, dtype="float32"), load_base(llama, dtype="bfloat16")
    assert full.fingerprint == half.fingerprint
    for (name, one), two in zip(full.model.named_parameters(), half.model.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), two), name


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_not_copied(llama: Path):
    base = load_base(llama, dtype="float32")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [
        tuple(int(edge, 16) for edge in fields[0].split("-"))
        for fields in maps
        if fields[-1] == str(llama / SINGLE)
    ]
    for name, parameter in base.model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges), name


def test_stop_pad_and_context(llama: Path):
    edit_json(llama / "generation_config.json", eos_token_id=[2, 3])
    base = load_base(llama)
    assert (base.stop_ids, base.pad_id, base.tokenizer) == ((2, 3), 0, None)
    assert base.context == CONFIGS["llama"]().max_position_embeddings

    edit_json(llama / "config.json", pad_token_id=None)
    add_tokenizer(llama, 96, unk_token="<unk>", eos_token="<eot>")
    edit_json(llama / "generation_config.json", eos_token_id=2, pad_token_id=None)
    base = load_base(llama)
    assert base.stop_ids == (2, 3)
    assert base.pad_id == 2
    assert (base.tokenizer.pad_token, len(base.tokenizer)) == (None, 96), "vocabulary and tokens as they were"

    add_tokenizer(llama, 96, unk_token="<unk>", eos_token="<eot>", pad_token="w7")
    assert load_base(llama).pad_id == 7
    assert open_tokenizer(llama)("w5 w9").input_ids == [0]  # no splitter: one unknown word


def test_tokenizer_longer_than_the_embedding_is_an_error(llama: Path):
    add_tokenizer(llama, 97, unk_token="<unk>")
    with pytest.raises(BaseError, match="knows 97 tokens, its embedding only 96"):
        load_base(llama)


def test_an_encoder_out_of_a_model_with_a_task_head(tmp_path: Path):
    for head in (BertForMaskedLM, BertForSequenceClassification):
        model = head(CONFIGS["bert"]()).eval()
        folder = tmp_path / head.__name__
        model.save_pretrained(folder)
        said: list[str] = []
        base = load_base(folder, dtype="float32", notify=said.append)
        assert base.kind == "encoder"
        with torch.no_grad():
            wanted = model.bert(some_ids()).last_hidden_state
        assert torch.equal(output(base.model, some_ids()), wanted)
        assert (base.model.pooler is None) == (model.bert.pooler is None), "no pooler filled with noise"
        assert len(said) == 1
        assert "without its task head" in said[0]


def test_seq2seq(tmp_path: Path):
    config = T5Config(
        vocab_size=96, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    base = load_base(tmp_path)
    assert (base.kind, base.context, base.stop_ids) == ("seq2seq", UNBOUNDED, (1,))
    assert wrap_base(base.model).kind == "seq2seq"


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / SINGLE) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / SINGLE, metadata={"format": "pt"})


def test_weights_that_do_not_fit_are_all_named(llama: Path):
    rewrite(
        llama,
        **{
            "model.layers.0.mlp.up_proj.weight": None,
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.0.mlp.down_proj.weight": torch.ones(2, 3),
            "model.layers.7.extra.weight": torch.ones(1),
        },
    )
    with pytest.raises(BaseError) as caught:
        load_base(llama)
    missing, unexpected, mismatched = str(caught.value).splitlines()[:3]
    assert "layers.0.mlp.up_proj" in missing
    assert "layers.1.mlp.up_proj" in missing
    assert "layers.7.extra" in unexpected
    assert "layers.0.mlp.down_proj" in mismatched
    assert "[2, 3]" in mismatched


def test_a_truncated_checkpoint(llama: Path):
    data = (llama / SINGLE).read_bytes()
    (llama / SINGLE).write_bytes(data[:-100])
    with pytest.raises(FormatError, match="cut short"):
        load_base(llama)


def spoil_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "their/base"}')


def spoil_pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


SPOILED = {
    "adapter": (spoil_adapter, "an adapter, not a base\n.*'their/base'"),
    "pickle": (spoil_pickle, r"no model.safetensors.*\n.*pytorch_model.bin.*never read"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "no model.safetensors or model.safetensors.index.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot read .*config.json"),
    "list as config": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "unknown type": (lambda f: edit_json(f / "config.json", model_type="foo"), "cannot load .*foo"),
    "no architecture": (
        lambda f: edit_json(f / "config.json", architectures=None),
        "architecture none named",
    ),
    "other than text": (
        lambda f: edit_json(f / "config.json", architectures=["LlavaForConditionalGeneration"]),
        "LlavaForConditionalGeneration: not a text model",
    ),
    "quantised": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
        r"quantised \(gptq\)",
    ),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot read the tokenizer"),
}


@pytest.mark.parametrize(("spoil", "text"), SPOILED.values(), ids=SPOILED.keys())
def test_a_folder_that_is_no_base_says_why(llama: Path, spoil, text: str):
    spoil(llama)
    with pytest.raises(BaseError, match=text):
        load_base(llama)


def test_repository_code_never_runs(llama: Path):
    (llama / "modeling_own.py").write_text(f"open({str(llama / 'ran')!r}, 'w')")
    names = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_json(llama / "config.json", model_type="own", auto_map=names)
    with pytest.raises(BaseError, match="cannot load"):
        load_base(llama)
    assert not (llama / "ran").exists()


@pytest.mark.parametrize("ref", ["lama", "./none/at/all", "x.gguf"])
def test_a_path_that_is_not_there(ref: str, tmp_path: Path):
    with pytest.raises(BaseError, match="no such file or folder"):
        load_base(tmp_path / ref)


def test_a_misspelt_path_or_name_gets_the_nearest(llama: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BaseError) as caught:
        load_base(llama.with_name("lama"))
    assert caught.value.valid[0] == str(llama)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseError) as caught:
        load_base("smollm-135m")
    assert caught.value.valid[0] == "smollm2-135m"


def test_a_hub_name_without_network_is_explained_in_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseError, match=r"'no-one/nothing': .*not cached.*cannot be reached") as caught:
        load_base("no-one/nothing")
    assert len(str(caught.value).splitlines()) == 2


def test_a_cached_hub_name_needs_no_network(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--some-one--llama", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(llama, repository / "snapshots" / commit)
    base = load_base("some-one/llama", dtype="float32")
    assert base.name == "some-one/llama"
    assert base.fingerprint == load_base(llama, dtype="float32").fingerprint

    (repository / "snapshots" / commit / SINGLE).unlink()  # an interrupted download is not taken for a base
    with pytest.raises(BaseError, match=r"no model\.safetensors"):
        load_base("some-one/llama")


def test_wrap_base_takes_any_module():
    base = wrap_base(torch.nn.Sequential(torch.nn.Linear(3, 2)).bfloat16(), name="mine")
    assert (base.kind, base.name, base.context, base.stop_ids) == ("encoder", "mine", UNBOUNDED, ())
    assert (base.dtype, base.parameters, base.stored_bytes) == ("bfloat16", 8, 16)
    assert wrap_base(tiny("gpt2")).context == CONFIGS["gpt2"]().n_positions


@pytest.mark.slow
def test_the_builtin_base_answers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ONEBASE_HOME")  # the user's own cache: fetched and converted once
    base = load_base("smollm2-135m", dtype="float32")
    assert base.fingerprint == "sha256:4dbc7e16abd1870dbb77ac45804388c7d44ebe17b9bd35be1f050855b535f839"
    assert (base.parameters, base.context, base.stop_ids, base.pad_id) == (134_515_008, 8192, (2,), 2)
    assert base.stored_bytes == 4 * base.parameters
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = base.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = base.model.generate(**prompt, do_sample=False, max_new_tokens=12)
    answer = base.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.startswith("The capital of France is Paris")
