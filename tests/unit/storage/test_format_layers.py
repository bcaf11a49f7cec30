"""How every kind of layer is stored: PEFT's names and layouts, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import trained
from layer_cases import CASES
from onebase.adapters.adapter import Adapter
from onebase.config import LoraConfig
from onebase.errors import BaseMismatch, FormatError
from onebase.models.base import wrap_base
from onebase.storage.format import CONFIG, SIDECAR, TENSORS, load_adapter, read_adapter, save_adapter
from tiny import tiny


def edit_config(folder: Path, **values: object) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | values))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / TENSORS)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors, and no sidecar, as if PEFT had written the folder."""
    save_file(tensors, folder / TENSORS)
    (folder / SIDECAR).unlink(missing_ok=True)


def case_folder(name: str, place: Path, variant: str = "lora") -> tuple[Adapter, Path]:
    case = CASES[name]
    adapter = trained(case.model(), case.config(variant))
    return adapter, save_adapter(adapter, place / "case")


def test_attention_is_stored_under_pefts_names_with_half_of_the_output_projections_update(tmp_path: Path):
    adapter, place = case_folder("attention", tmp_path)
    tensors, out = stored(place), adapter.lowrank["mha.out_proj.weight"]
    assert {name.removeprefix("base_model.model.") for name in tensors} == {
        f"{path}.lora_{side}.weight" for path in ("mha", "mha.base_layer.out_proj", "lin") for side in "AB"
    }
    prefix = "base_model.model.mha.base_layer.out_proj.lora_"
    assert torch.equal(tensors[prefix + "A.weight"], out.A)
    assert torch.equal(tensors[prefix + "B.weight"] * 2, out.B)
    assert json.loads((place / CONFIG).read_text())["target_modules"] == ["lin", "mha"]


