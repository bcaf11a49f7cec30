"""Merging file to file: what transformers loads equals base and adapter, and files are whole or absent."""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config
from transformers import T5ForConditionalGeneration as T5
from transformers.conversion_mapping import get_model_conversion_mapping

from adapters import trained
from merges import CASES, EMBEDDINGS, SPECS, assert_same_outputs, load, same, save, tensors
from onebase.adapters.adapter import Origin
from onebase.adapters.injection import injected
from onebase.adapters.kinds import merged_weight
from onebase.config import LoraConfig
from onebase.errors import BaseError, BaseMismatch, OutputError, OutputExists
from onebase.models import stored
from onebase.models.fingerprint import fingerprint_files
from onebase.models.merging import check_merge, open_skeleton, plan_merge
from onebase.storage.format import save_adapter
from onebase.storage.shards import INDEX, SINGLE, list_tensors
from onebase.transforms.merge import make_plan
from onebase.transforms.merge_files import OutputOptions, merge_files
from texts import save_base, text_model
from tiny import output, some_ids, tiny


@CASES
def test_merged_files_equal_base_and_adapter(arch, spec, tmp_path):
    model, ids = tiny(arch), some_ids()
    adapter = trained(model, SPECS[spec](arch))
    folder = save(model, tmp_path / "base")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    result = load(merge_files(plan_merge(folder, adapter), tmp_path / "merged"))
    with injected(model, adapter):
        assert_same_outputs(output(result, ids), output(model, ids))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("arch", ["llama-tied", "gemma3", "gpt2"])
def test_changing_one_of_two_tied_weights_unties_them(arch, tmp_path):
    model = tiny(arch)
    name = EMBEDDINGS.get(arch, "embed_tokens")
    folder = save(model, tmp_path / "base")
    own = model.lm_head.weight.clone()
    for number, spec in enumerate((SPECS["one tied"], SPECS["saved"])):
        adapter = trained(model, spec(arch))
        result = load(merge_files(plan_merge(folder, adapter), tmp_path / f"merged-{number}"))
        assert result.config.tie_word_embeddings is False
        kept, changed = result.lm_head.weight, result.get_input_embeddings().weight
        if spec is SPECS["saved"]:
            kept, changed = changed, kept
            assert torch.equal(changed, adapter.full["lm_head"]["weight"])
        else:
            (low,) = (low for path, low in adapter.lowrank.items() if path.endswith(name))
            torch.testing.assert_close(changed, merged_weight(own, low), rtol=0, atol=1e-6)
        assert torch.equal(kept, own)
    plain = merge_files(plan_merge(folder, trained(model, LoraConfig(rank=2))), tmp_path / "plain")
    tied = load(plain)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


@pytest.mark.parametrize(("arch", "remembers"), [("llama", True), ("mixtral", False)])
def test_which_tensor_each_parameter_is_loaded_from_is_asked_once(arch, remembers, tmp_path, monkeypatch):
    asked: list[str] = []

    def rules(model):
        asked.append(type(model).__name__)
        return get_model_conversion_mapping(model)

    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(stored, "get_model_conversion_mapping", rules)
    folder = save(tiny(arch), tmp_path / "base")
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))  # a file that was just written is not remembered
    first, second = open_skeleton(folder), open_skeleton(folder)
    assert len(asked) == (1 if remembers else 2)
    assert (first.stored, len(first.fusions)) == (second.stored, len(second.fusions))
    os.utime(folder / "config.json", (1e9, 1e9 + 1))
    assert open_skeleton(folder).stored == first.stored
    assert len(asked) == (2 if remembers else 3)
    monkeypatch.setattr(stored, "USER_REGISTERED_MAPPINGS", {"anything"})
    open_skeleton(folder)
    assert len(asked) == (3 if remembers else 4)


