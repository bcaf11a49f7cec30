"""Adapter folders, whole and broken: what reads comes back bit for bit, what does not is refused by name."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapters import trained
from onebase.adapters.adapter import Adapter
from onebase.config import LoraConfig
from onebase.errors import BaseMismatch, FormatError, MissingFile, OnebaseError, OutputError, OutputExists
from onebase.files import write_text
from onebase.models.base import wrap_base
from onebase.storage.format import CONFIG, SIDECAR, TENSORS, load_adapter, read_adapter, save_adapter
from tiny import tiny

Q = "model.layers.0.self_attn.q_proj"
PREFIX = f"base_model.model.{Q}"


def small_adapter() -> Adapter:
    return trained(tiny("llama"), LoraConfig(rank=2, target_modules=["q_proj"], layers="0"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(small_adapter(), tmp_path / "adapter")


def edit_config(folder: Path, **values: object) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | values))


def edit_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of q_proj by side (A, B), or leave them out (None)."""
    stored = load_file(folder / TENSORS)
    for side, tensor in tensors.items():
        name = f"{PREFIX}.lora_{side}.weight"
        stored.pop(name)
        if tensor is not None:
            stored[name] = tensor
    save_file(stored, folder / TENSORS)
    (folder / SIDECAR).unlink(missing_ok=True)


def test_a_saved_adapter_comes_back_bit_for_bit(folder: Path):
    adapter, back = small_adapter(), read_adapter(folder)
    assert back.lowrank.keys() == adapter.lowrank.keys() == {Q}
    assert torch.equal(back.lowrank[Q].A, adapter.lowrank[Q].A)
    assert torch.equal(back.lowrank[Q].B, adapter.lowrank[Q].B)
    assert back.lowrank[Q].scale == 32 / 2


def test_tensors_that_share_memory_or_are_views_are_saved(tmp_path: Path):
    adapter = small_adapter()
    low = adapter.lowrank[Q]._replace(B=adapter.lowrank[Q].B.T.contiguous().T)
    both = {Q: low, Q.replace("layers.0", "layers.1"): low}
    back = read_adapter(save_adapter(Adapter(adapter.config, both), tmp_path / "shared"))
    assert [torch.equal(item.B, low.B) for item in back.lowrank.values()] == [True, True]


def test_saving_does_not_overwrite_in_silence(folder: Path):
    before = (folder / TENSORS).read_bytes()
    with pytest.raises(OutputExists, match="exists already"):
        save_adapter(small_adapter(), folder)
    assert (folder / TENSORS).read_bytes() == before
    save_adapter(small_adapter(), folder, overwrite=True)


def test_saving_below_a_file_is_an_output_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        save_adapter(small_adapter(), tmp_path / "file" / "adapter")
    with pytest.raises(OutputError, match="cannot write"):
        write_text(tmp_path / "file" / "x.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_such_folder_gives_the_nearest(folder: Path):
    with pytest.raises(MissingFile, match=r"adaptor: no such folder\n.*adapter"):
        read_adapter(folder.with_name("adaptor"))


def test_a_file_is_no_adapter_folder(folder: Path):
    with pytest.raises(MissingFile, match="no such folder"):
        read_adapter(folder / CONFIG)


def test_a_missing_config_says_what_is_there(folder: Path):
    (folder / CONFIG).unlink()
    with pytest.raises(MissingFile, match=rf"no such file; the folder holds {TENSORS}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_qalora", True),
        ("bias", "some"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 2]]),
        ("peft_type", "IA3"),
        ("use_something_new", True),
    ],
)
def test_a_setting_that_changes_the_arithmetic_is_refused_by_name(folder: Path, key: str, value: object):
    edit_config(folder, **{key: value})
    with pytest.raises(FormatError, match=f"{key}={value!r}".replace("[", r"\[")):
        read_adapter(folder)


def test_all_refused_settings_are_named_at_once(folder: Path):
    edit_config(folder, use_qalora=True, init_lora_weights="pissa")
    with pytest.raises(FormatError, match="use_qalora=True") as caught:
        read_adapter(folder)
    assert "init_lora_weights='pissa'" in str(caught.value)
    assert "path_initial_model_for_weight_conversion" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "8"),
        ("r", 2.0),
        ("r", True),
        ("r", None),
        ("r", -2),
        ("r", 0),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 10**400),
        ("lora_dropout", "none"),
        ("lora_dropout", 1.5),
        ("target_modules", 5),
        ("target_modules", ["q_proj", 5]),
        ("target_modules", "("),
        ("exclude_modules", {"a": 1}),
        ("exclude_modules", "("),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", 3),
        ("layers_to_transform", "0"),
        ("layers_pattern", 7),
        ("rank_pattern", {"q_proj": "2"}),
        ("rank_pattern", {"(": 2}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": -1}),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("use_rslora", "false"),
        ("fan_in_fan_out", "no"),
        ("base_model_name_or_path", 3),
        ("base_model_name_or_path", ["a"]),
        ("task_type", {}),
    ],
)
def test_a_setting_of_the_wrong_type_or_range_is_a_format_error(folder: Path, key: str, value: object):
    edit_config(folder, **{key: value})
    with pytest.raises(FormatError, match=CONFIG):
        read_adapter(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "[" * 100_000, "\ufeff{}"], ids=lambda text: text[:4]
)
def test_a_config_that_is_no_object_is_a_format_error(folder: Path, text: str):
    (folder / CONFIG).write_text(text)
    with pytest.raises(FormatError, match=CONFIG):
        read_adapter(folder)


