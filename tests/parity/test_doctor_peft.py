"""The doctor on what PEFT writes: a healthy folder is healthy, and intruders are those that PEFT finds."""

import re

import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import save_file

from onebase.diagnosis.case import Case
from onebase.diagnosis.measures import intruders
from onebase.diagnosis.salvage import salvage
from onebase.models.base import wrap_base
from sickness import grave, look, only
from texts import text_base, text_model, tokenizer


def saved(folder, size=0.06, **options):
    """A LoRA as PEFT trains and saves it; the model that it was made on, and PEFT's."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    wrapped = peft.get_peft_model(text_model(), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "size": 0.04}, {"use_dora": True}], ids=str)
def test_a_healthy_peft_folder_is_healthy(options, tmp_path):
    saved(tmp_path, **options)
    found = look(tmp_path)
    assert grave(found) == set()
    assert only(found, "keys", "fine")[1]["matched"] == 14


def test_a_fresh_peft_adapter_has_no_effect(tmp_path):
    peft.get_peft_model(text_model(), peft.LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    assert "no effect: B·A is 0 in all 14 modules" in only(look(tmp_path), "trained", "error")[0]


def test_names_of_a_state_dict_that_was_saved_by_hand(tmp_path):
    wrapped = saved(tmp_path)
    state = {n: p.detach().clone() for n, p in wrapped.named_parameters() if "lora_" in n}
    save_file(state, tmp_path / "adapter_model.safetensors")
    text, _ = only(look(tmp_path), "names", "error")
    assert "28 of 28 tensor names have the adapter's name inside" in text
    assert only(look(tmp_path), "keys", "fine")[1]["matched"] == 14


@pytest.mark.parametrize("size", [0.3, 0.6])
def test_intruders_are_those_that_peft_finds(size, tmp_path):
    wrapped = saved(tmp_path, size, r=8)
    lines: list[str] = []
    reduce_intruder_dimension(wrapped, logging_sink=lines.append)
    told = [
        re.fullmatch(r"base_model\.model\.(.*): (?:No intruders|Intruders: (\d+))", line) for line in lines
    ]
    theirs = {match[1]: int(match[2] or 0) for match in told if match}
    base = wrap_base(text_model(), tokenizer(), "tiny")
    case = Case(salvage(tmp_path, base), base)
    ours = {path: intruders(case.weight(path), low)[0] for path, low in case.fitting.items()}
    assert ours == theirs
    assert sum(ours.values()) > 0
    assert text_base().fingerprint == base.fingerprint
