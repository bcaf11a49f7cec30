"""Adapters as values, used wrongly: merge and combine say what is wrong, exit with 2, and write nothing."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from adapters import trained
from merges import stirred
from onebase.adapters.adapter import Adapter, Origin
from onebase.adapters.injection import new_adapter
from onebase.cli.main import main
from onebase.config import LoraConfig
from onebase.models.fingerprint import fingerprint_files
from onebase.storage.format import read_adapter, save_adapter
from texts import save_base, text_model
from tiny import tiny


@pytest.fixture
def stage(tmp_path: Path) -> dict[str, Path]:
    """A base, an adapter for it, and adapters that do not fit it, in folders of their own."""
    base = save_base(tmp_path / "base")
    model, origin = text_model(), Origin(base=str(base), fingerprint=fingerprint_files(base))

    def save(name: str, adapter: Adapter) -> Path:
        return save_adapter(replace(adapter, origin=origin), tmp_path / name)

    narrow = text_model(hidden_size=16)
    dora = new_adapter(model, LoraConfig(rank=2, dora=True))
    return {
        "base": base,
        "good": save("good", trained(model, LoraConfig(rank=2))),
        "narrow": save("narrow", trained(narrow, LoraConfig(rank=2))),
        "gpt2": save("gpt2", trained(tiny("gpt2"), LoraConfig(rank=2))),
        "dora": save("dora", stirred(dora)),
        "other": save_adapter(
            replace(trained(model, LoraConfig(rank=2)), origin=Origin("x", "sha256:1")), tmp_path / "other"
        ),
        "out": tmp_path / "out",
    }


def refused(
    capsys: pytest.CaptureFixture[str], stage: dict[str, Path], command: str, told: tuple[str, ...]
) -> None:
    """The command ends with 2, says all of `told` without a traceback, and leaves every file as it was."""
    root = stage["base"].parent
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(command.format(**stage).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("onebase: ")
    assert "Traceback" not in error
    assert [part for part in told if part not in error] == [], error
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert not stage["out"].exists()
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


CASES = {
    "shapes that do not fit": (
        "merge --adapter {narrow} --output {out}",
        ("layers.0.self_attn.q_proj", "the base's weight is 32 x 32, the adapter's 16 x 16"),
    ),
    "another architecture": (
        "merge --adapter {gpt2} --output {out}",
        ("h.0.attn.c_attn: the base has no such module", "h.1.mlp.c_proj"),
    ),
    "another base": ("merge --adapter {other} --base {base} --output {out}", ("made for base x", "sha256:1")),
    "no adapter": ("merge --adapter {base} --output {out}", ("adapter_config.json: no such file",)),
    "an adapter as base": (
        "merge --adapter {good} --base {good} --output {out}",
        ("an adapter, not a base",),
    ),
    "onto the base": ("merge --adapter {good} --output {base}", ("it lies in the base",)),
    "into the base": ("merge --adapter {good} --output {base}/inside", ("it lies in the base",)),
    "onto the adapter": ("merge --adapter {good} --output {good}", ("it exists already",)),
    "below a file": (
        "merge --adapter {good} --output {base}/../good/onebase.json/x --no-check",
        ("cannot write",),
    ),
    "combine onto its input": ("combine {good},{good} --output {good}", ("exists already",)),
    "combine other bases": ("combine {good},{other} --output {out}", ("different bases", "sha256:1")),
    "combine other shapes": (
        "combine {good},{narrow} --output {out}",
        ("do not fit one another", "(32, 32, 'linear')", "(16, 16, 'linear')"),
    ),
    "DoRA combined as plain": (
        "combine {good},{dora} --output {out}",
        ("DoRA", "onebase export --to portable"),
    ),
    "DoRA negated": ("combine {dora} --negate --output {out}", ("DoRA", "onebase export --to portable")),
    "density 0": ("combine {good} --method ties --density 0 --output {out}", ("density=0.0", "(0, 1]")),
    "density 2": ("combine {good} --method ties --density 2 --output {out}", ("density=2.0", "(0, 1]")),
    "density nan": ("combine {good} --method ties --density nan --output {out}", ("density=nan", "finite")),
    "a rank too large": ("combine {good} --method svd --rank 3 --output {out}", ("rank=3", "above 2")),
    "a rank beyond any": ("combine {good} --method ties_svd --rank 99999999 --output {out}", ("above 32",)),
    "weights beyond floats": ("combine {good} --weights=1e999 --output {out}", ("finite",)),
    "weights that overflow": ("combine {good} --weights=1e300 --output {out}", ("not finite",)),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(case: str, stage: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    refused(capsys, stage, *CASES[case])


CONFIGS = {
    "nonsense": ({"__reduce__": ["os.system", "true"]}, "__reduce__"),
    "an enormous rank": ({"r": 10**9}, "rank=1000000000"),
    "a rank beyond floats": ({"r": 10**400}, "rank"),
    "another rank": ({"r": 3}, "rank 3"),
    "alpha 0": ({"lora_alpha": 0}, "alpha"),
    "alpha beyond float32": ({"lora_alpha": 1e300}, "is infinite in float32"),
    "a text for a number": ({"lora_alpha": "4"}, "lora_alpha='4'"),
    "a list for a number": ({"r": [2]}, "r=[2]"),
    "a pattern that never ends": ({"rank_pattern": {"(.|.)+[XYZ]": 2}}, "more than"),
    "half a surrogate pair": ({"base_model_name_or_path": "\ud800"}, "surrogates"),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize(
    "command", ["merge --adapter {good} --base {base} --output {out}", "combine {good} --output {out}"]
)
def test_a_config_that_means_harm(case: str, command: str, stage: dict[str, Path], capsys, monkeypatch):
    monkeypatch.setattr("onebase.adapters.patterns.SECONDS", 0.1)
    changes, told = CONFIGS[case]
    path = stage["good"] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(capsys, stage, command, (told,))


def test_an_alpha_below_zero_is_a_scale_below_zero(stage: dict[str, Path]):
    path = stage["good"] / "adapter_config.json"
    before = read_adapter(stage["good"])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": -32}))
    after = read_adapter(stage["good"])
    assert all(after.lowrank[name].scale == -low.scale for name, low in before.lowrank.items())


@pytest.mark.parametrize(
    "command", ["merge --adapter {good} --output {out} --no-check", "combine {good},{good} --output {out}"]
)
def test_a_disk_that_is_full(command: str, stage: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    """Writing stops at a limit, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        refused(capsys, stage, command, ("cannot write", os.strerror(27)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert main(command.format(**stage).split()) == 0