def test_names_that_transformers_translates(tmp_path):
    """A checkpoint without the model's prefix, one with a task head around the encoder, and older names."""
    model, ids = tiny("gpt2"), some_ids()
    adapter = trained(model, SPECS["every kind"]("gpt2"))
    folder = save(model, tmp_path / "base")
    stored = load_file(folder / SINGLE)
    save_file(
        {n.removeprefix("transformer."): t for n, t in stored.items()}, folder / SINGLE, {"format": "pt"}
    )
    merged_folder = merge_files(plan_merge(folder, adapter), tmp_path / "merged")
    assert {"wte.weight", "lm_head.weight"} < tensors(merged_folder).keys()
    with injected(model, adapter):
        assert_same_outputs(output(load(merged_folder), ids), output(model, ids))

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    masked = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4)).eval().requires_grad_(False)
    adapter = trained(masked.bert, LoraConfig(rank=2, alpha=6))
    merged_folder = merge_files(
        plan_merge(save(masked, tmp_path / "masked"), adapter), tmp_path / "masked-merged"
    )
    with injected(masked.bert, adapter):
        wanted = output(masked, ids)
    torch.testing.assert_close(
        output(load(merged_folder, BertForMaskedLM), ids), wanted, rtol=1e-5, atol=2e-5
    )


def test_an_architecture_that_always_ties_stores_apart_what_differs(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    model = T5(T5Config(**sizes, decoder_start_token_id=0)).eval().requires_grad_(False)
    folder, ids = save(model, tmp_path / "base"), some_ids()
    adapter = trained(model, LoraConfig(rank=2, alpha=6, target_modules=["q", "v", "wo"]))
    result = load(merge_files(plan_merge(folder, adapter), tmp_path / "merged"), T5)
    with injected(model, adapter), torch.no_grad():
        wanted = model(input_ids=ids, decoder_input_ids=ids).logits
        torch.testing.assert_close(result(input_ids=ids, decoder_input_ids=ids).logits, wanted)
    head = trained(model, LoraConfig(rank=2, alpha=6, target_modules=["lm_head"]))
    plan = plan_merge(folder, head)
    assert plan.untied == ("lm_head.weight",)
    assert plan.settings == {}


def test_shards_hold_the_same_tensors(tmp_path):
    model = tiny("qwen3")
    folder, adapter = save(model, tmp_path / "base"), trained(model, LoraConfig(rank=2))
    plan, threads = plan_merge(folder, adapter), torch.get_num_threads()
    single = merge_files(plan, tmp_path / "single")
    many = merge_files(plan, tmp_path / "many", OutputOptions(shard_bytes=20_000))
    assert len(list(many.glob("*.safetensors"))) > 3
    assert same(tensors(single), tensors(many))
    assert torch.get_num_threads() == threads
    total = sum(info.end - info.start for info in list_tensors(many))
    assert json.loads((many / INDEX).read_text())["metadata"]["total_size"] == total
    again = merge_files(plan_merge(many, adapter), tmp_path / "again")  # a sharded base
    assert tensors(again).keys() == tensors(many).keys()
    assert load(many).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", None), ("bfloat16", "float32")]
)
def test_the_sum_is_made_in_float32_and_rounded_once(stored, asked, tmp_path):
    model = tiny("llama").to(getattr(torch, stored))
    folder, adapter = save(model, tmp_path / "base"), trained(model, LoraConfig(rank=4, alpha=8))
    dtype = getattr(torch, asked) if asked else None
    got = tensors(merge_files(plan_merge(folder, adapter), tmp_path / "merged", OutputOptions(dtype)))
    wide = {path: model.get_submodule(path).weight.float() for path in adapter.lowrank}
    for path, low in adapter.lowrank.items():
        wanted = (wide[path].double() + low.scale * (low.B.double() @ low.A.double())).float()
        close = {"rtol": 2**-8, "atol": 1e-6} if got[f"{path}.weight"].dtype == torch.bfloat16 else {}
        torch.testing.assert_close(got[f"{path}.weight"].float(), wanted, **close)
        assert torch.equal(
            got[f"{path}.weight"], merged_weight(wide[path], low).to(got[f"{path}.weight"].dtype)
        )
    assert {t.dtype for t in got.values()} == {dtype or torch.bfloat16}
    assert load(tmp_path / "merged").dtype == (dtype or torch.bfloat16)


