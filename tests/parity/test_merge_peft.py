"""Merged weights are those of PEFT's merge_and_unload().save_pretrained(), from the same adapter folder."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM, SwitchTransformersConfig, T5Config, UMT5Config

from adapters import trained
from merges import SPECS, load, save, tensors
from onebase.cli.main import main
from onebase.models.merging import plan_merge
from onebase.storage.format import save_adapter
from onebase.transforms.merge_files import merge_files
from tiny import CONFIGS, output, some_ids, tiny

# PEFT merges an update of one tied weight into both, and saves what is tied once: there we differ on purpose.
TIED = ("llama-tied", "gemma3", "gpt2")
CASES = [
    (a, s) for a in CONFIGS for s in SPECS if a not in TIED or s not in ("every kind", "one tied", "saved")
]


def peft_merged(model, adapter_folder, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(copy.deepcopy(model), adapter_folder).merge_and_unload()
        merged.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("arch", "spec"), CASES)
def test_the_same_weights_as_peft(arch, spec, tmp_path):
    model = tiny(arch)
    base = save(model, tmp_path / "base")
    folder = save_adapter(trained(model, SPECS[spec](arch)), tmp_path / "adapter")
    theirs = tensors(peft_merged(model, folder, tmp_path / "theirs"))
    ours = tensors(merge_files(plan_merge(base, folder), tmp_path / "ours"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", TIED)
def test_where_only_one_of_two_tied_weights_changes_ours_is_what_peft_computes_unmerged(arch, tmp_path):
    """The peer's own forward pass with the adapter is the truth; its merge changes the other weight too."""
    model, ids = tiny(arch), some_ids()
    base = save(model, tmp_path / "base")
    folder = save_adapter(trained(model, SPECS["one tied"](arch)), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unmerged = output(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval(), ids)
    theirs = load(peft_merged(model, folder, tmp_path / "theirs"))
    ours = load(merge_files(plan_merge(base, folder), tmp_path / "ours"))
    torch.testing.assert_close(output(ours, ids), unmerged, rtol=1e-4, atol=1e-4)
    assert (output(theirs, ids) - unmerged).abs().max() > 0.1


SIZES = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
SHARED = {"T5": T5Config, "T5 1.1": T5Config, "UMT5": UMT5Config, "Switch": SwitchTransformersConfig}


@pytest.mark.parametrize("target", ["shared", "lm_head", "encoder.embed_tokens"])
@pytest.mark.parametrize("arch", SHARED)
def test_one_of_the_embeddings_that_an_encoder_decoder_shares(arch, target, tmp_path):
    """Stored apart, transformers unties it; the setting that would say so also scales the output, and stays."""
    torch.manual_seed(0)
    untied = {"tie_word_embeddings": False} if arch == "T5 1.1" else {}
    config = SHARED[arch](**SIZES, **untied, num_experts=2, decoder_start_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    base, ids = save(model, tmp_path / "base"), {"input_ids": some_ids(), "decoder_input_ids": some_ids()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        settings = PeftConfig(r=2, target_modules=[target], init_lora_weights=False)
        theirs = get_peft_model(copy.deepcopy(model), settings).eval()
        theirs.save_pretrained(tmp_path / "adapter")
        wanted = theirs(**ids).logits
        theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours = merge_files(plan_merge(base, tmp_path / "adapter"), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(load(ours, type(model))(**ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert (load(tmp_path / "theirs", type(model))(**ids).logits - wanted).abs().max() > 0.1
    kept = json.loads((ours / "config.json").read_text())
    assert kept == json.loads((base / "config.json").read_text())
    if target != "shared":  # those that are still alike are stored once, as the base stores them
        assert tensors(ours).keys() == tensors(base).keys() | {f"{target}.weight"}


def test_biases_that_peft_trained_in_the_layers_themselves(tmp_path):
    """bias="lora_only" stores the layers' own biases: merged, and rewritten by export, they are PEFT's."""
    model, ids = tiny("gpt2"), some_ids()
    base = save(model, tmp_path / "base")
    settings = PeftConfig(r=2, target_modules=["c_attn", "c_fc"], bias="lora_only", fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(model), settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load(merge_files(plan_merge(base, tmp_path / "adapter"), tmp_path / "ours"))
    torch.testing.assert_close(output(ours, ids), output(theirs, ids), rtol=1e-4, atol=1e-4)
    places = [str(tmp_path / "adapter"), "--output", str(tmp_path / "plain"), "--base", str(base)]
    assert main(["export", "--to", "peft", *places]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "plain").eval()
    torch.testing.assert_close(output(again, ids), output(theirs, ids), rtol=1e-4, atol=1e-4)
