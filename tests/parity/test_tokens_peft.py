"""Trained token rows go both ways between onebase and PEFT: output, gradients, merged weights, tied and untied."""

import copy
import itertools
import json
import re
import warnings

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from adapters import trained
from onebase.adapters.injection import inject, injected, trainable, use
from onebase.config import LoraConfig
from onebase.errors import BaseMismatch, FormatError
from onebase.models.base import wrap_base
from onebase.storage.format import load_adapter, read_adapter, save_adapter
from onebase.transforms.merge import merge_in_memory
from tiny import output, some_ids, tiny

ARCHS = ("llama", "llama-tied", "gpt2", "gemma3")
TOKENS = [17, 3, 40]  # some_ids() has the second and third
LAYER = {"gpt2": "c_attn"}
PATHS = {"gpt2": "transformer.wte"}

# PEFT's settings: a list (the input embedding), or names with their ids.
SETTINGS = {
    "list": TOKENS,
    "named": {"embed_tokens": TOKENS},
    "both": {"embed_tokens": TOKENS, "lm_head": TOKENS},
    "different": {"embed_tokens": TOKENS, "lm_head": [5]},
    "head": {"lm_head": [9, 4]},
}


def ids_with_tokens():
    ids = some_ids()
    ids[0, 2], ids[1, 5], ids[1, 6] = TOKENS
    return ids


def setting(name, arch):
    value = SETTINGS[name]
    if isinstance(value, list):
        return value
    return {PATHS.get(arch, key) if key == "embed_tokens" else key: ids for key, ids in value.items()}


def peft_model(arch, name, **options):
    """PEFT's model with rows and factors away from their start."""
    config = PeftConfig(
        r=2,
        lora_alpha=6,
        target_modules=options.pop("target_modules", [LAYER.get(arch, "q_proj")]),
        trainable_token_indices=setting(name, arch),
        fan_in_fan_out=arch == "gpt2",
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny(arch), config).eval()
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key or "trainable_tokens_delta" in key:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def save_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def peft_loads(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("arch", ARCHS)
def test_what_peft_saves_gives_the_same_here(arch, name, tmp_path):
    theirs, model, ids = peft_model(arch, name), tiny(arch), ids_with_tokens()
    adapter = load_adapter(save_peft(theirs, tmp_path / "a"), wrap_base(model))
    wanted = setting(name, arch)
    given = {path: list(tokens.ids) for path, tokens in adapter.tokens.items()}
    assert sorted(given.values()) == sorted([wanted] if isinstance(wanted, list) else wanted.values()) or (
        name == "both" and arch != "llama" and [*given.values()] == [TOKENS]
    )
    before = output(model, ids)
    with injected(model, adapter):
        ours = output(model, ids)
    torch.testing.assert_close(ours, output(theirs, ids), rtol=1e-5, atol=1e-5)
    assert (ours - before).abs().max() > 1e-2
    save_adapter(adapter, tmp_path / "b")
    assert load_adapter(tmp_path / "b", wrap_base(model)) == adapter
    torch.testing.assert_close(output(peft_loads(model, tmp_path / "b"), ids), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj"], []])
@pytest.mark.parametrize("arch", ARCHS)
def test_what_we_train_gives_the_same_in_peft(arch, targets, tmp_path):
    model, ids = tiny(arch), ids_with_tokens()
    targets = [LAYER.get(arch, target) for target in targets]
    config = LoraConfig(rank=2, target_modules=targets, trainable_tokens=[f"id:{n}" for n in TOKENS])
    adapter = trained(model, config)
    assert all(tokens.ids == (3, 17, 40) for tokens in adapter.tokens.values())
    save_adapter(adapter, tmp_path / "a")
    assert load_adapter(tmp_path / "a", wrap_base(model)) == adapter
    assert read_adapter(tmp_path / "a") == adapter
    theirs = peft_loads(model, tmp_path / "a")
    with injected(model, adapter):
        torch.testing.assert_close(output(model, ids), output(theirs, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["list", "both"])
@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_are_peft_s(arch, name, tmp_path):
    theirs, model, ids = peft_model(arch, name), tiny(arch), ids_with_tokens()
    adapter = load_adapter(save_peft(theirs, tmp_path), wrap_base(model))
    inject(model, adapter, "a")
    mine = trainable(model, "a")
    for parameter in mine.values():
        parameter.requires_grad_(True)
    with use(model, "a"):
        model(input_ids=ids).logits.log_softmax(-1)[..., TOKENS].sum().backward()
    for key, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in key or "trainable_tokens_delta" in key)
    theirs(input_ids=ids).logits.log_softmax(-1)[..., TOKENS].sum().backward()
    found = {
        key.removeprefix("base_model.model.").replace(
            ".token_adapter.trainable_tokens_delta.default", ".rows"
        ): p
        for key, p in theirs.named_parameters()
        if "trainable_tokens_delta" in key
    }
    assert found.keys() == {key for key in mine if key.endswith(".rows")}
    for key, parameter in found.items():
        assert parameter.grad.abs().max() > 1e-2
        torch.testing.assert_close(mine[key].grad, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "name"), [*itertools.product(ARCHS, ["list", "both"]), ("llama", "different"), ("llama", "head")]
)
def test_merged_weights_are_peft_s(arch, name, tmp_path):
    """But where tied weights get different rows: PEFT's merge writes both into the one tensor."""
    theirs, model = peft_model(arch, name), tiny(arch)
    adapter = load_adapter(save_peft(theirs, tmp_path), wrap_base(model))
    merged = merge_in_memory(model, adapter).state_dict()
    wanted = theirs.merge_and_unload().state_dict()
    assert merged.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-5, atol=1e-5)