def test_a_config_that_is_not_utf8_is_a_format_error(folder: Path):
    (folder / CONFIG).write_bytes(b'{"r": "\xff"}')
    with pytest.raises(FormatError, match="not JSON"):
        read_adapter(folder)


@pytest.mark.parametrize("field", ["base", "prompt", "training"])
def test_a_broken_sidecar_is_a_format_error(folder: Path, field: str):
    sidecar = json.loads((folder / SIDECAR).read_text())
    (folder / SIDECAR).write_text(json.dumps(sidecar | {field: 3}))
    with pytest.raises(FormatError, match=f"{SIDECAR}.*{field}"):
        read_adapter(folder)


def test_a_sidecar_of_another_adapter_is_noticed(folder: Path):
    sidecar = json.loads((folder / SIDECAR).read_text())
    sidecar["base"]["fingerprint"] = "sha256:other"
    (folder / SIDECAR).write_text(json.dumps(sidecar))
    with pytest.raises(FormatError, match="different adapters"):
        read_adapter(folder)


def test_a_truncated_file_is_refused(folder: Path):
    whole = (folder / TENSORS).read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / TENSORS).write_bytes(whole[:size])
        with pytest.raises(FormatError, match=rf"broken or cut short \({size} bytes\)"):
            read_adapter(folder)


def test_a_pickle_is_never_loaded(folder: Path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was loaded",))

    torch_zip = io.BytesIO()
    torch.save({"x": torch.ones(1)}, torch_zip)
    for content in (pickle.dumps(Bomb()), pickle.dumps(Bomb(), protocol=2), torch_zip.getvalue()):
        (folder / TENSORS).write_bytes(content)
        with pytest.raises(FormatError, match="a pickle under a safetensors name"):
            read_adapter(folder)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"only adapter_model\.bin, a pickle"):
        read_adapter(folder)


@pytest.mark.parametrize("size", [0x0280, 0x0480, 0x4B50], ids=hex)
def test_a_header_whose_length_looks_like_a_pickle_is_read(folder: Path, size: int):
    """The first bytes of a safetensors file are its header's length: 640 is what a pickle starts with."""
    whole = (folder / TENSORS).read_bytes()
    old = struct.unpack("<Q", whole[:8])[0]
    header = whole[8 : 8 + old].decode().ljust(size)
    assert len(header) == size, "the header fits"
    (folder / TENSORS).write_bytes(struct.pack("<Q", size) + header.encode() + whole[8 + old :])
    assert torch.equal(read_adapter(folder).lowrank[Q].A, small_adapter().lowrank[Q].A)


def with_header(folder: Path, header: bytes, data: bytes = b"") -> Path:
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' * 50_000,
        b"{" + b" " * 2_000_000,
        b'{"x": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b"[]",
        b"\xff\xff",
    ],
    ids=["deep", "huge", "overflow", "negative", "dtype", "offsets", "list", "binary"],
)
def test_a_mad_header_is_a_format_error(folder: Path, header: bytes):
    with pytest.raises(FormatError, match=TENSORS):
        read_adapter(with_header(folder, header, b"\0\0\0\0"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_with_the_tensor_named(folder: Path, value: float):
    b = torch.ones(32, 2)
    b[3, 1] = value
    edit_tensors(folder, B=b)
    with pytest.raises(FormatError, match=r"q_proj\.lora_B\.weight: holds NaN or infinity"):
        read_adapter(folder)
    edit_tensors(folder, B=torch.full((32, 2), 3e38))  # finite, and its sum is not
    read_adapter(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float64])
def test_types_that_float32_does_not_hold_exactly_are_refused(folder: Path, dtype: torch.dtype):
    edit_tensors(folder, A=torch.ones(2, 32, dtype=dtype))
    with pytest.raises(FormatError, match=r"lora_A\.weight: dtype"):
        read_adapter(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrower_floats_are_widened(folder: Path, dtype: torch.dtype):
    edit_tensors(folder, A=torch.full((2, 32), 0.375).to(dtype))
    a = read_adapter(folder).lowrank[Q].A
    assert a.dtype == torch.float32
    assert torch.equal(a, torch.full((2, 32), 0.375))


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"B": None}, "q_proj: lora_B is missing"),
        ({"A": None}, "q_proj: lora_A is missing"),
        ({"A": torch.ones(3, 32)}, r"A \(3, 32\), B \(32, 2\), but the config says rank 2"),
        ({"A": torch.ones(2)}, r"A \(2,\)"),
        ({"A": None, "B": None}, "no adapter tensor at all"),
    ],
)
def test_factors_that_do_not_belong_together(folder: Path, tensors: dict, told: str):
    edit_tensors(folder, **tensors)
    with pytest.raises(FormatError, match=told):
        read_adapter(folder)