def test_experts_are_stored_in_pefts_layout(tmp_path: Path):
    adapter, place = case_folder("gpt-oss experts", tmp_path)
    tensors = stored(place)
    experts = "model.layers.0.mlp.experts"
    for stored_as, name in (
        (f"{experts}.base_layer", "gate_up_proj"),
        (experts, "down_proj"),
    ):  # the first inside
        low = adapter.lowrank[f"{experts}.{name}"]
        a, b = (tensors[f"base_model.model.{stored_as}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(a, low.A)
        for expert in range(4):  # PEFT's B: rank r of expert e is column 4r + e
            assert torch.equal(b[:, expert::4], low.B.unflatten(0, (4, -1))[expert])
    listed = json.loads((place / CONFIG).read_text())["target_parameters"]
    assert listed == ["experts.gate_up_proj", "experts.down_proj"]


def test_a_convolution_is_stored_with_its_kernel(tmp_path: Path):
    adapter, place = case_folder("conv2d", tmp_path, "dora")
    tensors, low = stored(place), adapter.lowrank["first"]
    assert tensors["base_model.model.first.lora_A.weight"].shape == (2, 3, 3, 2)
    assert tensors["base_model.model.first.lora_B.weight"].shape == (5, 2, 1, 1)
    assert tensors["base_model.model.first.lora_magnitude_vector"].shape == (1, 5, 1, 1)
    assert low.kernel == (3, 2)
    assert read_adapter(place) == adapter


def test_which_parameter_is_which_without_the_base(tmp_path: Path):
    """PEFT keeps no order: transformers' experts are known, others only to the base."""
    adapter, place = case_folder("gpt-oss experts", tmp_path)
    edit_config(place, target_parameters=["down_proj", "gate_up_proj"])
    rewrite(place, stored(place))
    assert read_adapter(place).lowrank.keys() == adapter.lowrank.keys()

    case = CASES["parameters"]
    adapter, place = case_folder("parameters", tmp_path / "own")
    assert read_adapter(place) == adapter  # our own files are in order
    edit_config(place, target_parameters=["heads.mix", "inner.up", "inner.down"])
    rewrite(place, stored(place))
    with pytest.raises(FormatError, match=r"inner.base_layer: the config does not tell which parameter"):
        read_adapter(place)
    assert load_adapter(place, wrap_base(case.model())) == adapter


def test_a_layer_that_peft_wraps_and_never_calls_is_left_out(tmp_path: Path):
    model = CASES["attention"].model()
    place = save_adapter(trained(model, LoraConfig(rank=2, target_modules="lin")), tmp_path / "a")
    idle = "base_model.model.mha.out_proj.lora_"
    tensors = stored(place) | {idle + "A.weight": torch.ones(2, 16), idle + "B.weight": torch.zeros(16, 2)}
    rewrite(place, tensors)
    edit_config(place, target_modules=["lin", "mha.out_proj"])
    assert load_adapter(place, wrap_base(model)).lowrank.keys() == {"lin"}
    rewrite(place, tensors | {idle + "B.weight": torch.ones(16, 2)})
    with pytest.raises(BaseMismatch, match=r"mha.out_proj: the base has .* carries no update"):
        load_adapter(place, wrap_base(model))


def test_the_order_of_patterns_is_kept(tmp_path: Path):
    """The first key that matches counts, so that `q_proj` before `.*` is not the same as after it."""
    config = LoraConfig(rank=4, target_modules="q_proj,v_proj", rank_pattern={"q_proj": 2, ".*": 3})
    adapter = trained(tiny("llama"), config)
    assert {low.rank for low in adapter.lowrank.values()} == {2, 3}
    assert read_adapter(save_adapter(adapter, tmp_path / "a")) == adapter


def test_the_start_stands_in_the_sidecar_where_peft_would_change_the_base(tmp_path: Path):
    adapter = trained(tiny("llama"), LoraConfig(rank=2, target_modules=["q_proj"], init="pissa"))
    place = save_adapter(adapter, tmp_path / "a")
    assert json.loads((place / CONFIG).read_text())["init_lora_weights"] is True
    assert json.loads((place / SIDECAR).read_text())["start"] == "pissa"
    assert read_adapter(place) == adapter
    assert {low.rank for low in adapter.lowrank.values()} == {4}  # twice: the start's other half is held
    sidecar = json.loads((place / SIDECAR).read_text())
    for value in (3, "pizza"):
        (place / SIDECAR).write_text(json.dumps(sidecar | {"start": value}))
        with pytest.raises(FormatError, match=r"start|init"):
            read_adapter(place)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"first.lora_B.weight": torch.ones(6, 2, 3)},
            "A (2, 4, 3), B (6, 2, 3), but the config says rank 2",
        ),
        ({"first.lora_B.weight": torch.ones(6, 1, 1)}, "a convolution of 2 groups, which has no single W"),
        ({"first.lora_B.weight": torch.ones(6, 2)}, "but the config says rank 2"),
        ({"first.lora_A.weight": torch.ones(2, 4, 1, 1, 1, 1)}, "but the config says rank 2"),
        ({"first.lora_magnitude_vector": torch.ones(1, 5, 1)}, "but its magnitude has 5 values"),
        ({"first.lora_magnitude_vector": None}, "first: has no magnitude, which the config does not say"),
        (
            {"first.lora_B.bias": torch.ones(6)},
            "first: has magnitude and bias, which the config does not say",
        ),
    ],
)
def test_parts_of_a_convolutions_update_that_do_not_belong_together(tmp_path: Path, changes: dict, told: str):
    _, place = case_folder("conv1d", tmp_path, "dora")
    tensors = stored(place) | {f"base_model.model.{name}": tensor for name, tensor in changes.items()}
    rewrite(place, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(FormatError, match=re.escape(told)):
        read_adapter(place)


def test_biases_that_the_config_promises_must_be_there(tmp_path: Path):
    _, place = case_folder("mlp", tmp_path, "lora_bias")
    rewrite(place, {name: tensor for name, tensor in stored(place).items() if not name.endswith("bias")})
    with pytest.raises(FormatError, match="the config says lora_bias, and no update has one"):
        read_adapter(place)
