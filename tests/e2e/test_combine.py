"""`onebase combine` from folder to folder: what it writes, what it prints, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from adapters import trained
from onebase.adapters.adapter import Origin
from onebase.cli.main import main
from onebase.config import LoraConfig, Recipe
from onebase.models.base import wrap_base
from onebase.storage.format import load_adapter, read_adapter, save_adapter
from onebase.transforms.arithmetic import combine, compress, negate
from tiny import tiny


@pytest.fixture
def folders(tmp_path):
    """Two adapter folders, of ranks 4 and 2, and the first one's model."""
    model = tiny("llama")
    for name, rank, chat in (("a", 4, True), ("b", 2, False)):
        config = LoraConfig(rank=rank, alpha=3, target_modules=["q_proj", "down_proj"])
        adapter = trained(model, config, seed=rank)
        origin = Origin("llama", "f", prompt={"chat": chat}, training={"steps": rank})
        save_adapter(replace(adapter, origin=origin), tmp_path / name)
    return model, str(tmp_path / "a"), str(tmp_path / "b"), tmp_path / "out"


def same(adapter, wanted):
    assert adapter.config == wanted.config
    assert adapter.lowrank.keys() == wanted.lowrank.keys()
    assert all(torch.equal(tensor, wanted.tensors()[name]) for name, tensor in adapter.tensors().items())


def test_it_writes_what_the_function_gives(folders, capsys):
    model, a, b, out = folders
    arguments = ["--weights=0.5,-0.25", "--method", "svd", "--rank", "3", "--output", str(out)]
    assert main(["combine", f"{a},{b}", *arguments, "--prompt-from", a]) == 0
    made, pair = read_adapter(out), [read_adapter(a), read_adapter(b)]
    pair[1] = replace(pair[1], origin=pair[0].origin)
    same(made, combine(pair, [0.5, -0.25], Recipe("svd", rank=3)))
    assert made.origin.prompt == {"chat": True}
    facts = made.origin.training
    assert [(one["adapter"], one["steps"]) for one in facts["combined"]] == [(a, 4), (b, 2)]
    assert (facts["weights"], facts["method"], facts["rank"]) == ([0.5, -0.25], "svd", 3)
    model_too = wrap_base(model)
    assert load_adapter(out, model_too, allow_base_mismatch=True) == made
    printed = capsys.readouterr().out
    assert "4, 2 → 3" in printed
    assert "model.layers.*.mlp.down_proj" in printed
    assert "farthest from the exact weighted sum" in printed


def test_equal_weights_by_default(folders):
    _, a, b, out = folders
    assert main(["combine", f"{a},{b}", "--prompt-from", b, "--output", str(out)]) == 0
    assert read_adapter(out).origin.training["weights"] == [0.5, 0.5]
    assert {low.rank for low in read_adapter(out).lowrank.values()} == {6}


def test_one_adapter_can_be_compressed(folders, capsys):
    _, a, _, out = folders
    assert main(["combine", a, "--method", "svd", "--rank", "1", "--output", str(out)]) == 0
    small, errors = compress(read_adapter(a), 1)
    same(read_adapter(out), small)
    assert f"{max(errors.values()):.3g}" in capsys.readouterr().out


def test_one_adapter_can_be_negated(folders):
    _, a, b, out = folders
    assert main(["combine", a, "--negate", "--output", str(out)]) == 0
    same(read_adapter(out), negate(read_adapter(a)))
    assert main(["combine", f"{a},{b}", "--negate", "--output", f"{out}2"]) == 2
    assert not (out.parent / "out2").exists()


REFUSED = {
    "no folder": ([], "needs adapter folders"),
    "prompts": (["{a},{b}", "--output", "{out}"], "--prompt-from"),
    "whose prompt": (["{a},{b}", "--output", "{out}", "--prompt-from", "{a}x"], "nearest valid"),
    "no output": (["{a}"], "--output"),
    "its own input": (["{a}", "--output", "{a}"], "exists already"),
    "missing": (["{a}x", "--output", "{out}"], "ax: no such"),
    "weights": (["{a}", "--weights=0.5,x", "--output", "{out}"], "must be numbers"),
    "many weights": (["{a}", "--weights=0.5,1", "--output", "{out}"], "2 weights for 1 adapters"),
    "NaN": (["{a}", "--weights=nan", "--output", "{out}"], "finite"),
    "density": (["{a}", "--method", "ties", "--density", "2", "--output", "{out}"], "(0, 1]"),
    "density 0": (["{a}", "--method", "ties", "--density", "0", "--output", "{out}"], "(0, 1]"),
    "method": (["{a}", "--method", "tie", "--output", "{out}"], "ties"),
    "rank": (["{a}", "--method", "svd", "--rank", "5", "--output", "{out}"], "above 4"),
    "unused": (["{a}", "--rank", "2", "--output", "{out}"], "does not use it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_said_and_nothing_is_written(case, folders, capsys):
    _, a, b, out = folders
    arguments, message = REFUSED[case]
    before = read_adapter(a)
    assert main(["combine", *(text.format(a=a, b=b, out=out) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert read_adapter(a) == before
