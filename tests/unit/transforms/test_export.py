"""Adapters rewritten as plain uniform ones: what a reader of r and lora_alpha alone makes of them; refusals."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapters import VARIANTS, every_kind, options_for, trained
from onebase.adapters.adapter import Adapter, LowRank, Origin, TokenRows
from onebase.adapters.kinds import merged_weight
from onebase.config import LoraConfig
from onebase.errors import ConfigError, FormatError, OutputExists
from onebase.storage.format import read_adapter, save_adapter
from onebase.transforms.export import (
    Difference,
    differences,
    portable,
    require_near,
    save_exact,
    save_portable,
    without_norms,
    worst,
)
from tiny import tiny

# What LoraConfig of PEFT 0.3 knows: an older reader raises on any other key.
OLD_KEYS = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "fan_in_fan_out", "modules_to_save"),
    *("init_lora_weights", "inference_mode", "task_type", "peft_type", "base_model_name_or_path"),
}


def updates(adapter):
    """Each update in full, in float64."""
    return {p: low.scale * low.B.double() @ low.A.double() for p, low in adapter.lowrank.items()}


def naive(folder):
    """What a reader that knows r and lora_alpha alone makes of a folder: each update in full."""
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter_model.safetensors")
    sides = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
    scale = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model.").removesuffix(a): scale
        * stored[name.removesuffix(a) + b].double()
        @ tensor.double()
        for name, tensor in stored.items()
        for a, b in sides
        if name.endswith(a)
    }


def furthest(some, others):
    assert some.keys() == others.keys()
    return max(float((some[p] - others[p]).abs().max() / others[p].abs().max()) for p in others)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "bert"])
def test_a_naive_reader_gets_the_portable_one_right(arch, variant, tmp_path):
    model = tiny(arch)
    source = trained(model, LoraConfig(**options_for(arch, variant)))
    result = portable(source)
    found = save_portable(result, source, tmp_path / "portable")
    assert furthest(naive(tmp_path / "portable"), updates(source)) <= 1e-6
    assert found.relative <= 1e-6
    raw = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert raw.keys() <= OLD_KEYS
    assert raw["r"] == raw["lora_alpha"] == max(low.rank for low in source.lowrank.values())
    assert raw["target_modules"] == sorted(source.config.target_modules)
    read = read_adapter(tmp_path / "portable")
    assert furthest(updates(read), updates(result)) == 0
    save_adapter(source, tmp_path / "source")
    wrong = furthest(naive(tmp_path / "source"), updates(source))
    assert (wrong > 0.1) == (variant in ("rslora", "patterns"))  # what the export is for


def test_embeddings_and_head_come_along():
    source = trained(tiny("llama"), every_kind(tiny("llama")))
    result = portable(source)
    assert {"model.embed_tokens", "lm_head"} < result.lowrank.keys()
    assert result.lowrank["model.embed_tokens"].kind == "embedding"
    assert furthest(updates(result), updates(source)) <= 1e-6


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.floats(-40, 40).filter(lambda s: abs(s) > 1e-3)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 1000),
)
def test_fold_and_padding_are_exact_but_for_one_rounding(parts, seed):
    draw = torch.Generator().manual_seed(seed)
    lows = {
        f"m{n}": LowRank(torch.randn(rank, 6, generator=draw), torch.randn(7, rank, generator=draw), scale)
        for n, (rank, scale) in enumerate(parts)
    }
    source = Adapter(LoraConfig(rank=1, target_modules=sorted(lows)), lows)
    result = portable(source)
    rank = max(rank for rank, _ in parts)
    assert (result.config.rank, result.config.alpha, result.config.rslora) == (rank, rank, False)
    for path, low in result.lowrank.items():
        own = lows[path]
        assert (low.rank, low.scale) == (rank, 1.0)
        assert torch.equal(low.A[: own.rank], own.A)
        assert not low.A[own.rank :].any()
        assert not low.B[:, own.rank :].any()
        torch.testing.assert_close(
            low.B[:, : own.rank].double(), own.B.double() * own.scale, rtol=2**-24, atol=0
        )
        if math.frexp(abs(own.scale))[0] == 0.5:
            assert torch.equal(low.B[:, : own.rank], own.B * own.scale)
    assert portable(result).tensors().keys() == result.tensors().keys()
    assert all(torch.equal(t, result.tensors()[n]) for n, t in portable(result).tensors().items())


def low(**changes):
    made = LowRank(torch.ones(2, 4), torch.ones(3, 2), 1.0)
    return made._replace(**changes)


CONV = low(A=torch.ones(2, 36), kind="conv", kernel=(3, 3))
TOKENS = {"embed": TokenRows((1,), torch.ones(1, 4))}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lowrank": {"m": low(magnitude=torch.ones(3))}}, "DoRA's norms: m\n.*--fit RANK"),
        ({"lowrank": {"m": low(bias=torch.ones(3))}}, r"a trained bias \(lora_bias\): m\n.*--to merged"),
        ({"lowrank": {"c": CONV}}, "a convolution: c"),
        ({"lowrank": {"e.down": low(kind="parameter")}}, "a parameter without a layer.*: e.down"),
        (
            {"lowrank": {"m": low()}, "full": {"head": {"weight": torch.ones(2)}}},
            "as they stand.*: head.weight",
        ),
        ({"lowrank": {"m": low()}, "tokens": TOKENS}, "token rows.*: embed.rows"),
        ({"lowrank": {}, "tokens": TOKENS}, "token rows.*: embed.rows"),
        ({"lowrank": {"m": low(scale=1e39)}}, "not finite in float32"),
    ],
)
def test_what_a_plain_lora_cannot_hold_is_refused_by_name(parts, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        portable(Adapter(LoraConfig(target_modules=["m"]), **parts))


def test_everything_refused_is_named_at_once():
    lows = {f"m{n}": low(bias=torch.ones(3), magnitude=torch.ones(3)) for n in range(5)}
    with pytest.raises(ConfigError) as error:
        portable(Adapter(LoraConfig(target_modules=["m0"]), lows))
    assert "a trained bias (lora_bias): m0, m1, m2 and 2 more" in str(error.value)
    assert "DoRA's norms: m0" in str(error.value)
    assert "--fit" not in str(error.value)  # it would not help against the biases


def test_paths_stand_for_targets_that_no_names_say():
    source = trained(tiny("llama"), LoraConfig(rank=2, target_modules=["q_proj"], layers="0"))
    loose = replace(source.config, target_modules="re:.*q_proj", layers="0")
    assert portable(replace(source, config=loose)).config.target_modules == (
        "model.layers.0.self_attn.q_proj",
    )


@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_a_fit_of_dora_is_the_nearest_of_its_rank(kind):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn((5, 8) if kind == "transposed" else (8, 5), generator=draw)
    dora = LowRank(
        torch.randn(2, 5, generator=draw),
        torch.randn(8, 2, generator=draw),
        0.5,
        kind,
        magnitude=torch.rand(8, generator=draw) + 0.5,
    )
    plain = low(A=torch.ones(2, 5), B=torch.ones(8, 2))
    adapter = Adapter(LoraConfig(rank=2, target_modules=["m", "p"]), {"m": dora, "p": plain})
    change = (merged_weight(weight, dora) - weight).double()
    errors = []
    for rank in range(1, 6):
        fitted, error = without_norms(adapter, {"m": weight}.__getitem__, rank)
        got = fitted.lowrank["m"]
        assert (got.rank, got.magnitude, got.scale, got.kind) == (rank, None, 1.0, kind)
        assert fitted.lowrank["p"] is plain
        update = got.B.double() @ got.A.double()
        off = change - (update.T if kind == "transposed" else update)
        assert error == {"m": pytest.approx(float(off.norm() / change.norm()), abs=1e-6)}
        values = torch.linalg.svdvals(change)
        assert error["m"] == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-6)
        errors.append(error["m"])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6  # the weight's whole rank
    with pytest.raises(ConfigError, match="at most 5"):
        without_norms(adapter, {"m": weight}.__getitem__, 6)
    with pytest.raises(ConfigError, match="the adapter has no DoRA update"):
        without_norms(fitted, {"m": weight}.__getitem__, 2)


def test_differences_are_found_value_by_value():
    one = Adapter(LoraConfig(target_modules=["m"]), {"m": low(A=torch.ones(2, 3000), B=torch.ones(3000, 2))})
    b = one.lowrank["m"].B.clone()
    b[2999, 1] += 0.5  # the last rows are compared in another piece
    other = {"m": one.lowrank["m"]._replace(B=b)}
    assert differences(one, other) == {"m": Difference(0.5, 0.25)}
    assert differences(one, one.lowrank) == {"m": Difference(0.0, 0.0)}
    assert worst([Difference(1, 0.5), Difference(2, 0.1)]) == Difference(2, 0.5)
    assert require_near(differences(one, other), 0.3) == Difference(0.5, 0.25)
    with pytest.raises(FormatError, match=r"m \(0.25\)"):
        require_near(differences(one, other), 0.2)
    nan = {"m": one.lowrank["m"]._replace(B=b * math.nan)}
    with pytest.raises(FormatError, match="nan"):
        require_near(differences(one, nan), 0.2)
    with pytest.raises(FormatError, match="only one of them has m"):
        differences(one, {})
    with pytest.raises(FormatError, match="another shape"):
        differences(one, {"m": low()})


def test_peft_gets_every_bit(tmp_path):
    model = tiny("llama")
    source = trained(model, LoraConfig(rank=4, alpha=6, modules_to_save=["lm_head"], rslora=True))
    source = replace(source, origin=Origin("some/base", "", "CAUSAL_LM", {"chat": True}))
    assert save_exact(source, tmp_path / "a") == tmp_path / "a"
    assert read_adapter(tmp_path / "a") == source
    with pytest.raises(OutputExists, match="exists already"):
        save_exact(source, tmp_path / "a")
    with pytest.raises(OutputExists, match="exists already"):
        save_portable(source, source, tmp_path / "a")


def test_a_result_that_is_not_the_source_leaves_nothing(tmp_path):
    source = trained(tiny("llama"), LoraConfig(rank=2))
    other = portable(trained(tiny("llama"), LoraConfig(rank=2), seed=1))
    with pytest.raises(FormatError, match="further from the source adapter than 1e-05"):
        save_portable(other, source, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
