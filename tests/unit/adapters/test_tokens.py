"""Trained token rows under the laws: alone, beside updates of the same embedding, and for tokens the base lacks."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapters import trained
from onebase.adapters.adapter import TokenRows
from onebase.adapters.injection import (
    base_tensors,
    eject,
    extract,
    inject,
    injected,
    new_adapter,
    trainable,
    use,
)
from onebase.adapters.kinds import merged_weight
from onebase.adapters.layers import LoraLayer, TrainedModule
from onebase.adapters.tokens import TokenLayer, TokenSlot
from onebase.config import LoraConfig, Recipe
from onebase.errors import BaseMismatch, ConfigError, TargetError
from onebase.models.base import wrap_base
from onebase.storage.format import load_adapter, read_adapter, save_adapter
from onebase.storage.peft_tokens import INDICES, index_problems, missing_rows, named_ids, take_rows
from onebase.transforms.arithmetic import combine, compress, negate
from tiny import output, some_ids, tiny

ARCHS = ("llama", "llama-tied", "gpt2", "gemma3", "qwen3")  # llama and qwen3 have a head of their own
KNOWN, NEW = ["id:40", "id:3"], ["id:96", "id:97"]
EMBEDDING = {"gpt2": "wte"}


def config(arch="llama", tokens=(*KNOWN, *NEW), targets=("q_proj",), **options):
    names = ["c_attn" if arch == "gpt2" and name == "q_proj" else name for name in targets]
    return LoraConfig(rank=2, alpha=6, target_modules=names, trainable_tokens=list(tokens), **options)


def some_tokens(rows=3):
    """Ids with both known tokens, and in the first row the new ones too."""
    ids = some_ids(rows)
    ids[:, 2], ids[:, 5] = 40, 3
    with_new = ids.clone()
    with_new[0, 3], with_new[0, 7] = 96, 97
    return ids, with_new


def by_hand(model, adapter):
    """A copy of the model whose own weights are what the adapter says."""
    twin = copy.deepcopy(model)
    embedding, head = twin.get_input_embeddings(), twin.lm_head
    tied = head.weight is embedding.weight
    for path, low in adapter.lowrank.items():
        module = twin.get_submodule(path)
        module.weight = nn.Parameter(merged_weight(module.weight.data, low).contiguous(), False)
    for path, tokens in adapter.tokens.items():
        for module in [twin.get_submodule(path), *([head] if tied else [])]:
            weight = torch.cat([module.weight.data, torch.zeros(2, module.weight.shape[1])])
            weight[list(tokens.ids)] = tokens.rows
            module.weight = nn.Parameter(weight[: max(96, max(tokens.ids) + 1)], False)
    return twin


@pytest.mark.parametrize("tokens", [KNOWN, NEW, KNOWN + NEW])
@pytest.mark.parametrize("arch", ARCHS)
def test_law_1_output_is_that_of_a_base_with_these_rows(arch, tokens):
    model = tiny(arch)
    adapter = trained(model, config(arch, tokens))
    ids = some_tokens()[NEW[0] in tokens]
    wanted = output(by_hand(model, adapter), ids)
    with injected(model, adapter):
        got = output(model, ids)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    if tokens == KNOWN:
        plain = replace(adapter, tokens={})
        with injected(model, plain):
            assert (output(model, ids) - got).abs().max() > 1e-2


@pytest.mark.parametrize("targets", [["q_proj"], []])
@pytest.mark.parametrize("arch", ARCHS)
def test_laws_2_3_5(arch, targets, tmp_path):
    model, (ids, _) = tiny(arch), some_tokens()
    before, weights = output(model, ids), {n: t.clone() for n, t in base_tensors(model)}
    modules = dict(model.named_modules())
    fresh = new_adapter(model, config(arch, targets=targets))
    with injected(model, fresh):
        assert torch.equal(output(model, ids)[..., :96], before)  # law 3, to the bit
    adapter = trained(model, config(arch, targets=targets))
    assert adapter != replace(adapter, tokens=fresh.tokens)
    assert (
        adapter.parameters
        == sum(t.numel() for low in adapter.lowrank.values() for t in (low.A, low.B))
        + len(adapter.tokens) * 4 * 32
    )
    save_adapter(adapter, tmp_path / "a")
    assert load_adapter(tmp_path / "a", wrap_base(model)) == adapter == read_adapter(tmp_path / "a")  # law 2
    inject(model, adapter, "a.b")
    assert extract(model, "a.b") == adapter
    with use(model, None):
        assert torch.equal(output(model, ids), before)
    assert dict(base_tensors(model)).keys() == weights.keys()
    assert all(torch.equal(t, weights[n]) for n, t in base_tensors(model))
    eject(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(output(model, ids), before)


@pytest.mark.parametrize("arch", ARCHS)
def test_only_the_rows_learn(arch):
    model, (_, ids) = tiny(arch), some_tokens()
    adapter = new_adapter(model, config(arch, targets=[]))
    before = {name: tensor.clone() for name, tensor in base_tensors(model)}
    inject(model, adapter, "a")
    parameters = trainable(model, "a")
    assert [*parameters] == sorted(f"{path}.rows" for path in adapter.tokens)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with use(model, "a"):
        model(input_ids=ids).logits.log_softmax(-1)[..., 3].sum().backward()
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    after = extract(model, "a")
    assert all((after.tokens[p].rows != t.rows).any(1).all() for p, t in adapter.tokens.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model))
    assert all(p.grad is None for name, p in model.named_parameters() if ".slots." not in name)


@pytest.mark.parametrize("arch", ARCHS)
def test_law_6_each_row_of_a_batch_gets_its_own_rows(arch):
    model, (_, ids) = tiny(arch), some_tokens(5)
    adapters = {
        "two": trained(model, config(arch), 1),
        "one": trained(model, config(arch, [*KNOWN, "id:7", "id:96"]), 2),
        "none": trained(model, config(arch, []), 3),
    }
    for name, adapter in adapters.items():
        inject(model, adapter, name)
    ids[3, 4] = 96
    names = ["two", None, "none", "one", "one"]
    with use(model, names):
        mixed = output(model, ids)
    assert mixed.shape[-1] == 98
    widths = {"two": 98, "one": 97}
    for row, name in enumerate(names):
        with use(model, name):
            alone = output(model, ids[row : row + 1])[0]
        width = widths.get(name, 96)
        assert alone.shape[-1] == width
        torch.testing.assert_close(mixed[row, :, :width], alone, rtol=1e-4, atol=1e-5)
        assert torch.all(mixed[row, :, width:] == float("-inf"))
    assert torch.isfinite(mixed.log_softmax(-1)[..., :96]).all()


def test_rows_stand_over_an_update_of_the_same_embedding():
    """PEFT refuses the two together. Here a named token has its row, every other the updated embedding."""
    model, (ids, with_new) = tiny("llama"), some_tokens()
    adapter = trained(model, config(targets=["embed_tokens", "q_proj"]))
    with injected(model, adapter):
        got = output(model, with_new)
    torch.testing.assert_close(got, output(by_hand(model, adapter), with_new), rtol=1e-4, atol=1e-4)
    other = replace(adapter, tokens={})
    with injected(model, other):
        assert (output(model, ids) - got[..., :96]).abs().max() > 1e-2


@pytest.mark.parametrize("order", list(itertools.permutations(["rows", "update", "full"])))
def test_every_order_of_injection_gives_the_same(order):
    """Rows of one adapter, an update of another and a full copy of a third, all of the same head and embedding."""
    model, (_, ids) = tiny("llama"), some_tokens(4)
    adapters = {
        "rows": trained(model, config(), 1),
        "update": trained(model, config(tokens=[], targets=["lm_head", "embed_tokens"]), 2),
        "full": trained(model, config(tokens=[], modules_to_save=["lm_head", "embed_tokens"]), 3),
    }
    alone = {}
    for name, adapter in adapters.items():
        with injected(model, adapter):
            alone[name] = output(model, ids if name == "rows" else ids.clamp(max=95))
    ids[1:] = ids[1:].clamp(max=95)
    for name in order:
        inject(model, adapters[name], name)
    head = model.lm_head
    assert [type(head), type(head.base), type(head.base.base)] == [TokenLayer, TrainedModule, LoraLayer]
    names = ["rows", "update", "full", None]
    with use(model, names):
        mixed = output(model, ids)
    for row, name in enumerate(names[:3]):
        wanted = alone[name][row]
        torch.testing.assert_close(mixed[row, :, : wanted.shape[-1]], wanted, rtol=1e-4, atol=1e-4)
    for name in order:
        eject(model, [name])
    assert type(model.lm_head) is nn.Linear


def test_bfloat16_rows_keep_their_precision_until_the_output():
    model, (ids, _) = tiny("llama-tied").to(torch.bfloat16), some_tokens()
    before = output(model, ids)
    adapter = new_adapter(model, config("llama-tied", KNOWN))
    with injected(model, adapter):
        assert torch.equal(output(model, ids), before)
    assert adapter.tokens["model.embed_tokens"].rows.dtype == torch.float32
    embedding = TokenLayer(model.get_input_embeddings())
    embedding.add("a", TokenSlot("x", TokenRows((3,), torch.full((1, 32), 1.001))))
    with use(inject(model, adapter, "a"), "a"):
        assert torch.equal(embedding(torch.tensor([[3]])), torch.full((1, 1, 32), 1.001).bfloat16())


def test_new_rows_start_from_the_mean_and_the_others_from_their_own():
    model = tiny("llama")
    adapter = new_adapter(model, config())
    for path, tokens in adapter.tokens.items():
        weight = model.get_submodule(path).weight
        assert tokens.ids == (3, 40, 96, 97)
        assert torch.equal(tokens.rows[:2], weight[[3, 40]])
        assert torch.equal(tokens.rows[2:], weight.mean(0).expand(2, -1))
    assert adapter.config.trainable_tokens == ("id:3", "id:40", "id:96", "id:97")


def rows_of(model, *ids, width=32):
    return TokenRows(ids, torch.zeros(len(ids), width))


MISFITS = {
    "no such module": {"model.embed": rows_of(None, 3)},
    "which has no token rows": {"model.norm": rows_of(None, 3)},
    "the base's are 32 wide": {"model.embed_tokens": rows_of(None, 3, width=31)},
    "each must be there once": {"model.embed_tokens": rows_of(None, 3, 3)},
    "none negative": {"model.embed_tokens": rows_of(None, 3, -1)},
    "new ones must follow without a gap": {"model.embed_tokens": rows_of(None, 97)},
    "lm_head: has trained token rows and is trained in full": {"lm_head": rows_of(None, 3)},
    "lm_head: predicts tokens": {"lm_head": rows_of(None, 96)},
}


@pytest.mark.parametrize("found", MISFITS)
def test_rows_that_do_not_fit_are_refused_whole(found):
    model = tiny("llama")
    full = ["lm_head"] if "in full" in found else []
    adapter = replace(trained(model, config(tokens=[], modules_to_save=full)), tokens=MISFITS[found])
    with pytest.raises(BaseMismatch, match=found):
        inject(model, adapter)
    assert not any(isinstance(module, TokenLayer | LoraLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"targets": ["lm_head"]}),
        ("llama-tied", {"targets": ["lm_head"]}),
        ("llama-tied", {"modules_to_save": ["lm_head"]}),
        ("llama", {"modules_to_save": ["embed_tokens"]}),
    ],
)
def test_rows_beside_what_overlaps_with_them_are_refused(arch, options):
    model = tiny(arch)
    with pytest.raises(BaseMismatch, match="has trained token rows and"):
        inject(model, new_adapter(model, config(**options)))


@pytest.mark.parametrize("names", [["<tool>"], ["id:"], ["id:-1"], ["id:3x"]])
def test_texts_need_a_tokenizer(names):
    with pytest.raises(TargetError, match="id:N"):
        new_adapter(tiny("llama"), config(tokens=names))


def test_a_model_without_an_input_embedding_has_no_token_rows():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TargetError, match="names no input embedding"):
        new_adapter(model, LoraConfig(rank=1, target_modules=["0"], trainable_tokens=["id:1"]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
)
NAMES = st.sampled_from(["", "wte", "model.wte", "lm_head"])


@given(
    JSON | st.lists(st.integers(), max_size=4) | st.dictionaries(NAMES, st.lists(st.integers(), max_size=4)),
    st.dictionaries(NAMES, st.integers(0, 4)),
)
def test_any_setting_is_read_or_refused(setting, sizes):
    """Rows come out only where the setting names them, with as many ids."""
    raw = {INDICES: setting}
    tensors = {
        f"base_model.model.{n}.token_adapter.trainable_tokens_delta": torch.zeros(k, 2)
        for n, k in sizes.items()
    }
    if index_problems(raw):
        return
    found = take_rows(tensors | {"other": torch.zeros(1)}, raw)
    assert found.others.keys() == {"other"}
    assert all(len(tokens.ids) == len(tokens.rows) == sizes[path] for path, tokens in found.tokens.items())
    assert len(found.tokens) == len(sizes) or found.problems
    assert {token for tokens in found.tokens.values() for token in tokens.ids} <= set(named_ids(raw))
    missing_rows({}, raw, found.tokens)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True),
    st.lists(st.integers(0, 60), max_size=9),
)
@settings(max_examples=100)
def test_ids_are_found_in_any_order(ids, asked):
    slot = TokenSlot("", TokenRows(tuple(ids), torch.zeros(len(ids), 2)))
    hit, place = slot.find(torch.tensor(asked, dtype=torch.int64))
    assert hit.tolist() == [token in ids for token in asked]
    assert [ids[p] for p, h in zip(place.tolist(), hit.tolist(), strict=True) if h] == [
        t for t in asked if t in ids
    ]
    assert slot.top == max(ids) + 1
    assert slot.tokens().ids == tuple(ids)


def test_rows_are_averaged_where_adapters_are_combined():
    model = tiny("llama")
    first, second = (trained(model, config(tokens=["id:10", *KNOWN, *NEW]), seed) for seed in (1, 2))
    first, second = (
        replace(one, origin=replace(one.origin, tokens={"<a>": 96, "<b>": 97})) for one in (first, second)
    )
    both = combine([first, second], [0.25, 0.75], Recipe())
    assert both.origin.tokens == {"<a>": 96, "<b>": 97}
    assert both.config.trainable_tokens == first.config.trainable_tokens
    for path, tokens in both.tokens.items():
        wanted = 0.25 * first.tokens[path].rows.double() + 0.75 * second.tokens[path].rows.double()
        assert torch.equal(tokens.rows, wanted.float())
        assert tokens.ids == first.tokens[path].ids
    small, _ = compress(first, 1)
    assert torch.equal(small.tokens["lm_head"].rows, first.tokens["lm_head"].rows)
    with pytest.raises(ConfigError, match="which needs the base"):
        combine([first, second], [1.0, 1.0], Recipe())
    with pytest.raises(ConfigError, match="token rows"):
        negate(first)
    other = trained(model, config(tokens=["id:7", *NEW]), 3)
    with pytest.raises(BaseMismatch, match="do not fit one another"):
        combine([first, other], [0.5, 0.5], Recipe())
    renamed = replace(second, origin=replace(second.origin, tokens={"<c>": 96, "<b>": 97}))
    with pytest.raises(ConfigError, match="give new tokens the same ids"):
        combine([first, renamed], [0.5, 0.5], Recipe())
