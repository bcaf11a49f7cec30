"""The doctor against a base: renamed, missing and misfitting modules, another base, a merged one, sizes, templates."""

import json
from dataclasses import replace

import pytest
import torch

from onebase.adapters.kinds import merged_weight
from onebase.config import LoraConfig
from onebase.diagnosis.case import Case
from onebase.diagnosis.checkup import diagnose, verdict
from onebase.diagnosis.measures import Effect
from onebase.diagnosis.salvage import salvage
from onebase.models.base import wrap_base
from onebase.storage.format import save_adapter
from sickness import adapter, edit_config, edit_tensors, grave, look, only
from texts import text_base, text_model, tokenizer
from tiny import tiny

MODULES = 14


@pytest.fixture
def folder(tmp_path):
    return save_adapter(adapter(), tmp_path / "adapter")


# -- Names and shapes


def renamed(folder, old, new):
    edit_tensors(folder, lambda n, t: (n.replace(old, new, 1), t))
    return look(folder)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model.model.layers", "model.model.language_model.layers", "model.language_model. -> model."),
        ("model.model.layers", "model.layers", "(nothing) -> model."),
        ("self_attn", "attention", "attention. -> self_attn."),
    ],
)
def test_a_rename_is_reported(folder, old, new, said):
    found = renamed(folder, old, new)
    text, facts = only(found, "keys", "error")
    assert f"it looks renamed: {said} in the names would match {len(facts['unexpected'])} of them" in text
    assert facts["matched"] == MODULES - len(facts["unexpected"])
    assert grave(found) == {"keys"}


def test_a_module_that_the_base_lacks_comes_with_the_nearest_name(folder):
    edit_tensors(folder, lambda n, t: (n.replace("layers.1.mlp.up_proj", "layers.1.mlp.u_proj"), t))
    text, facts = only(look(folder), "keys", "error")
    assert "nearest to model.layers.1.mlp.u_proj: model.layers.1.mlp.up_proj" in text
    assert facts["unexpected"] == ["model.layers.1.mlp.u_proj"]
    assert facts["missing"] == ["model.layers.1.mlp.up_proj"]


def test_missing_modules(folder):
    edit_tensors(folder, lambda n, t: None if "layers.1.mlp" in n else (n, t))
    text, facts = only(look(folder), "keys", "error")
    assert "3 modules that the config targets are not in the file" in text
    assert facts["missing"] == [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]


def test_modules_that_the_config_does_not_target(folder):
    edit_config(folder, target_modules=["q_proj", "v_proj"])
    assert "does not load onto this base" in only(look(folder), "keys", "error")[0]


def test_a_base_of_another_size(folder):
    found = look(folder, text_base(hidden_size=64))
    text, facts = only(found, "keys", "error")
    assert f"{MODULES} updates do not fit" in text
    assert len(facts["shapes"]) == MODULES
    assert found["size"] == []


def test_another_architecture(folder):
    _, facts = only(look(folder, wrap_base(tiny("gpt2"))), "keys", "error")
    assert facts["matched"] == 0
    assert len(facts["unexpected"]) == MODULES


# -- Which base


def test_another_base_by_its_fingerprint(folder):
    found = look(folder, text_base(seed=1))
    text, facts = only(found, "base", "error")
    assert "trained on tiny (sha256:" in text
    assert facts["recorded"] != facts["base"]
    assert only(found, "merged", "fine")[1]["held"] == pytest.approx(0, abs=0.3)
    assert grave(found) == {"base"}


def test_a_base_without_a_record(tmp_path):
    found = look(save_adapter(adapter(fingerprint=""), tmp_path / "a"))
    assert "cannot be told" in only(found, "base", "skipped")[0]
    found = look(save_adapter(adapter(fingerprint="", base="other/model"), tmp_path / "b"))
    assert "made for other/model, this is tiny" in only(found, "base", "warning")[0]


@pytest.mark.parametrize("size", [0.2, 0.3])
def test_a_base_that_holds_the_update_already(tmp_path, size):
    made = adapter(size=size)
    base = text_base()
    for path, low in made.lowrank.items():
        weight = base.model.get_submodule(path).weight
        weight.data = merged_weight(weight.data, low)
    found = look(save_adapter(made, tmp_path / "a"), wrap_base(base.model, tokenizer(), "tiny"))
    text, facts = only(found, "merged", "error")
    assert facts["held"] == pytest.approx(1, abs=4 * facts["deviation"])
    assert facts["deviation"] < 0.1
    assert "before the merge" in text


def test_where_a_merge_cannot_be_told(tmp_path):
    found = look(save_adapter(adapter(size=0.05, fingerprint=""), tmp_path / "a"))
    assert "cannot be told" in only(found, "merged", "skipped")[0]


# -- Sizes


@pytest.mark.parametrize(
    ("size", "said"), [(2.0, "the update is larger than the weight in 14 modules"), (1e-4, "at most")]
)
def test_sizes(tmp_path, size, said):
    text, facts = only(look(save_adapter(adapter(size=size), tmp_path / "a")), "size", "warning")
    assert said in text
    assert (facts["mean"] > 1) == (size > 1)


def test_intruders(tmp_path):
    found = look(save_adapter(adapter(size=5.0), tmp_path / "a"))
    text, facts = only(found, "intruders", "fine")
    assert facts["of"] == 60
    wide = adapter(config=LoraConfig(rank=16, alpha=32), size=5.0)
    text, facts = only(look(save_adapter(wide, tmp_path / "b")), "intruders", "warning")
    assert sum(facts["modules"].values()) > 30
    assert "expect it to forget" in text


