"""`onebase merge` from the command line: what it writes, what it reports, and how it refuses."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import trained
from onebase.adapters.adapter import Adapter, Origin
from onebase.cli.main import main
from onebase.config import LoraConfig
from onebase.models.fingerprint import fingerprint_files
from onebase.storage.format import save_adapter
from onebase.storage.shards import list_tensors
from texts import save_base, text_model


@pytest.fixture
def pair(tmp_path):
    """A base folder, and the folder of an adapter that names it."""
    base = save_base(tmp_path / "base")
    adapter = trained(text_model(), LoraConfig(rank=2, alpha=6))
    origin = Origin(base=str(base), fingerprint=fingerprint_files(base))
    return base, save_adapter(Adapter(adapter.config, adapter.lowrank, {}, origin), tmp_path / "adapter")


def words(text):
    """The text of a table without its lines."""
    return " ".join(text.replace("│", " ").split())


def run(*arguments):
    return main(["merge", *map(str, arguments)])


def test_merge_and_report(pair, tmp_path, capsys):
    _, adapter = pair
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What has Ada bought?\n\nWhat has Ben bought?\n")
    target = tmp_path / "merged"
    assert run("--adapter", adapter, "--output", target, "--dtype", "bfloat16", "--prompts", prompts) == 0
    shown = words(capsys.readouterr().out)
    assert "tensors changed 14 of 21" in shown
    assert "largest difference" in shown
    assert "rounding to the output's dtype" in shown
    assert "% of 15 tokens" in shown
    assert {info.dtype for info in list_tensors(target)} == {"BF16"}
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert str(model.dtype) == "torch.bfloat16"
    assert AutoTokenizer.from_pretrained(target).chat_template


def test_shards_without_the_comparison(pair, tmp_path, capsys):
    base, adapter = pair
    arguments = ("--adapter", adapter, "--base", base, "--shard-size", "0.00004", "--no-check")
    assert run(*arguments, "--output", tmp_path / "merged") == 0
    files = list((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(files) > 2
    shown = capsys.readouterr().out
    assert f"in {len(files)} file(s)" in words(shown)
    assert "largest difference" not in shown


def test_a_merge_that_overflows_its_dtype_is_an_error(tmp_path, capsys):
    base, model = save_base(tmp_path / "base"), text_model()
    adapter = trained(model, LoraConfig(rank=2, alpha=2e6))  # W + ΔW is beyond float16, not beyond float32
    origin = Origin(base=str(base), fingerprint=fingerprint_files(base))
    folder = save_adapter(Adapter(adapter.config, adapter.lowrank, {}, origin), tmp_path / "adapter")
    assert run("--adapter", folder, "--output", tmp_path / "wide") == 0
    assert run("--adapter", folder, "--output", tmp_path / "narrow", "--dtype", "float16") == 2
    assert "not finite numbers" in capsys.readouterr().err


def test_refusals(pair, tmp_path, capsys):
    base, adapter = pair
    (tmp_path / "empty.txt").write_text("\n")
    cases = {
        ("--output", tmp_path / "m"): "option adapter: not given",
        ("--adapter", adapter): "option output: not given",
        ("--adapter", adapter, "--output", base): "it lies in the base",
        ("--adapter", adapter, "--output", base / "m"): "it lies in the base",
        ("--adapter", adapter, "--output", adapter): "it exists already",
        (
            "--adapter",
            adapter,
            "--output",
            tmp_path / "m",
            "--dtype",
            "int8",
        ): "option dtype='int8': must be one of",
        ("--adapter", adapter, "--output", tmp_path / "m", "--shard-size", "0"): "option shard_size=0",
        ("--adapter", adapter, "--output", tmp_path / "m", "--prompts", tmp_path / "no.txt"): "no such file",
        ("--adapter", adapter, "--output", tmp_path / "m", "--prompts", tmp_path / "empty.txt"): "no prompt",
        ("--adapter", tmp_path / "adaptor", "--output", tmp_path / "m"): "nearest valid: adapter",
    }
    for arguments, message in cases.items():
        assert run(*arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "empty.txt"]


def test_another_base_is_refused_until_allowed(pair, tmp_path, capsys):
    _, adapter = pair
    other = save_base(tmp_path / "other", seed=1)
    arguments = ("--adapter", adapter, "--base", other, "--output", tmp_path / "merged", "--no-check")
    assert run(*arguments) == 2
    assert "--allow-base-mismatch to go on" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert run(*arguments, "--allow-base-mismatch") == 0
    assert "tie_word_embeddings" in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_an_adapter_that_names_no_base(pair, tmp_path, capsys):
    _, adapter = pair
    values = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    assert run("--adapter", adapter, "--output", tmp_path / "merged") == 2
    assert "give --base" in capsys.readouterr().err
