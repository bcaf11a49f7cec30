"""The doctor: each sickness is made, and found by its check; a healthy adapter has none."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters import every_kind
from onebase.adapters.adapter import Origin
from onebase.adapters.injection import new_adapter
from onebase.adapters.kinds import merged_weight
from onebase.config import LoraConfig
from onebase.diagnosis.case import Case
from onebase.diagnosis.checkup import CHECKS, diagnose, verdict
from onebase.diagnosis.measures import Effect
from onebase.diagnosis.salvage import salvage
from onebase.errors import MissingFile
from onebase.models.base import wrap_base
from onebase.storage.format import CONFIG, TENSORS, save_adapter
from sickness import adapter, edit_config, edit_tensors, grave, look, only
from texts import text_base, text_model
from tiny import tiny

NAME = "model.layers.{}.self_attn.q_proj"
BASE = text_base()


@pytest.fixture
def folder(tmp_path):
    return save_adapter(adapter(), tmp_path / "adapter")


def test_a_healthy_adapter_has_nothing(folder):
    found = look(folder, effect=Effect(20, 0.3, 2.0, 0.4))
    assert grave(found) == set()
    assert all(found[name][0][0] == "fine" for name in CHECKS)
    findings = diagnose(Case(salvage(folder, text_base()), text_base(), Effect(20, 0.3, 2.0, 0.4)))
    assert verdict(findings) == "healthy"
    assert only(found, "keys", "fine")[1]["matched"] == 14
    assert only(found, "scale", "fine")[0].startswith("s = 2, from alpha/r = 8/4")


@pytest.mark.parametrize("arch", ["gpt2", "mixtral", "bert", "llama-tied"])
def test_every_kind_of_layer_is_measured(arch, tmp_path):
    model = tiny(arch)
    made = adapter(model, every_kind(model), 0.2, base="x", fingerprint="", prompt={})
    base = wrap_base(model)
    case = Case(salvage(save_adapter(made, tmp_path / "a"), base), base)
    modules = {m.path: m for m in case.modules}
    assert modules.keys() == made.lowrank.keys()
    for path, low in made.lowrank.items():
        weight = case.weight(path)
        delta = merged_weight(weight, case.fitting[path]) - weight
        assert modules[path].norm == pytest.approx(float(delta.norm()), rel=1e-3), path
        assert modules[path].ratio == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-3)
        assert modules[path].rank == low.rank
    assert "error" not in {finding.severity for _, finding in diagnose(case)}


def test_without_a_base_what_needs_none_is_checked(folder):
    found = look(folder, None)
    assert grave(found) == set()
    skipped = {name for name, findings in found.items() if findings[0][0] == "skipped"}
    assert skipped == {name for name, check in CHECKS.items() if check.needs_base}


def test_no_such_folder(tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(MissingFile, match="nearest valid: adapter"):
        salvage(tmp_path / "adaptor")


# -- Files and settings


def test_an_empty_folder(tmp_path):
    texts = [text for _, text, _ in look(tmp_path)["files"]]
    assert any("no adapter_config.json; the folder holds nothing" in text for text in texts)
    assert any(f"no {TENSORS}" in text for text in texts)


def test_a_pickle_is_named_and_not_read(folder):
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    text, _ = only(look(folder), "files", "error")
    assert "only adapter_model.bin: a pickle" in text
    torch.save({"a": torch.zeros(2)}, folder / TENSORS)
    assert "pickle under a safetensors name" in only(look(folder), "files", "error")[0]


def test_files_that_are_broken(folder):
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])
    (folder / CONFIG).write_text("{'r': 4}")
    texts = [text for _, text, _ in look(folder)["files"]]
    assert any("adapter_config.json is not JSON" in text for text in texts)
    assert any("cut short" in text for text in texts)


def test_settings_that_are_not_computed(folder):
    edit_config(folder, use_qalora=True, layer_replication=[[0, 2]])
    texts = [text for severity, text, _ in look(folder)["settings"] if severity == "error"]
    assert any("use_qalora=True" in text for text in texts)
    assert any("layer_replication" in text for text in texts)
    edit_config(folder, use_qalora=False, layer_replication=None, r="four")
    assert "r='four': must be" in only(look(folder), "settings", "error")[0]


def test_what_only_the_reader_knows_is_told_too(folder):
    (folder / "onebase.json").write_text(json.dumps({"base": {"fingerprint": "sha256:other"}}))
    found = look(folder)
    assert "are from different adapters" in next(t for s, t, _ in found["files"] if s == "error")


# -- Tensors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n: f"module.{n}", "DataParallel"),
        (lambda n: n.replace("lora_A.", "lora_A.default."), "adapter's name inside"),
        (lambda n: n.removeprefix("base_model.model."), "no base_model.model. in front"),
    ],
)
def test_names_that_no_reader_knows(folder, change, said):
    edit_tensors(folder, lambda n, t: (change(n), t))
    found = look(folder)
    assert said in only(found, "names", "error")[0]
    assert only(found, "keys", "fine")[1]["matched"] == 14  # but for the names it would fit
    assert only(found, "size", "fine")[1]["largest"] > 0.01


def test_nan_and_infinity(folder):
    def spoil(name, tensor):
        if "layers.1.mlp.up_proj.lora_B" in name:
            tensor[0, 0] = float("nan")
        if "layers.0.mlp.up_proj.lora_A" in name:
            tensor[0, 0] = float("inf")
        return name, tensor

    edit_tensors(folder, spoil)
    text, facts = only(look(folder), "values", "error")
    assert "NaN or infinity" in text
    assert len(facts["tensors"]) == 2


@pytest.mark.parametrize(("factor", "said"), [(1e6, "values as large as"), (1e-12, "no value above 1e-08")])
def test_huge_and_tiny_values(tmp_path, factor, said):
    made = adapter()
    path = NAME.format(0)
    low = made.lowrank[path]
    odd = {path: low._replace(A=low.A * factor, B=low.B * factor)}
    found = look(save_adapter(replace(made, lowrank=dict(made.lowrank) | odd), tmp_path / "a"))
    text, facts = only(found, "values", "warning")
    assert said in text
    assert list(facts) == [path]


def test_dtypes(folder):
    edit_tensors(folder, lambda n, t: (n, t.bfloat16()))
    assert only(look(folder), "dtype", "fine")[1]["dtypes"] == {"BF16": 28}
    edit_tensors(folder, lambda n, t: (n, t.double() if "layers.0.mlp.up_proj.lora_A" in n else t))
    assert "F64 tensors (base_model" in only(look(folder), "dtype", "error")[0]


def test_never_stepped(tmp_path):
    model = text_model()
    fresh = new_adapter(model, LoraConfig(rank=4, alpha=8), 0, Origin(base="tiny"))
    found = look(save_adapter(fresh, tmp_path / "fresh"), effect=Effect(20, 0.0, 0.0, 0.0))
    text, facts = only(found, "trained", "error")
    assert "no effect: B·A is 0 in all 14 modules" in text
    assert facts == {"idle": 14, "modules": 14}
    assert "no effect: the same output" in only(found, "effect", "error")[0]
    assert "rank" not in grave(found)
    half = adapter()
    low = {p: one._replace(B=one.B * 0) if ".0." in p else one for p, one in half.lowrank.items()}
    text, facts = only(
        look(save_adapter(replace(half, lowrank=low), tmp_path / "half")), "trained", "warning"
    )
    assert facts["idle"] == 7


# -- Scale and spectrum


@pytest.mark.parametrize(
    ("values", "severity", "said"),
    [
        ({"lora_alpha": 0}, "error", "an alpha of 0"),
        ({"lora_alpha": -8}, "warning", "alpha is -8: the update is subtracted"),
        ({"lora_alpha": 400}, "warning", "s is 100, from alpha/r = 400/4"),
        ({"lora_alpha": 64, "use_rslora": True}, "warning", "s is 32, from alpha/sqrt(r) = 64/sqrt(4)"),
        ({"r": 8}, "error", "the config says rank 8, 14 modules have 4"),
        ({"alpha_pattern": {"q_prj": 2.0}}, "warning", "alpha_pattern q_prj matches no module"),
    ],
)
def test_scale(folder, values, severity, said):
    edit_config(folder, **values)
    text, facts = only(look(folder), "scale", severity)
    assert said in text
    assert facts["alpha"] == values.get("lora_alpha", 8)


def test_patterns_say_where_a_scale_comes_from(tmp_path):
    config = LoraConfig(rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 4.0})
    text, facts = only(look(save_adapter(adapter(config=config), tmp_path / "a")), "scale", "fine")
    assert facts["scales"] == [1.0, 2.0, 4.0]
    assert "with rank_pattern and alpha_pattern" in text


def test_rank_collapse(tmp_path):
    made = adapter()
    flat = {
        p: low._replace(B=torch.outer(low.B[:, 0], torch.tensor([1.0, 1e-3, 1e-3, 0.0])))
        for p, low in made.lowrank.items()
    }
    folder = save_adapter(replace(made, lowrank=flat), tmp_path / "a")
    text, facts = only(look(folder), "rank", "warning")
    assert "over 99% of the update in 14 of 14 modules" in text
    assert facts["mean stable rank"] == pytest.approx(1.0, abs=0.01)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["(a+", "q_proj"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6) | st.just("q_proj"), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = [
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "peft_type",
    "bias",
]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from([*KEYS, "base_model_name_or_path", "x"]), JSON, max_size=4))
def test_any_config_is_diagnosed(tmp_path_factory, values):
    folder = save_adapter(adapter(), tmp_path_factory.mktemp("fuzz") / "a")
    edit_config(folder, **values)
    found = diagnose(Case(salvage(folder, BASE), BASE))
    assert verdict(found)
    assert {name for name, _ in found} <= CHECKS.keys()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_diagnosed(tmp_path_factory, data):
    folder = save_adapter(adapter(), tmp_path_factory.mktemp("fuzz") / "a")
    path = folder / data.draw(st.sampled_from([CONFIG, TENSORS, "onebase.json"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content), 3000) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(content)
    assert verdict(diagnose(Case(salvage(folder, BASE), BASE)))
