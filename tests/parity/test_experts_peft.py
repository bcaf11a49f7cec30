"""PEFT adapters from transformers 4, whose experts were linear layers: the same logits on today's stacks as PEFT's."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from merges import load, save
from onebase.adapters.injection import injected
from onebase.errors import FormatError
from onebase.models.base import wrap_base
from onebase.models.merging import plan_merge
from onebase.storage.format import load_adapter, read_adapter, save_adapter
from onebase.transforms.merge_files import merge_files
from tiny import tiny, tiny_inputs

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's

PREFIX = "base_model.model."
BLOCKS = {"mixtral": "block_sparse_moe", "qwen3-moe": "mlp"}
NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3-moe": ("gate_proj", "up_proj", "down_proj")}
INNER = {"mixtral": 48, "qwen3-moe": 24}


def factors(rank, features, out, draw):
    return (torch.randn(s, generator=draw) * 0.3 for s in ((rank, features), (out, rank)))


def stored(name, targets, rank=3, experts=4):
    """The tensors of a transformers-4 adapter for a tiny model."""
    draw, found = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        block = f"{PREFIX}model.layers.{layer}.{BLOCKS[name]}"
        sizes = {f"{block}.gate": (32, 4), f"{PREFIX}model.layers.{layer}.self_attn.q_proj": (32, 32)}
        for number in range(experts):
            for one in NAMES[name]:
                shape = (INNER[name], 32) if one == NAMES[name][2] else (32, INNER[name])
                sizes[f"{block}.experts.{number}.{one}"] = shape
        for path, (features, out) in sizes.items():
            a, b = factors(rank, features, out, draw)
            if path.rpartition(".")[2] in targets:
                found |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    return found


def write(folder, tensors, **settings):
    folder.mkdir()
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"inference_mode": True} | settings))
    return folder


def logits(model, name):
    with torch.no_grad():
        return model(**tiny_inputs(name)).logits


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize(
    "extra", [(), ("q_proj",), ("q_proj", "gate")], ids=["experts", "attention", "router"]
)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_logits_as_peft(name, extra, rslora, tmp_path):
    targets, model = [*NAMES[name], *extra], tiny(name)
    folder = write(tmp_path / "a", stored(name, targets), target_modules=targets, use_rslora=rslora)
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    adapter = load_adapter(folder, wrap_base(model))
    low = adapter.lowrank["model.layers.0.mlp.experts.gate_up_proj"]
    assert (low.rank, low.blocks) == (6, 4)
    if not rslora:  # of these PEFT takes another scale: alpha doubles with the rank, and its root does not
        with injected(model, adapter):
            torch.testing.assert_close(logits(model, name), logits(theirs, name), rtol=1e-4, atol=1e-3)
    assert (logits(model, name) - logits(theirs, name)).abs().max() > 0.1
    save_adapter(adapter, tmp_path / "b")
    assert load_adapter(tmp_path / "b", wrap_base(model)) == adapter == read_adapter(tmp_path / "b")
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "b").eval()
    with injected(model, adapter):
        torch.testing.assert_close(logits(model, name), logits(again, name), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_each_expert_has_its_own_update(name, rslora, tmp_path):
    """Against W + s·B·A expert by expert, with one half alone and other alphas, which PEFT does not convert."""
    first, second, down = NAMES[name]
    model, scale = tiny(name), (lambda alpha: alpha / (3**0.5 if rslora else 3))
    for targets, alphas in (([second], {}), ([first, second, down], {first: 4.0, down: 5.0})):
        tensors = stored(name, targets)
        folder = write(
            tmp_path / targets[0], tensors, target_modules=targets, use_rslora=rslora, alpha_pattern=alphas
        )
        twin, adapter = tiny(name), load_adapter(folder, wrap_base(model))
        for path, experts in [(f"model.layers.{n}", twin.model.layers[n].mlp.experts) for n in range(2)]:
            for number in range(4):
                for one in targets:
                    at = f"{PREFIX}{path}.{BLOCKS[name]}.experts.{number}.{one}"
                    change = scale(alphas.get(one, 6)) * (
                        tensors[f"{at}.lora_B.weight"] @ tensors[f"{at}.lora_A.weight"]
                    )
                    if one == down:
                        experts.down_proj.data[number] += change
                    else:
                        half = slice(0, INNER[name]) if one == first else slice(INNER[name], None)
                        experts.gate_up_proj.data[number, half] += change
        with injected(model, adapter):
            torch.testing.assert_close(logits(model, name), logits(twin, name), rtol=1e-4, atol=1e-3)
    base = save(model, tmp_path / "base")
    merged = load(merge_files(plan_merge(base, folder), tmp_path / "merged"))
    torch.testing.assert_close(logits(merged, name), logits(twin, name), rtol=1e-4, atol=1e-3)


def test_patterns_for_the_old_paths(tmp_path):
    name, model = "mixtral", tiny("mixtral")
    tensors = stored(name, ["q_proj", *NAMES[name]])
    plain = write(tmp_path / "a", tensors, target_modules=["q_proj", *NAMES[name]])
    pattern = write(tmp_path / "b", tensors, target_modules=r".*(q_proj|experts\.\d+\.w[123])")
    wanted = load_adapter(plain, wrap_base(model))
    found = load_adapter(pattern, wrap_base(model))
    assert {n: t.tolist() for n, t in found.tensors().items()} == {
        n: t.tolist() for n, t in wanted.tensors().items()
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: {n: v for n, v in t.items() if ".experts.2.w1." not in n},
            r"w1: 3 experts of the base's 4",
        ),
        (
            lambda t: t | {n.replace("s.3.w1", "s.4.w1"): v for n, v in t.items() if "s.3.w1" in n},
            r"w1: 5 experts of the base's 4",
        ),
        (lambda t: {n: v for n, v in t.items() if ".3.w2.lora_B" not in n}, "lora_B of an expert is missing"),
        (
            lambda t: {n: v[:2] if ".3.w2.lora_A" in n else v for n, v in t.items()},
            "an expert of the base is 32 x 48",
        ),
        (
            lambda t: (
                t
                | {
                    n.replace("lora_A.weight", "lora_magnitude_vector"): v[0]
                    for n, v in t.items()
                    if ".w1.lora_A" in n
                }
            ),
            "magnitude of a single expert",
        ),
    ],
)
def test_experts_that_do_not_make_a_stack(change, told, tmp_path):
    tensors = change(stored("mixtral", NAMES["mixtral"]))
    folder = write(tmp_path / "a", tensors, target_modules=["w1", "w2", "w3"])
    with pytest.raises(FormatError, match=told):
        load_adapter(folder, wrap_base(tiny("mixtral")))