def test_every_problem_is_listed_at_once(folder: Path):
    stored = load_file(folder / TENSORS)
    extra = "base_model.model.model.layers.1.self_attn"
    stored |= {"stray": torch.ones(1), f"{extra}.k_proj.lora_A.weight": torch.full((2, 32), torch.nan)}
    stored |= {
        f"{extra}.v_proj.lora_A.weight": torch.ones(5, 32),
        f"{extra}.v_proj.lora_B.weight": torch.ones(16, 5),
    }
    save_file(stored, folder / TENSORS)
    (folder / SIDECAR).unlink()
    with pytest.raises(FormatError) as caught:
        read_adapter(folder)
    told = ["stray: unexpected name", "k_proj: lora_B is missing", "holds NaN", "v_proj: A (5, 32)"]
    assert [part for part in told if part not in str(caught.value)] == []


def test_a_base_that_the_adapter_does_not_fit_lists_every_problem(folder: Path, tmp_path: Path):
    model = tiny("llama")
    wide = trained(model, LoraConfig(rank=2, target_modules=["q_proj"]))
    low = {path: item for path, item in wide.lowrank.items() if ".0." in path}
    low["model.layers.7.self_attn.q_proj"] = low[Q]
    low["model.layers.0.mlp.up_proj"] = low[Q]
    mixed = save_adapter(Adapter(wide.config, low, {}, wide.origin), tmp_path / "mixed")
    with pytest.raises(BaseMismatch) as caught:
        load_adapter(mixed, wrap_base(model))
    text = str(caught.value)
    assert "model.layers.1.self_attn.q_proj: missing" in text
    assert "model.layers.7.self_attn.q_proj: the base has no such module" in text
    assert "model.layers.0.mlp.up_proj: the base's weight is 48 x 32, the adapter's 32 x 32" in text
    assert "model.layers.0.mlp.up_proj: unexpected" in text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from(
    "r lora_alpha lora_dropout target_modules exclude_modules modules_to_save layers_to_transform layers_pattern "
    "rank_pattern alpha_pattern use_rslora fan_in_fan_out base_model_name_or_path task_type init_lora_weights "
    "bias use_dora lora_bias target_parameters peft_type unheard_of".split()
)


@cache
def whole_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        folder = save_adapter(small_adapter(), Path(place) / "adapter")
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def fresh_folder() -> Generator[Path]:
    """A whole adapter folder for one example of hypothesis."""
    with tempfile.TemporaryDirectory() as place:
        for name, content in whole_files().items():
            (Path(place) / name).write_bytes(content)
        yield Path(place)


def outcome(folder: Path) -> None:
    """Reading gives an adapter, or an error that says what is wrong; anything else is raised on."""
    try:
        adapter = read_adapter(folder)
        assert all(low.A.isfinite().all() and low.B.isfinite().all() for low in adapter.lowrank.values())
        load_adapter(folder, BASE)
    except OnebaseError:
        pass


BASE = wrap_base(tiny("llama"))


@settings(max_examples=150)
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
def test_any_config_is_read_or_refused(values: dict):
    with fresh_folder() as folder:
        edit_config(folder, **values)
        outcome(folder)


@settings(max_examples=150)
@given(st.data())
def test_any_flipped_bit_or_cut_in_the_tensors_is_read_or_refused(data: st.DataObject):
    with fresh_folder() as folder:
        content = bytearray((folder / TENSORS).read_bytes())
        header = 8 + struct.unpack("<Q", content[:8])[0]
        for bit in data.draw(st.lists(st.integers(0, 8 * header - 1), max_size=3)):
            content[bit // 8] ^= 1 << bit % 8
        size = data.draw(st.just(len(content)) | st.integers(0, len(content)))
        (folder / TENSORS).write_bytes(content[:size])
        outcome(folder)