def test_pieces_do_not_show_in_the_result(tmp_path, monkeypatch):
    model = tiny("gpt2")
    folder, adapter = save(model, tmp_path / "base"), trained(model, SPECS["every kind"]("gpt2"))
    plan = plan_merge(folder, adapter)
    whole = tensors(merge_files(plan, tmp_path / "whole"))
    monkeypatch.setattr("onebase.transforms.merge_files.PIECE", 1000)
    cut = tensors(merge_files(plan, tmp_path / "cut"))
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-6, atol=1e-7)


def test_what_stands_beside_the_weights_goes_along(tmp_path):
    folder = save_base(tmp_path / "base")
    (folder / "optimizer.pt").write_bytes(b"x")
    plan = plan_merge(folder, trained(text_model(), LoraConfig(rank=2)))
    target = merge_files(plan, tmp_path / "merged")
    kept = {file.name for file in folder.iterdir()} - {"optimizer.pt"}
    assert {file.name for file in target.iterdir()} == kept
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} < kept
    assert plan.changed == 14
    check = check_merge(folder, trained(text_model(), LoraConfig(rank=2)), target)
    assert check.same_choice == 1.0
    assert check.rounding == 0.0
    assert 0 < check.difference < 1e-4 < check.largest
    assert fingerprint_files(target) != fingerprint_files(folder)


def test_the_report_tells_rounding_from_a_wrong_merge(tmp_path):
    folder = save_base(tmp_path / "base")
    adapter = trained(text_model(), LoraConfig(rank=2))
    low = merge_files(plan_merge(folder, adapter), tmp_path / "low", OutputOptions(torch.bfloat16))
    check = check_merge(folder, adapter, low, ["What has Ada bought?"])
    assert check.rounding == pytest.approx(check.difference, rel=0.05)
    assert check.rounding > 1e-3
    other = replace(adapter, lowrank={p: low._replace(scale=0.0) for p, low in adapter.lowrank.items()})
    check = check_merge(folder, adapter, merge_files(plan_merge(folder, other), tmp_path / "wrong"))
    assert check.difference > 0.1


def test_everything_that_does_not_fit_is_named_at_once(tmp_path):
    model = tiny("llama")
    folder, adapter = save(model, tmp_path / "base"), trained(model, LoraConfig(rank=2))
    with pytest.raises(BaseMismatch, match=r"(?s)h.0.attn.c_attn: the base has no such.*h.1.mlp.c_proj"):
        plan_merge(folder, trained(tiny("gpt2"), LoraConfig(rank=2)))
    origin = Origin(base="other", fingerprint="sha256:0")
    with pytest.raises(BaseMismatch, match=r"made for base other, sha256:0; this base has sha256:"):
        plan_merge(folder, replace(adapter, origin=origin))
    assert plan_merge(folder, replace(adapter, origin=origin), allow_base_mismatch=True).changed == 14
    save_adapter(replace(adapter, origin=origin), tmp_path / "adapter")
    with pytest.raises(BaseMismatch, match="made for base other"):
        plan_merge(folder, tmp_path / "adapter")
    stored = load_file(folder / SINGLE)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        del stored[name]
    save_file(stored, folder / SINGLE, {"format": "pt"})
    with pytest.raises(
        BaseMismatch, match=r"(?s)0.mlp.up_proj.weight: the base's files hold no.*1.self_attn.q_proj"
    ):
        plan_merge(folder, adapter)
    for config, message in {
        '{"model_type": "nonsense"}': "cannot merge",
        '{"model_type": "llama"}': "none named: not an architecture",
        '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}': "quantised",
    }.items():
        (folder / "config.json").write_text(config)
        with pytest.raises(BaseError, match=message):
            plan_merge(folder, adapter)
    with pytest.raises(BaseError, match="an adapter, not a base"):
        plan_merge(tmp_path / "adapter", adapter)


