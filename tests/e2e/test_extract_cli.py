"""`onebase extract` from the command line: the adapter, its report, and how it refuses."""

import json

import pytest
import torch

from adapters import trained
from onebase.cli.main import main
from onebase.config import LoraConfig
from onebase.models.base import load_base
from onebase.models.merging import plan_merge
from onebase.storage.format import load_adapter, save_adapter
from onebase.transforms.merge_files import merge_files
from texts import save_base, text_model


@pytest.fixture
def pair(tmp_path):
    """A base folder and the folder of a model tuned from it."""
    base = save_base(tmp_path / "base")
    merge_files(plan_merge(base, trained(text_model(), LoraConfig(rank=2, alpha=6))), tmp_path / "tuned")
    return base, tmp_path / "tuned"


def words(text):
    """The text of a table without its lines."""
    return " ".join(text.replace("│", " ").split())


def run(*arguments):
    return main(["extract", *map(str, arguments)])


def test_extract_and_report(pair, tmp_path, capsys):
    base, tuned = pair
    target = tmp_path / "extracted"
    assert run("--base", base, "--tuned", tuned, "--rank", "2", "--output", target) == 0
    shown = words(capsys.readouterr().out)
    assert "in 14 updates" in shown
    assert "farthest from W' - W" in shown
    assert "100.0% of 81 tokens" in shown
    adapter = load_adapter(target, load_base(str(base), "float32"))
    assert adapter.origin.base == str(base)
    assert adapter.origin.training["extracted"]["tuned"] == str(tuned)
    assert json.loads((target / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert main(["inspect", str(target)]) == 0
    assert main(["generate", "--adapter", str(target), "--prompt", "What", "--max-new-tokens", "2"]) == 0


def test_a_compressed_adapter_says_what_it_misses(pair, tmp_path, capsys):
    base, tuned = pair
    arguments = ("--base", base, "--tuned", tuned, "--rank", "1", "--output", tmp_path / "x")
    assert run(*arguments, "--target-modules", "q_proj", "--allow", "self_attn,mlp") == 0
    shown = words(capsys.readouterr().out)
    assert "in 2 updates" in shown
    assert "model.layers.0.mlp.up_proj.weight" in shown
    rows = [line for line in shown.split("model.layers") if "q_proj" in line and "." in line]
    assert rows


def test_refusals(pair, tmp_path, capsys):
    base, tuned = pair
    adapter = save_adapter(trained(text_model(), LoraConfig(rank=2, alpha=6)), tmp_path / "adapter")
    cut = save_base(tmp_path / "cut", seed=1)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    both, out = ("--base", base, "--tuned", tuned), ("--output", tmp_path / "x")
    cases = {
        ("--base", base, "--tuned", tuned): "option output: not given",
        ("--base", base, *out): "option tuned: not given",
        ("--tuned", tuned, *out): "option base: not given",
        (*both, "--output", base): "it exists already",
        (*both, "--output", tuned / "x"): "it lies in the model",
        (*both, *out, "--rank", "0"): "option rank=0",
        (*both, *out, "--rank", "33"): "rank 33",
        (*both, *out, "--target-modules", "q_prjo"): "nearest valid: q_proj",
        (*both, *out, "--target-modules", "q_proj"): "12 tensors or settings differ",
        (*both, *out, "--allow", "nrom"): "nearest valid: norm",
        (*both, *out, "--modules-to-save", "lm_haed"): "nearest valid: lm_head",
        (*both, *out, "--lora-bias"): "none of the targeted layers has a bias",
        (*both, *out, "--prompts", tmp_path / "no.txt"): "no such file",
        ("--base", base, "--tuned", base, *out): "none of the targets differs",
        ("--base", base, "--tuned", adapter, *out): "an adapter, not a base",
        ("--base", base, "--tuned", cut, *out): "cut short",
        ("--base", base, "--tuned", tmp_path / "tunde", *out): "nearest valid",
        ("--base", base, "--tuned", tuned, "--output", weights / "x"): "is not a folder",
    }
    for arguments, message in cases.items():
        assert run(*arguments) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "cut", "tuned"]


def test_a_quantised_base_takes_the_difference_to_the_dense_model(tmp_path):
    """LoftQ's start: what rounding took from W, as well as a low rank can say it."""
    dense, model = save_base(tmp_path / "dense"), text_model().requires_grad_(False)
    wanted = model.model.layers[0].mlp.up_proj.weight.clone()
    for parameter in model.model.layers.parameters():
        parameter.copy_((parameter * 8).round() / 8)
    rounded = save_base(tmp_path / "rounded")
    model.save_pretrained(rounded)
    out = tmp_path / "loftq"
    arguments = ("--base", rounded, "--tuned", dense, "--rank", 12, "--output", out, "--no-check")
    assert run(*arguments, "--allow", "input_layernorm,post_attention_layernorm") == 0
    low = load_adapter(out, load_base(str(rounded), "float32")).lowrank["model.layers.0.mlp.up_proj"]
    base = model.model.layers[0].mlp.up_proj.weight
    missed = torch.linalg.norm(wanted - base - low.scale * low.B @ low.A)
    least = torch.linalg.svdvals((wanted - base).double())[12:].norm()
    assert 0 < float(missed) == pytest.approx(float(least), rel=1e-4)
