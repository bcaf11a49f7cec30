"""The adapter from the difference of two models: a merged adapter comes back, and what it cannot hold is refused."""

import json
from dataclasses import replace

import pytest
import torch

from adapters import trained
from merges import save, stirred
from onebase.config import LoraConfig
from onebase.errors import BaseMismatch, ConfigError, TargetError
from onebase.models.merging import open_skeleton, plan_merge
from onebase.ops.lowrank import update
from onebase.storage.format import load_adapter, save_adapter
from onebase.transforms.extraction import extract_difference
from onebase.transforms.merge_files import OutputOptions, merge_files
from tiny import tiny

ARCHITECTURES = ("llama", "llama-tied", "qwen3", "gemma3", "gpt2", "phi3", "mixtral", "gpt-oss", "bert", "t5")


def pair(tmp_path, arch, adapter, dtype=None):
    """A base's skeleton and that of the base with this adapter merged in."""
    base = save(tiny(arch), tmp_path / "base")
    merge_files(plan_merge(base, adapter), tmp_path / "tuned", OutputOptions(dtype))
    return open_skeleton(base), open_skeleton(tmp_path / "tuned")


def retouch(folder, change):
    """Write a model folder again with its tensors changed by `change(model)`."""
    model = tiny("llama")
    change(model)
    return open_skeleton(save(model, folder))


def assert_same_updates(found, wanted):
    """Equal up to float32's rounding of W + s·B·A, which the tuned model holds."""
    assert found.lowrank.keys() == wanted.lowrank.keys()
    for path, low in wanted.lowrank.items():
        mine, theirs = update(found.lowrank[path].factors), update(low.factors)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_merged_adapter_is_extracted_again(tmp_path, arch):
    adapter = trained(tiny(arch), LoraConfig(rank=3, alpha=9))
    found = extract_difference(*pair(tmp_path, arch, adapter), LoraConfig(rank=3, alpha=3))
    assert_same_updates(found.adapter, adapter)
    assert {low.kind for low in found.adapter.lowrank.values()} == {
        one.kind for one in adapter.lowrank.values()
    }
    assert {low.scale for low in found.adapter.lowrank.values()} == {1.0}
    assert max(fit.error for fit in found.fits.values()) < 1e-5
    assert not found.left


def test_the_folder_loads_on_the_base_and_names_it(tmp_path):
    model = tiny("llama")
    adapter = trained(model, LoraConfig(rank=3, alpha=9))
    base, tuned = pair(tmp_path, "llama", adapter)
    found = extract_difference(base, tuned, LoraConfig(rank=3, alpha=3)).adapter
    assert found.origin.fingerprint == base.fingerprint
    assert found.origin.training["extracted"]["tuned fingerprint"] == tuned.fingerprint
    folder = save_adapter(found, tmp_path / "extracted")
    assert load_adapter(folder, base) == found  # fits_problems and the fingerprint pass


def test_a_smaller_rank_is_the_best_fit_and_says_its_error(tmp_path):
    adapter = trained(tiny("llama"), LoraConfig(rank=8, alpha=8, target_modules=["q_proj", "down_proj"]))
    small = LoraConfig(rank=2, alpha=2, target_modules=["q_proj", "down_proj"])
    found = extract_difference(*pair(tmp_path, "llama", adapter), small)
    for path, low in adapter.lowrank.items():
        sizes = torch.linalg.svdvals(update(low.factors).double())
        assert found.fits[path].norm == pytest.approx(float(sizes.norm()), rel=1e-5)
        assert found.fits[path].error == pytest.approx(float(sizes[2:].norm() / sizes.norm()), rel=1e-5)
        a, b = found.adapter.lowrank[path][:2]
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # half of each singular value
        torch.testing.assert_close(a.norm(dim=1) ** 2, sizes[:2].float(), rtol=1e-4, atol=0)


def test_what_did_not_change_can_still_learn(tmp_path):
    adapter = trained(tiny("llama"), LoraConfig(rank=3, alpha=9, target_modules=["q_proj"]))
    found = extract_difference(*pair(tmp_path, "llama", adapter), LoraConfig(rank=3, alpha=3))
    for path, low in found.adapter.lowrank.items():
        still = "q_proj" not in path
        assert bool(update(low.factors).any()) is not still
        assert low.A.any() or low.B.any()
        assert found.fits[path].norm > 0 or found.fits[path].error == 0


def test_biases_convolutions_and_whole_modules(tmp_path):
    options = {
        "target_modules": ["q_proj", "projection"],
        "modules_to_save": ["classifier"],
        "lora_bias": True,
    }
    adapter = stirred(trained(tiny("vit"), LoraConfig(rank=3, alpha=9, **options)))
    base = save(tiny("vit"), tmp_path / "base")
    merge_files(plan_merge(base, adapter), tmp_path / "tuned")
    paths = [*adapter.lowrank, *adapter.full]
    skeletons = [open_skeleton(folder, paths) for folder in (base, tmp_path / "tuned")]
    config = LoraConfig(rank=3, alpha=3, **options)
    found = extract_difference(*skeletons, config).adapter
    assert_same_updates(found, adapter)
    for path, low in adapter.lowrank.items():
        torch.testing.assert_close(found.lowrank[path].bias, low.scale * low.bias, rtol=0, atol=1e-6)
    assert {n: t.tolist() for n, t in found.full["classifier"].items()} == {
        n: t.tolist() for n, t in adapter.full["classifier"].items()
    }
    with pytest.raises(BaseMismatch, match="--lora-bias moves") as refused:
        extract_difference(*skeletons, replace(config, lora_bias=False))
    assert "q_proj.bias" in str(refused.value)


