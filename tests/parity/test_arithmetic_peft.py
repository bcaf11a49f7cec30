"""Combined adapters are PEFT's `add_weighted_adapter`'s: the same updates, the same logits, one file format."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn

from adapters import every_kind, options_for, trained
from merges import stirred
from onebase.adapters.adapter import Origin
from onebase.adapters.injection import injected, new_adapter
from onebase.config import LoraConfig, Recipe
from onebase.models.base import wrap_base
from onebase.ops.lowrank import update
from onebase.storage.format import load_adapter, save_adapter
from onebase.transforms.arithmetic import combine
from tiny import output, some_ids, tiny

WEIGHTS = (0.7, -0.4)
PRUNED = {"density": 0.4}
CASES = {
    "linear": Recipe("linear"),
    "cat": Recipe("cat"),
    "svd": Recipe("svd"),
    "svd to rank 3": Recipe("svd", rank=3),
    "ties": Recipe("ties", **PRUNED),
    "ties by frequency": Recipe("ties", sign="frequency", **PRUNED),
    "ties_svd": Recipe("ties_svd", **PRUNED),
    "ties_svd by frequency": Recipe("ties_svd", rank=6, sign="frequency", **PRUNED),
    "magnitude_prune": Recipe("magnitude_prune", **PRUNED),
    "magnitude_prune_svd": Recipe("magnitude_prune_svd", rank=6, **PRUNED),
    # PEFT draws from the global generator, so DARE can only be compared where nothing is dropped.
    "dare_linear": Recipe("dare_linear"),
    "dare_ties": Recipe("dare_ties"),
    "dare_linear_svd": Recipe("dare_linear_svd", rank=6),
    "dare_ties_svd": Recipe("dare_ties_svd"),
}


def peft_combines(model, adapters, weights, recipe, folder):
    """PEFT's combination of the adapters, active on a copy of the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n, adapter in enumerate(adapters):
            save_adapter(adapter, folder / str(n))
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), folder / "0", adapter_name="0")
        names = [str(n) for n in range(len(adapters))]
        for name in names[1:]:
            theirs.load_adapter(folder / name, adapter_name=name)
        # PEFT 0.21 copies use_rslora into the result, which multiplies it by sqrt(rank); the layers know their scale.
        theirs.peft_config["0"].use_rslora = False
        theirs.add_weighted_adapter(
            names,
            list(weights),
            "both",
            combination_type=recipe.method,
            svd_rank=recipe.rank or None,
            density=recipe.density,
            majority_sign_method=recipe.sign,
        )
        theirs.set_adapter("both")
    return theirs.eval()


def assert_same(model, ours, theirs):
    for path, low in ours.lowrank.items():
        delta = theirs.base_model.model.get_submodule(path).get_delta_weight("both")
        mine = low.scale * low.B @ low.A
        torch.testing.assert_close(mine if low.kind == "linear" else mine.T, delta, rtol=1e-5, atol=1e-5)
    ids = some_ids()
    with injected(model, ours):
        # Float32 through a net of large random weights: the updates above are the strict comparison.
        torch.testing.assert_close(output(model, ids), output(theirs, ids), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_every_shared_method_on_every_layer_kind(arch, case, tmp_path):
    model = tiny(arch)
    config = every_kind(model)
    pair = [trained(model, config, seed) for seed in (1, 2)]
    assert {low.kind for low in pair[0].lowrank.values()} >= {"embedding", "linear"}
    theirs = peft_combines(model, pair, WEIGHTS, CASES[case], tmp_path)
    assert_same(model, combine(pair, WEIGHTS, CASES[case]), theirs)


@pytest.mark.parametrize("case", ["linear", "cat", "svd", "ties", "ties_svd"])
@pytest.mark.parametrize("variant", ["rslora", "patterns"])
def test_scales_and_patterns(variant, case, tmp_path):
    model = tiny("llama")
    pair = [trained(model, LoraConfig(**options_for("llama", variant)), seed) for seed in (1, 2)]
    theirs = peft_combines(model, pair, WEIGHTS, CASES[case], tmp_path)
    assert_same(model, combine(pair, WEIGHTS, CASES[case]), theirs)


@pytest.mark.parametrize("case", ["cat", "svd"])
def test_other_ranks_and_targets(case, tmp_path):
    model = tiny("llama")
    options = (
        {"rank": 2, "target_modules": ["q_proj", "up_proj"]},
        {"rank": 5, "target_modules": ["q_proj"]},
    )
    pair = [trained(model, LoraConfig(**one), seed) for seed, one in enumerate(options)]
    ours = combine(pair, WEIGHTS, CASES[case])
    assert_same(model, ours, peft_combines(model, pair, WEIGHTS, CASES[case], tmp_path))


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("dare")])
def test_convolutions(case, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 5)).requires_grad_(False)
    config = LoraConfig(rank=2, alpha=3, target_modules=["0", "2"])
    pair = [stirred(new_adapter(model, config, 0, Origin("base", task="")), seed) for seed in (1, 2)]
    recipe = replace(CASES[case], rank=min(CASES[case].rank, 3))
    theirs = peft_combines(model, pair, WEIGHTS, recipe, tmp_path)
    for path, low in combine(pair, WEIGHTS, recipe).lowrank.items():
        delta = theirs.base_model.model.get_submodule(path).get_delta_weight("both").flatten(1)
        torch.testing.assert_close(update(low.factors), delta, rtol=1e-5, atol=1e-5)


def test_peft_reads_the_result(tmp_path):
    """Ranks differ from module to module here, so the patterns must say the right thing to both readers."""
    model, ids = tiny("llama"), some_ids()
    options = (
        {"rank": 2, "target_modules": ["q_proj", "up_proj"]},
        {"rank": 5, "target_modules": ["q_proj"]},
    )
    both = combine([trained(model, LoraConfig(**one)) for one in options], WEIGHTS, Recipe("cat"))
    assert sorted({low.rank for low in both.lowrank.values()}) == [2, 7]
    save_adapter(both, tmp_path / "both")
    assert load_adapter(tmp_path / "both", wrap_base(model)) == both
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "both").eval()
    with injected(model, both):
        torch.testing.assert_close(output(theirs, ids), output(model, ids), rtol=1e-5, atol=1e-5)
