"""Adapters are values: their equality counts every bit, and their start is a function of seed and path."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import nn

from adapters import trained
from onebase.adapters.adapter import Adapter, LowRank, Origin
from onebase.adapters.kinds import Site, Target
from onebase.adapters.variants import scaling, start
from onebase.config import LoraConfig
from tiny import tiny

PATH = "model.layers.1.self_attn.q_proj"


def adapter() -> Adapter:
    config = LoraConfig(rank=2, alpha=4, target_modules="q_proj", modules_to_save="lm_head")
    return trained(tiny("llama"), config, seed=3)


def with_low(value: Adapter, **changes) -> Adapter:
    return replace(value, lowrank={**value.lowrank, PATH: value.lowrank[PATH]._replace(**changes)})


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers but for the last bit of one of them."""
    bits = tensor.clone().view(torch.int32)
    bits.view(-1)[-1] ^= 1
    return bits.view(torch.float32)


def renamed(lowrank: dict[str, LowRank]) -> dict[str, LowRank]:
    return {path.replace("layers.1", "layers.9"): low for path, low in lowrank.items()}


CHANGES = {
    "config": lambda a: replace(a, config=replace(a.config, alpha=5.0)),
    "base": lambda a: replace(a, origin=replace(a.origin, base="another")),
    "prompt": lambda a: replace(a, origin=replace(a.origin, prompt={"chat": True})),
    "last bit": lambda a: with_low(a, A=flipped(a.lowrank[PATH].A)),
    "dtype": lambda a: with_low(a, A=a.lowrank[PATH].A.double()),
    "scale": lambda a: with_low(a, scale=1.0),
    "kind": lambda a: with_low(a, kind="transposed"),
    "path": lambda a: replace(a, lowrank=renamed(a.lowrank)),
    "module": lambda a: replace(a, lowrank={p: w for p, w in a.lowrank.items() if p != PATH}),
    "full": lambda a: replace(a, full={}),
    "full's tensor": lambda a: replace(a, full={"lm_head": {"bias": a.full["lm_head"]["weight"]}}),
    "full's bit": lambda a: replace(a, full={"lm_head": {"weight": flipped(a.full["lm_head"]["weight"])}}),
}


def test_equal_values_are_equal():
    first, second = adapter(), adapter()
    assert first == second
    assert first.tensors()[f"{PATH}.A"] is not second.tensors()[f"{PATH}.A"]
    assert first == replace(first, lowrank=dict(reversed(first.lowrank.items())))  # order means nothing


@pytest.mark.parametrize("name", CHANGES)
def test_any_difference_counts(name):
    first = adapter()
    assert first != CHANGES[name](first)
    assert CHANGES[name](first) != first


def test_bits_are_compared_not_numbers():
    zero, minus, odd = (with_low(adapter(), B=torch.full((32, 2), value)) for value in (0.0, -0.0, torch.nan))
    assert torch.equal(zero.lowrank[PATH].B, minus.lowrank[PATH].B)
    assert zero != minus
    assert odd == with_low(adapter(), B=torch.full((32, 2), torch.nan))


def test_an_adapter_is_compared_only_with_adapters_and_never_hashed():
    assert adapter() != "an adapter"
    with pytest.raises(TypeError, match="unhashable"):
        hash(adapter())
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter().origin = Origin()


def test_names_and_number_of_parameters():
    value = adapter()
    assert sorted(value.tensors()) == [
        "lm_head.weight",
        *(f"model.layers.{n}.self_attn.q_proj.{side}" for n in (0, 1) for side in "AB"),
    ]
    assert value.parameters == 2 * 2 * (32 + 32) + 96 * 32
    assert value.lowrank[PATH].rank == 2


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "expected"),
    [(4, 8.0, False, 2.0), (4, 8.0, True, 4.0), (1, 3.0, True, 3.0), (16, -1.0, False, -0.0625)],
)
def test_scaling(rank, alpha, rslora, expected):
    assert scaling(rank, alpha, rslora) == expected


@pytest.mark.parametrize(
    ("kind", "init"), [("linear", "default"), ("linear", "gaussian"), ("embedding", "default")]
)
def test_the_start_has_no_effect_but_can_learn(kind, init):
    target = Target("some.path", Site("some.path", "weight", kind, (6, 5)), 3, 1.0)
    module = nn.Linear(6, 5) if kind == "linear" else nn.Embedding(6, 5)
    a, b = start(target, LoraConfig(init=init), 0, module)[:2]
    assert (a.shape, b.shape) == ((3, 6), (5, 3))
    assert a.dtype == b.dtype == torch.float32
    assert not (b @ a).any()
    assert a.any() != b.any()  # were both 0, no gradient would ever move them


def test_the_start_depends_on_seed_path_and_nothing_else():
    module = nn.Linear(6, 5)

    def draw(seed=0, path="p"):
        target = Target(path, Site(path, "weight", "linear", (6, 5)), 3, 1.0)
        return start(target, LoraConfig(), seed, module).A

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone
    torch.manual_seed(2)
    assert torch.equal(draw(), first)
    assert not torch.equal(draw(seed=1), first)
    assert not torch.equal(draw(path="q"), first)