def test_a_narrower_tuned_model_differs_in_its_targets_alone(tmp_path):
    adapter = trained(tiny("llama"), LoraConfig(rank=3, alpha=9))
    found = extract_difference(*pair(tmp_path, "llama", adapter, torch.bfloat16), LoraConfig(rank=3, alpha=3))
    assert 1e-4 < max(fit.error for fit in found.fits.values()) < 0.1  # bfloat16's rounding is of full rank


def test_a_change_outside_the_targets_is_refused_by_name(tmp_path):
    base = open_skeleton(save(tiny("llama"), tmp_path / "base"))

    def change(model):
        model.model.norm.weight.data += 1
        model.model.layers[0].self_attn.q_proj.weight.data += 1
        model.model.layers[1].mlp.up_proj.weight.data += 1

    tuned, queries = (
        retouch(tmp_path / "tuned", change),
        LoraConfig(target_modules=["q_proj"], rank=2, alpha=2),
    )
    with pytest.raises(BaseMismatch, match="2 tensors or settings differ") as refused:
        extract_difference(base, tuned, queries)
    assert "model.norm.weight" in str(refused.value)
    assert "model.layers.1.mlp.up_proj.weight" in str(refused.value)
    with pytest.raises(BaseMismatch, match="1 tensors"):
        extract_difference(base, tuned, queries, ["norm"])
    found = extract_difference(base, tuned, replace(queries, modules_to_save=["norm"]), ["mlp"])
    assert found.left == ("model.layers.1.mlp.up_proj.weight",)
    assert (
        found.adapter.full["model.norm"]["weight"].tolist() == tiny("llama").model.norm.weight.add(1).tolist()
    )
    with pytest.raises(ConfigError, match="no tensor, module") as refused:
        extract_difference(base, tuned, queries, ["nrom"])
    assert "norm" in refused.value.valid[0]


def test_a_tied_weight_changes_in_both_places_or_in_none(tmp_path):
    model = tiny("llama-tied")
    base = open_skeleton(save(model, tmp_path / "base"))
    model.model.embed_tokens.weight.data += 0.5
    model.model.norm.weight.data += 0.5
    tuned = open_skeleton(save(model, tmp_path / "tuned"))
    options = {"rank": 2, "alpha": 2, "target_modules": ["q_proj"]}
    with pytest.raises(BaseMismatch, match=r"lm_head\.weight"):
        extract_difference(base, tuned, LoraConfig(**options, modules_to_save=["embed_tokens", "norm"]))
    whole = LoraConfig(**options, modules_to_save=["embed_tokens", "lm_head", "norm"])
    full = extract_difference(base, tuned, whole).adapter.full
    assert full["lm_head"]["weight"].equal(full["model.embed_tokens"]["weight"])


def test_settings_shapes_and_architectures(tmp_path):
    adapter = trained(tiny("llama"), LoraConfig(rank=2, alpha=6))
    base, tuned = pair(tmp_path, "llama", adapter)
    small = LoraConfig(rank=2, alpha=2)
    file = tuned.folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rms_norm_eps": 1e-3, "use_cache": False, "bos_token_id": 7}))
    other = open_skeleton(tuned.folder)
    with pytest.raises(BaseMismatch, match=r"1 tensors or settings differ.*\n.*config\.rms_norm_eps: 1e-06"):
        extract_difference(base, other, small)
    assert extract_difference(base, other, small, ["config.rms_norm_eps"]).left[0].startswith("config.rms")
    mistral = open_skeleton(save(tiny("mistral"), tmp_path / "mistral"))
    with pytest.raises(
        BaseMismatch, match="the base is a LlamaForCausalLM, the tuned model a MistralForCausalLM"
    ):
        extract_difference(base, mistral, small)
    model = tiny("llama")
    model.resize_token_embeddings(99, mean_resizing=False)
    longer = open_skeleton(save(model, tmp_path / "longer"))
    with pytest.raises(BaseMismatch, match=r"embed_tokens.weight: \(96, 32\) in the base, \(99, 32\)"):
        extract_difference(base, longer, small)


def test_bad_ranks_targets_and_values(tmp_path):
    base, tuned = pair(tmp_path, "llama", trained(tiny("llama"), LoraConfig(rank=2, alpha=6)))
    with pytest.raises(TargetError, match="a rank above 16 adds nothing"):
        extract_difference(base, tuned, LoraConfig(rank=33, alpha=33, target_modules=["k_proj"]))
    with pytest.raises(TargetError, match="rank 40"):
        extract_difference(base, tuned, LoraConfig(rank=40, alpha=40))
    with pytest.raises(TargetError, match="no module is named"):
        extract_difference(base, tuned, LoraConfig(rank=2, alpha=2, target_modules=["q_prj"]))
    with pytest.raises(BaseMismatch, match="none of the targets differs"):
        extract_difference(base, base, LoraConfig(rank=2, alpha=2))

    def spoil(model):
        model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan

    with pytest.raises(BaseMismatch, match=r"layers\.0\.self_attn\.q_proj: it holds NaN"):
        extract_difference(base, retouch(tmp_path / "nan", spoil), LoraConfig(rank=2, alpha=2))


def test_a_rank_above_a_small_weights_is_filled_with_zeros(tmp_path):
    adapter = trained(tiny("llama"), LoraConfig(rank=20, alpha=20))
    found = extract_difference(*pair(tmp_path, "llama", adapter), LoraConfig(rank=20, alpha=20))
    assert_same_updates(found.adapter, adapter)
    assert {low.rank for low in found.adapter.lowrank.values()} == {20}
    folder = save_adapter(found.adapter, tmp_path / "extracted")
    assert load_adapter(folder, open_skeleton(tmp_path / "base")) == found.adapter
