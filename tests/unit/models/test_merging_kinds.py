"""Merging file to file for every kind of layer: experts stored whole or one by one, vision, two-sided models, heads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, T5ForConditionalGeneration, ViTForImageClassification

from merges import load, save, stirred, tensors
from onebase.adapters.injection import injected, new_adapter
from onebase.adapters.kinds import merged_weight
from onebase.config import LoraConfig
from onebase.errors import BaseError, BaseMismatch
from onebase.models.merging import check_merge, open_skeleton, plan_merge
from onebase.storage.format import save_adapter
from onebase.storage.shards import SINGLE
from onebase.transforms.merge import merged
from onebase.transforms.merge_files import OutputOptions, merge_files
from tiny import CONFIGS, tiny, tiny_inputs

pytestmark = pytest.mark.slow

LOADERS = {"t5": T5ForConditionalGeneration, "vit": ViTForImageClassification}
LORA = {"rank": 2, "alpha": 3}
CASES = [(arch, "lora", LORA) for arch in ("mixtral", "qwen3-moe", "gpt-oss", "t5", "vit")]
CASES += [(arch, "dora", LORA | {"dora": True}) for arch in ("gpt2", "vit", "llama")]
CASES += [(arch, "bias", LORA | {"lora_bias": True}) for arch in ("gpt2", "vit")]
CASES += [
    ("gpt2", "dora on an embedding", LORA | {"dora": True, "target_modules": ["wpe", "c_attn"]}),
    ("vit", "convolution", LORA | {"target_modules": ["projection"], "dora": True}),
    (
        "mixtral",
        "one of two stacks",
        LORA | {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ),
]


@pytest.mark.parametrize(
    ("arch", "options"), [case[::2] for case in CASES], ids=[f"{a}-{n}" for a, n, _ in CASES]
)
def test_law_1_what_transformers_loads_equals_base_and_adapter(arch, options, tmp_path):
    model, inputs = tiny(arch), tiny_inputs(arch)
    folder = save(model, tmp_path / "base")
    adapter = stirred(new_adapter(model, LoraConfig(**options)))
    output = merge_files(plan_merge(folder, adapter), tmp_path / "merged")
    result = load(output, LOADERS.get(arch))
    assert tensors(output).keys() == tensors(folder).keys()
    with torch.no_grad():
        with injected(model, adapter):
            wanted = model(**inputs).logits
        got, before = result(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=5e-4 * float(wanted.abs().max()))
    assert (got - before).abs().max() > 0.02 * wanted.abs().max()
    with merged(model, adapter):  # the same weights as in memory, up to the order of a sum
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(result.get_parameter(name), parameter, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", [None, "float32", "float16"])
def test_experts_are_rounded_once_and_pieces_do_not_show(stored, asked, tmp_path, monkeypatch):
    model = tiny("mixtral").to(getattr(torch, stored))
    folder = save(model, tmp_path / "base")
    names = [f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight" for n in range(4)]
    assert set(names) < tensors(folder).keys()  # the files hold the experts one by one
    adapter = stirred(new_adapter(model, LoraConfig(**LORA)))
    dtype = getattr(torch, asked or stored)
    options = OutputOptions(getattr(torch, asked) if asked else None, 20_000)
    monkeypatch.setattr("onebase.transforms.merge_files.PIECE", 100)
    got = tensors(merge_files(plan_merge(folder, adapter), tmp_path / "merged", options))
    path = "model.layers.0.mlp.experts.gate_up_proj"
    wanted = merged_weight(model.get_parameter(path).float(), adapter.lowrank[path]).to(dtype)
    for n, name in enumerate(names):
        gate = wanted[n, :48]
        assert got[name].dtype == dtype
        torch.testing.assert_close(got[name].float(), gate.float(), rtol=2**-8, atol=1e-6)
        assert dtype == torch.float32 or (got[name] == gate).float().mean() > 0.98  # one rounding, not two
    assert load(tmp_path / "merged").dtype == dtype


def test_what_an_adapter_leaves_alone_stays_to_the_bit(tmp_path):
    model = tiny("qwen3-moe")
    folder = save(model, tmp_path / "base")
    adapter = stirred(
        new_adapter(
            model,
            LoraConfig(**LORA, target_modules=[], target_parameters=["experts.gate_up_proj"], layers="1"),
        )
    )
    before, after = tensors(folder), tensors(merge_files(plan_merge(folder, adapter), tmp_path / "merged"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    wanted = {f"model.layers.1.mlp.experts.{n}.{p}_proj.weight" for n in range(4) for p in ("gate", "up")}
    assert changed == wanted


def test_experts_that_miss_one_are_refused(tmp_path):
    model = tiny("qwen3-moe")
    folder = save(model, tmp_path / "base")
    adapter = stirred(new_adapter(model, LoraConfig(**LORA)))
    stored = load_file(folder / SINGLE)
    gone = stored.pop("model.layers.0.mlp.experts.2.down_proj.weight")
    save_file(stored, folder / SINGLE, {"format": "pt"})
    with pytest.raises(
        BaseMismatch, match=r"0.mlp.experts.down_proj: stored in 3 pieces that do not make it"
    ):
        plan_merge(folder, adapter)
    save_file(
        stored | {"model.layers.0.mlp.experts.2.down_proj.weight": gone[:5].clone()},
        folder / SINGLE,
        {"format": "pt"},
    )
    with pytest.raises(BaseMismatch, match=r"0.mlp.experts.down_proj: stored in 4 pieces that do not fit"):
        plan_merge(folder, adapter)
    assert not (tmp_path / "merged").exists()


def test_a_conversion_without_an_exact_way_back_writes_nothing(tmp_path):
    model = tiny("mixtral")
    folder = save(model, tmp_path / "base")
    plan = plan_merge(folder, stirred(new_adapter(model, LoraConfig(**LORA))))
    lossy = []
    for part in plan.parts:
        change = part.change
        if hasattr(change, "fusion"):
            split = change.fusion.split
            rounded = lambda whole, split=split: {n: t.bfloat16().float() for n, t in split(whole).items()}  # noqa: E731
            change = change._replace(fusion=change.fusion._replace(split=rounded))
        lossy.append(part._replace(change=change))
    with pytest.raises(BaseError, match="no way back"):
        merge_files(type(plan)(plan.folder, tuple(lossy)), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_encoder_with_its_task_head(tmp_path):
    """An adapter whose paths are those of the whole classifier, and one whose paths are the encoder's."""
    torch.manual_seed(0)
    config = CONFIGS["bert"]()
    whole = BertForSequenceClassification(config).eval().requires_grad_(False)
    folder, inputs = save(whole, tmp_path / "base"), tiny_inputs("bert")
    options = LORA | {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}
    adapter = stirred(new_adapter(whole, LoraConfig(**options)))
    save_adapter(adapter, tmp_path / "adapter")
    output = merge_files(plan_merge(folder, tmp_path / "adapter"), tmp_path / "merged")
    with injected(whole, adapter):
        wanted = whole(**inputs).logits
    got = load(output, BertForSequenceClassification)
    torch.testing.assert_close(got(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.classifier.weight, adapter.full["classifier"]["weight"])
    check = check_merge(folder, adapter, output)
    assert check.difference < 1e-4 < check.largest
    inner = stirred(new_adapter(whole.bert, LoraConfig(**LORA, target_modules=["query"])))
    assert type(open_skeleton(folder, inner.lowrank).model).__name__ == "BertModel"
    assert plan_merge(folder, inner).changed == 2


def test_a_vision_transformer_is_checked_on_noise(tmp_path):
    model = tiny("vit")
    folder, adapter = save(model, tmp_path / "base"), stirred(new_adapter(model, LoraConfig(**LORA)))
    output = merge_files(plan_merge(folder, adapter), tmp_path / "merged")
    check = check_merge(folder, adapter, output)
    assert check.rounding < 1e-5 * check.largest
    assert check.difference < 1e-3 * check.largest
    other = merge_files(plan_merge(folder, stirred(adapter, 1)), tmp_path / "other")
    assert check_merge(folder, adapter, other).difference > 0.1 * check.largest


def test_a_bias_that_the_layer_lacks_is_refused_by_name(tmp_path):
    model = tiny("llama")
    adapter = stirred(new_adapter(model, LoraConfig(**LORA, target_modules=["q_proj"])))
    low = {p: one._replace(bias=torch.ones(one.B.shape[0])) for p, one in adapter.lowrank.items()}
    object.__setattr__(adapter, "lowrank", low)
    with pytest.raises(
        BaseMismatch, match=r"0.self_attn.q_proj: the adapter moves its bias, and the Linear has none"
    ):
        plan_merge(save(model, tmp_path / "base"), adapter)


def test_an_unknown_architecture(tmp_path):
    folder = save(tiny("vit"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))
    with pytest.raises(BaseError, match="none named: not an architecture"):
        open_skeleton(folder)