def test_a_weight_of_another_type_or_shape_carries_no_update(tmp_path):
    model = tiny("llama")
    folder, adapter = (
        save(model, tmp_path / "base"),
        trained(model, LoraConfig(rank=2, target_modules=["q_proj"])),
    )
    base = open_skeleton(folder)
    small = tuple(info._replace(dtype="I32") for info in base.tensors)
    with pytest.raises(BaseMismatch, match=r"q_proj.weight: stored as I32, which cannot carry an update"):
        make_plan(replace(base, tensors=small), adapter)
    odd = tuple(info._replace(shape=(16, 64)) for info in base.tensors)
    with pytest.raises(
        BaseMismatch, match=r"stored with shape \(16, 64\), the configuration says \(32, 32\)"
    ):
        make_plan(replace(base, tensors=odd), adapter)


def test_an_embedding_that_peft_stored_along_is_compared(tmp_path):
    """PEFT adds the whole embedding to an adapter that touches it; the meta model has no values to compare."""
    model = tiny("llama")
    folder = save(model, tmp_path / "base")
    adapter = trained(model, LoraConfig(rank=2, target_modules=["embed_tokens", "q_proj"]))
    save_adapter(adapter, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    copy = {"base_model.model.model.embed_tokens.base_layer.weight": model.model.embed_tokens.weight}
    stored = load_file(file)
    save_file(stored | copy, file)
    assert plan_merge(folder, tmp_path / "a").changed == 3
    save_file(stored | {name: tensor + 1 for name, tensor in copy.items()}, file)
    with pytest.raises(BaseMismatch, match="carries this base tensor, and it is not the base's"):
        plan_merge(folder, tmp_path / "a")


def test_the_output_never_touches_what_is_there(tmp_path):
    model = tiny("llama")
    folder = save(model, tmp_path / "base")
    plan = plan_merge(folder, trained(model, LoraConfig(rank=2)))
    (tmp_path / "link").symlink_to(folder)
    for inside in (folder, folder / "merged", tmp_path / "link" / "x", tmp_path / "base" / ".." / "base"):
        with pytest.raises(OutputError, match="it lies in the base"):
            merge_files(plan, inside)
    (tmp_path / "full").mkdir()
    with pytest.raises(OutputExists):
        merge_files(plan, tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "full", "link"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    model = tiny("llama")
    plan = plan_merge(save(model, tmp_path / "base"), trained(model, LoraConfig(rank=2)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, limits[1])
    )  # writing fails half-way, as on a full disk
    try:
        with pytest.raises(OutputError, match="cannot write"):
            merge_files(plan, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"GB are needed, 0.0 GB are free"):
        merge_files(plan, tmp_path / "deep" / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_base_that_is_cut_while_it_is_read(tmp_path):
    model = tiny("llama")
    folder = save(model, tmp_path / "base")
    plan = plan_merge(folder, trained(model, LoraConfig(rank=2)))
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])
    with pytest.raises(OutputError, match="ended early"):
        merge_files(plan, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


MEASURE = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from onebase.adapters.adapter import Adapter, LowRank
from onebase.config import LoraConfig
from onebase.transforms.merge import Skeleton, make_plan
from onebase.transforms.merge_files import OutputOptions, merge_files
from onebase.storage.shards import list_tensors

folder = Path(sys.argv[1])
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(2560, 2560, bias=False) for _ in range(4)))  # 26 MB each
low = LowRank(torch.ones(4, 2560), torch.ones(2560, 4), 0.5)
adapter = Adapter(LoraConfig(), {f"{n}": low for n in range(3)})
tensors = tuple(list_tensors(folder))
names = {info.name: info.name for info in tensors}
plan = make_plan(Skeleton(folder, model, tensors, names, {}, True, ""), adapter)
torch.ones(8, 8) @ torch.ones(8, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_files(plan, folder.with_name("merged"), OutputOptions(torch.bfloat16))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    weight = torch.full((2560, 2560), 1.0)
    save_file({f"{n}.weight": weight.clone() for n in range(4)}, folder / SINGLE)
    (folder / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000  # kB; the largest tensor has 26 MB, the file 105
    got = tensors(tmp_path / "merged")
    assert got["2.weight"].unique().tolist() == [3.0]
    assert got["3.weight"].unique().tolist() == [1.0]
