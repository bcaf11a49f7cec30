"""The native step: torch's logits for every family, whatever the weights' format, and the same bits in any company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import trained
from decoders import DECODERS, decoder
from onebase import native as building
from onebase.adapters.adapter import Adapter
from onebase.config import LoraConfig
from onebase.errors import ConfigError
from onebase.models.base import wrap_base
from onebase.models.reading import Unsupported
from onebase.ops.adapted import Linear
from onebase.ops.grouped import new_place
from onebase.serve import native
from onebase.serve import runner as serving
from onebase.serve.engine import Engine
from onebase.serve.pool import AdapterPool
from onebase.serve.proof import choose_product, runner_problem
from onebase.serve.request import Limits
from onebase.serve.runner import Row, Runner
from onebase.serve.weights import GROUP, INT4, INT8, as_is, int4, int8, packed
from tiny import tiny

needs_a_compiler = pytest.mark.skipif(
    isinstance(native.native_library(), str), reason=f"no native step here: {native.native_library()}"
)
WITHOUT = {"cohere": "no norm of that shape"}


@needs_a_compiler
@pytest.mark.parametrize("name", DECODERS)
def test_its_logits_are_the_models_own(name):
    why = runner_problem(decoder(name), as_is)
    assert WITHOUT[name] in why if name in WITHOUT else why == ""


@needs_a_compiler
def test_a_base_in_bfloat16_is_read_as_it_is():
    model = decoder("llama").to(torch.bfloat16)
    assert runner_problem(model, as_is) == ""
    runner = Runner(model, 1, 8, as_is)
    ours = runner.forward([Row(0, [3, 7, 11], 0)])
    exact = model.float()(input_ids=torch.tensor([[3, 7, 11]])).logits[0, -1]
    torch.testing.assert_close(ours[0], exact, atol=1e-4, rtol=1e-4)  # its own sums are in float32


@needs_a_compiler
def test_a_rows_logits_have_the_same_bits_in_any_company():
    model = decoder("qwen3")
    made: list[Adapter | None] = [
        None,
        *(trained(model, LoraConfig(rank=4, alpha=8), seed=seed) for seed in (2, 5)),
    ]
    alone = []
    for adapter in made:
        runner = Runner(model, 1, 32, as_is)
        runner.put(0, adapter)
        alone.append([runner.forward([Row(0, [5, 9], 0)]), runner.forward([Row(0, [13], 2)])])
    runner = Runner(model, 7, 32, as_is)
    for slot in range(7):
        runner.put(slot, made[slot % 3])
    for step, (tokens, start) in enumerate((([5, 9], 0), ([13], 2))):
        logits = runner.forward([Row(slot, tokens, start) for slot in range(7)])
        for slot in range(7):
            assert torch.equal(logits[slot], alone[slot % 3][step][0])


@needs_a_compiler
@pytest.mark.parametrize("hold", [None, as_is])
def test_what_slots_hold_before_they_are_filled_is_in_no_answer(hold, monkeypatch):
    model = decoder("qwen3")
    adapter = trained(model, LoraConfig(rank=4, alpha=8, target_modules=["q_proj"]), seed=2)

    def logits():
        runner = Runner(model, 4, 8, hold)
        for slot in (1, 3):
            runner.put(slot, adapter)
        rows = [Row(slot, [5, 9], 0) for slot in range(4)]
        return [runner.forward(rows), runner.forward([Row(slot, [13], 2) for slot in range(4)])]

    def anything(*given):
        place = new_place(*given)
        for tensor in (place.A, *place.B):
            tensor.fill_(torch.nan)
        return place

    wanted = logits()
    monkeypatch.setattr(serving, "new_place", anything)
    for ours, theirs in zip(logits(), wanted, strict=True):
        assert torch.equal(ours, theirs)


@needs_a_compiler
@pytest.mark.parametrize("hold", [int8, int4])
def test_narrow_weights_compute_as_the_widened_ones(hold):
    """A model of widened weights goes back to its few bits without loss, so the proof is exact."""
    model = wide_enough()
    if hold is int4:
        assert "differ" in runner_problem(model, hold)
    narrowed(model, hold)
    assert runner_problem(model, hold) == ""
    assert runner_problem(model, packed) == ""


def wide_enough():
    return decoder("llama", hidden_size=64, intermediate_size=96)


def narrowed(model, hold):
    """Change the model's weights to what this way makes of them."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = hold(Linear(module.weight.data), name == "lm_head").widened()


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 999))
@settings(max_examples=30)
def test_packing_rounds_by_half_a_step_and_only_packs_what_fits(rows, groups, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * GROUP, generator=draw)
    weight[0, :GROUP] = 0.25  # all alike: no step at all
    layer = Linear(weight, torch.ones(rows))
    for hold, levels in ((int8, 254), (int4, 15)):
        held = hold(layer)
        by_group = weight.view(rows, groups, GROUP)
        size = 2 * by_group.abs().amax(-1) if hold is int8 else by_group.amax(-1) - by_group.amin(-1)
        error = (held.widened() - weight).view_as(by_group).abs().amax(-1)
        assert bool((error <= size / levels / 2 + 1e-6).all())
        again = packed(Linear(held.widened()))
        assert again.format == (
            held.format if rows * groups > 1 else INT4
        )  # four bits hold what is all alike
        torch.testing.assert_close(again.widened(), held.widened(), atol=1e-6, rtol=1e-5)
    assert packed(layer).weight is weight
    assert (int8(layer).format, int4(layer).format, int4(layer, head=True).format) == (INT8, INT4, INT8)
    assert as_is(layer).copied == 0 < int4(layer).copied < int8(layer).copied < weight.nbytes / 2


def test_odd_widths_are_packed_in_no_way():
    layer = Linear(torch.randn(3, GROUP + 1))
    assert packed(layer).weight is layer.weight
    for hold in (int8, int4):
        with pytest.raises(Unsupported, match="does not divide"):
            hold(layer)
    with pytest.raises(Unsupported, match="float64"):
        as_is(Linear(torch.zeros(2, 2, dtype=torch.float64)))


def test_without_a_compiler_torch_computes(monkeypatch):
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    base = wrap_base(decoder("llama"))
    assert choose_product(base.model).product == "plain"
    engine = Engine(base, AdapterPool(base), Limits(slots=1, context=16))
    assert (engine.product, engine.slow) == ("plain", "")
    with pytest.raises(ConfigError, match="no C compiler"):
        Engine(base, AdapterPool(base), Limits(slots=1, context=16), weights="native")


def test_a_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path))
    monkeypatch.setattr(building, "FLAGS", ("--no-such-flag",))
    assert "cannot be built" in str(native.native_library())
    assert [*(tmp_path / "native").iterdir()] == []


def test_ways_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="int8"):
        choose_product(decoder("llama"), "int9")
    with pytest.raises(ConfigError, match="does not divide"):
        choose_product(decoder("llama"), "int8")
    unknown = choose_product(tiny("gpt2"))
    assert unknown.product == ""
    assert "not a model" in unknown.problem
    assert "not a model" in choose_product(tiny("gpt2"), "plain").problem
