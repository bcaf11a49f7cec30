"""The readers on broken files: an adapter or a OnebaseError, never another error. The corpus keeps what broke them.

A file of tests/corpus that is named after a kind of damage is read as it stands; hypothesis damages valid files.
"""

from __future__ import annotations

import contextlib
import json
import resource
import struct
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from onebase.adapters.adapter import Adapter
from onebase.config import Recipe
from onebase.errors import OnebaseError
from onebase.storage.format import CONFIG, TENSORS, read_adapter, save_adapter
from onebase.storage.shards import DTYPES, SINGLE, TensorInfo, list_tensors, read_tensor
from onebase.transforms.arithmetic import combine

pytestmark = pytest.mark.slow

CORPUS = Path(__file__).parents[2] / "corpus"
HEALTHY = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
FACTORS = {
    "base_model.model.q.lora_A.weight": torch.arange(8.0).view(2, 4),
    "base_model.model.q.lora_B.weight": torch.arange(6.0).view(3, 2),
}
READ = {
    "alpha_below_zero",
    "zero_byte_in_a_name",
    "layers_beyond_numbers",
}  # odd, and clear in what they mean
READ |= {
    "pattern_that_backtracks",
    "target_pattern_that_backtracks",
}  # these match nothing, and that is found


def folder_with(place: Path, config: bytes | None = None, tensors: bytes | None = None) -> Path:
    """An adapter folder that is healthy but for what is given."""
    place.mkdir(exist_ok=True)
    (place / CONFIG).write_bytes(json.dumps(HEALTHY).encode() if config is None else config)
    (place / TENSORS).write_bytes(save(FACTORS) if tensors is None else tensors)
    return place


def read_or_refused(folder: Path) -> Adapter | None:
    """The adapter, None where it is refused; whatever is read can be combined, printed and saved."""
    refusal = ""
    try:
        adapter = read_adapter(folder)
    except OnebaseError as error:
        adapter, refusal = None, str(error)
    assert len(refusal.encode()) < 100_000
    if adapter is None:
        return None
    assert all(
        tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in adapter.tensors().values()
    )
    return adapter


@pytest.mark.parametrize("file", sorted((CORPUS / "configs").iterdir()), ids=lambda path: path.stem)
def test_configs_that_broke_something(file: Path, tmp_path: Path):
    adapter = read_or_refused(folder_with(tmp_path / "a", config=file.read_bytes()))
    assert (adapter is not None) == (file.stem in READ)
    if adapter is not None:
        again = save_adapter(combine([adapter], [1.0], Recipe()), tmp_path / "again")
        assert read_adapter(again).lowrank["q"].scale == 1.0


@pytest.mark.parametrize("file", sorted((CORPUS / "tensors").iterdir()), ids=lambda path: path.stem)
def test_tensor_files_that_broke_something(file: Path, tmp_path: Path):
    assert read_or_refused(folder_with(tmp_path / "a", tensors=file.read_bytes())) is None
    try:
        infos = list_tensors(file)
    except OnebaseError:
        return
    assert file.stem in ("exponents_only", "complex", "shape_with_zero_and_huge", "empty_header")
    assert all(isinstance(info, TensorInfo) for info in infos)


NUMBERS = st.one_of(
    st.integers(-2, 40), st.sampled_from([1 << 31, 1 << 62, 1 << 64, 10**30]), st.floats(), st.booleans()
)
VALUES = st.recursive(
    st.one_of(
        st.none(), NUMBERS, st.text(max_size=5), st.sampled_from(["F32", "F16", "q", "(a+)+", "re:.*"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = (
    *(
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "rank_pattern",
    ),
    *(
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "target_parameters",
        "trainable_token_indices",
    ),
    *(
        "base_model_name_or_path",
        "task_type",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "bias",
        "fan_in_fan_out",
    ),
    *("init_lora_weights", "peft_type", "__reduce__"),
)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_value_of_any_setting(tmp_path_factory, changes: dict[str, object]):
    place = tmp_path_factory.mktemp("fuzz") / "a"
    read_or_refused(folder_with(place, config=json.dumps(HEALTHY | changes).encode("utf-8", "surrogatepass")))


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "F6_E2M3", "F8_E8M0", "Q4", ""]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), st.tuples(st.just(0), st.integers(0, 64))),
    }
)
NAMES = st.one_of(st.sampled_from([*FACTORS, "__metadata__", "x"]), st.text(max_size=4))


@settings(max_examples=150)
@given(st.dictionaries(NAMES, st.one_of(ENTRIES, VALUES), max_size=3), st.integers(0, 80), st.integers(-2, 2))
def test_any_header(tmp_path_factory, header: dict[str, object], size: int, lie: int):
    place = tmp_path_factory.mktemp("fuzz")
    text = json.dumps(header).encode()
    raw = struct.pack("<Q", max(0, len(text) + lie)) + text + bytes(size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_or_refused(folder_with(place / "a", tensors=raw))
        (place / SINGLE).write_bytes(raw)
        try:
            infos = list_tensors(place)
        except OnebaseError:
            return
        assert sum(read_tensor(info).nbytes for info in infos) <= size


@settings(max_examples=150)
@given(st.data())
def test_any_bytes_put_into_a_valid_file(tmp_path_factory, data):
    place, valid = tmp_path_factory.mktemp("fuzz"), save(FACTORS)
    at = data.draw(st.integers(0, len(valid)))
    gone = data.draw(st.integers(0, 8))
    raw = valid[:at] + data.draw(st.binary(max_size=8)) + valid[at + gone :]
    read_or_refused(folder_with(place / "a", tensors=raw))
    (place / SINGLE).write_bytes(raw)
    with contextlib.suppress(OnebaseError):
        assert len(list_tensors(place)) <= len(FACTORS)


def test_memory_stays_small_on_headers_that_promise_much(tmp_path: Path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shape in ([1 << 40], [1 << 20, 1 << 20], [10**9, 2]):
        wanted = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0]]}
        text = json.dumps(dict.fromkeys(FACTORS, wanted)).encode()
        assert (
            read_or_refused(folder_with(tmp_path / "a", tensors=struct.pack("<Q", len(text)) + text)) is None
        )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_ten_million_bytes_of_names(tmp_path: Path):
    many = {"target_modules": [f"module{n}" for n in range(300_000)] + ["q"]}
    assert (
        read_or_refused(folder_with(tmp_path / "a", config=json.dumps(HEALTHY | many).encode())) is not None
    )
    long = {"k" * 10_000_000: 1}
    assert read_or_refused(folder_with(tmp_path / "b", config=json.dumps(HEALTHY | long).encode())) is None


def test_thousands_of_updates_each_with_a_key_of_its_own(tmp_path: Path):
    paths = [f"layers.{n // 8}.experts.{n % 8}.q" for n in range(3000)]
    tensors = {name.replace(".q.", f".{path}."): t for path in paths for name, t in FACTORS.items()}
    keys = {"rank_pattern": dict.fromkeys(paths, 2), "alpha_pattern": {f"^{p}": 6 for p in paths[:100]}}
    raw = save({name: tensor.clone() for name, tensor in tensors.items()})
    adapter = read_or_refused(
        folder_with(tmp_path / "a", json.dumps(HEALTHY | keys | {"r": 9}).encode(), raw)
    )
    assert adapter is not None
    assert [adapter.lowrank[path].scale for path in paths[99:101]] == [3.0, 2.0]