def test_rows_that_peft_added_by_resizing_are_new_tokens_here(tmp_path):
    """A user of PEFT resizes the base; here the plain base gets rows for the new ids from the adapter."""
    wide = tiny("llama-tied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide.resize_token_embeddings(98)
        theirs = get_peft_model(
            wide, PeftConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 96, 97])
        ).eval()
    for key, parameter in theirs.named_parameters():
        if "lora_" in key or "trainable_tokens_delta" in key:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model, ids = tiny("llama-tied"), ids_with_tokens()
    adapter = load_adapter(save_peft(theirs, tmp_path), wrap_base(model))
    ids[0, 4], ids[2, 1] = 96, 97
    with injected(model, adapter):
        ours = output(model, ids)
    assert ours.shape[-1] == 98
    torch.testing.assert_close(ours, output(theirs, ids), rtol=1e-5, atol=1e-5)


BROKEN = {
    "missing": ({"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [1]}}, "lm_head: missing"),
    "not named": ({"trainable_token_indices": {"lm_head": TOKENS}}, "embed_tokens.token_adapter"),
    "too many": ({"trainable_token_indices": [1, 2]}, "has 2 ids"),
    "twice": ({"trainable_token_indices": [1, 1, 2]}, "each must be there once"),
    "negative": ({"trainable_token_indices": [1, -1, 2]}, "none negative"),
    "far": ({"trainable_token_indices": [1, 2, 1 << 40]}, "the base has 96 rows"),
    "gap": ({"trainable_token_indices": [1, 96, 98]}, "without a gap"),
    "text": ({"trainable_token_indices": ["a"]}, "must be ids"),
    "number": ({"trainable_token_indices": 3}, "must be ids"),
    "none": ({"trainable_token_indices": None}, "does not name it"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_setting_that_does_not_fit_the_file_is_refused(case, tmp_path):
    change, found = BROKEN[case]
    save_peft(peft_model("llama", "list"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((FormatError, BaseMismatch), match=re.escape(found)):
        load_adapter(tmp_path, wrap_base(tiny("llama")))