def test_dora_is_measured_as_the_change_of_the_weight(tmp_path):
    model = text_model()
    made = adapter(model, LoraConfig(rank=4, alpha=8, dora=True), 0.0)
    norms = {path: model.get_submodule(path).weight.norm(dim=1) for path in made.lowrank}
    low = {p: one._replace(magnitude=1.5 * norms[p]) for p, one in made.lowrank.items()}
    folder = save_adapter(replace(made, lowrank=low), tmp_path / "a")
    case = Case(salvage(folder, text_base()), text_base())
    assert [m.ratio for m in case.modules] == pytest.approx([0.5] * MODULES)
    found = look(folder)
    assert only(found, "trained", "warning")[1]["idle"] == MODULES  # B·A is 0, the norms are not the base's
    assert only(look(folder, None), "trained", "warning")
    assert all(m.norm is None for m in Case(salvage(folder)).modules)


# -- Prompts


def test_a_base_without_a_chat_template(folder):
    base = text_base()
    assert (
        "this base has no tokenizer"
        in only(look(folder, replace(base, tokenizer=None)), "prompt", "error")[0]
    )
    bare = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer)
    text, _ = only(look(folder, replace(base, tokenizer=bare)), "prompt", "error")
    assert "no chat template" in text


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_another_chat_template_beside_the_adapter(folder, place):
    own = tokenizer().chat_template
    for text, severity in ((own + "\n", "fine"), (own + " changed", "warning")):
        written = text if place.endswith("jinja") else json.dumps({"chat_template": text})
        (folder / place).write_text(written)
        only(look(folder), "prompt", severity)


def listed(kind, vocabulary, added):
    model = {"vocab": vocabulary if kind == "mapping" else [[token, -1.0] for token in vocabulary]}
    return json.dumps({"model": model, "added_tokens": added})


@pytest.mark.parametrize("kind", ["mapping", "list"])
def test_the_tokenizer_beside_the_adapter(folder, kind):
    ids = dict(sorted(tokenizer().get_vocab().items(), key=lambda pair: pair[1]))
    (folder / "tokenizer.json").write_text(listed(kind, ids, []))
    assert str(len(ids)) in only(look(folder), "words", "fine")[0]

    (folder / "tokenizer.json").write_text(listed(kind, ids, [{"content": "<new>", "id": len(ids)}]))
    assert "lacks 1 of" in only(look(folder), "words", "warning")[0]
    assert "<new>" in only(look(folder), "words", "warning")[0]

    first, second, *rest = ids
    swapped = {token: number for number, token in enumerate([second, first, *rest])}
    (folder / "tokenizer.json").write_text(listed(kind, swapped, []))
    text, facts = only(look(folder), "words", "error")
    assert text.startswith("2 of the ")
    assert f"{min(first, second)!r} is {swapped[min(first, second)]} there" in text
    assert "another tokenizer" in text
    assert facts == {"tokens": len(ids), "other": 2, "unknown": 0}


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"model": 3}', '{"model": {"vocab": {"a": "b"}}, "added_tokens": [3]}']
)
def test_a_tokenizer_that_cannot_be_read_says_nothing(folder, text):
    (folder / "tokenizer.json").write_text(text)
    assert "no tokenizer lies beside it" in only(look(folder), "words", "fine")[0]


def test_a_prompt_format_that_is_none(tmp_path):
    assert (
        "is not one"
        in only(look(save_adapter(adapter(prompt={"chat": 3}), tmp_path / "a")), "prompt", "error")[0]
    )
    found = look(save_adapter(adapter(prompt={}), tmp_path / "b"))
    assert "no prompt format was recorded" in only(found, "prompt", "skipped")[0]
    plain = look(save_adapter(adapter(prompt={"separator": "\n##"}), tmp_path / "c"))
    assert r"'\n##'" in only(plain, "prompt", "fine")[0]


@pytest.mark.parametrize(
    ("effect", "severity", "said"),
    [
        (Effect(9, 0.0, 0.0, 0.0), "error", "no effect"),
        (Effect(9, float("nan"), float("nan"), 0.0), "error", "NaN"),
        (Effect(9, 7.0, 12.0, 1.0), "warning", "little to do with the base's"),
        (Effect(9, 0.5, 2.0, 0.25), "fine", "25.0% of 9 tokens"),
    ],
)
def test_effect(folder, effect, severity, said):
    assert said in only(look(folder, effect=effect), "effect", severity)[0]


def test_the_verdict_names_the_gravest_and_counts_the_rest(tmp_path):
    low = {p: one._replace(B=torch.zeros_like(one.B)) for p, one in adapter().lowrank.items()}
    folder = save_adapter(replace(adapter(), lowrank=low), tmp_path / "a")
    edit_config(folder, alpha_pattern={"q_prj": 2.0})
    case = Case(salvage(folder, text_base(seed=1)), text_base(seed=1))
    assert (
        verdict(diagnose(case)) == "sick: no effect: B·A is 0 in all 14 modules (1 other error and 1 warning)"
    )
    other = Case(salvage(save_adapter(adapter(size=2.0), tmp_path / "b"), text_base()), text_base())
    assert verdict(diagnose(other)).startswith("healthy, 1 warning: the update is larger than the weight")
