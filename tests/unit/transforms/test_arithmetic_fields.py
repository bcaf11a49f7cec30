"""Arithmetic on all that an update may hold: blocks, kernels, biases, magnitudes; and fast best fits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.adapters.adapter import Adapter, LowRank, Origin, TokenRows, block
from onebase.config import LoraConfig, Recipe
from onebase.errors import BaseMismatch, ConfigError
from onebase.ops.lowrank import update
from onebase.storage.format import read_adapter, save_adapter
from onebase.transforms.arithmetic import combine, compress, deviations, negate, norms
from onebase.transforms.combining import METHODS, Part, best_fit

PRUNED = {"density": 0.5, "seed": 3}


def recipe_of(method, **options):
    return Recipe(method, **{name: value for name, value in options.items() if name in METHODS[method].reads})


def make(seed=0, rank=2, blocks=1, **fields):
    """An adapter of one update (blocks · 5, 7)."""
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(blocks * rank, 7, generator=draw, dtype=torch.float64)
    b = torch.randn(blocks * 5, rank, generator=draw, dtype=torch.float64)
    low = {"x": LowRank(a, b, 0.5, blocks=blocks, **fields)}
    return Adapter(LoraConfig(rank=rank, target_modules=["x"]), low, origin=Origin("base"))


def only(adapter):
    return adapter.lowrank["x"]


def full(adapter):
    return update(only(adapter).factors)


def alone(adapter, number):
    """The adapter of one block."""
    return replace(adapter, lowrank={"x": block(only(adapter), number)})


@pytest.mark.parametrize("method", METHODS)
def test_experts_are_combined_one_by_one(method):
    pair, weights = [make(1, blocks=3), make(2, blocks=3)], [0.7, -0.4]
    both = combine(pair, weights, recipe_of(method, density=0.5))
    low = only(both)
    assert (low.blocks, low.A.shape[1], low.B.shape[0]) == (3, 7, 15)
    for number in range(3):
        if "seed" not in METHODS[method].reads:  # each block draws for itself
            single = combine([alone(one, number) for one in pair], weights, recipe_of(method, density=0.5))
            torch.testing.assert_close(update(block(low, number).factors), full(single))
    if method == "cat":
        torch.testing.assert_close(full(both), 0.7 * full(pair[0]) - 0.4 * full(pair[1]))
        assert low.rank == 4


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if "seed" in row.reads])
def test_each_expert_draws_for_itself(method):
    one = make(1, blocks=2)
    low = only(one)._replace(A=only(one).A[:2].repeat(2, 1), B=only(one).B[:5].repeat(2, 1))
    twin = replace(one, lowrank={"x": low})
    made = only(combine([twin], [1.0], recipe_of(method, **PRUNED)))
    assert not torch.equal(update(block(made, 0).factors), update(block(made, 1).factors))


def test_norms_and_errors_run_over_all_blocks():
    adapter = make(1, rank=3, blocks=4)
    assert norms(adapter)["x"] == pytest.approx(float(full(adapter).norm()))
    small, errors = compress(adapter, 1)
    assert only(small).rank == 1
    assert errors["x"] == pytest.approx(float((full(small) - full(adapter)).norm() / full(adapter).norm()))
    assert 0.1 < errors["x"] < 1
    assert deviations(negate(adapter), [adapter], [-1.0])["x"] < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_keeps_its_kernel(method):
    pair = [make(seed, kind="conv", kernel=(7,)) for seed in (1, 2)]
    made = only(combine(pair, [0.5, 0.5], Recipe(method)))
    assert (made.kind, made.kernel) == ("conv", (7,))
    other = make(3, kind="conv", kernel=(1, 7))
    with pytest.raises(BaseMismatch, match=r"x: .*\(7,\).*and.*\(1, 7\)|x: .*\(1, 7\).*and.*\(7,\)"):
        combine([pair[0], other], [0.5, 0.5], Recipe(method))
    with pytest.raises(BaseMismatch, match="2 blocks"):
        combine([make(1), make(2, blocks=2)], [0.5, 0.5], Recipe())


def test_biases_are_summed_with_weight_and_scale():
    first, second = make(1, bias=torch.arange(5.0)), make(2, bias=torch.ones(5))
    for method in ("cat", "svd", "linear"):
        made = combine([first, second], [2.0, -3.0], Recipe(method))
        torch.testing.assert_close(only(made).bias, 2 * 0.5 * torch.arange(5.0) - 3 * 0.5 * torch.ones(5))
        assert made.config.lora_bias is True
    one_side = combine([first, make(2)], [1.0, 1.0], Recipe())
    torch.testing.assert_close(only(one_side).bias, 0.5 * torch.arange(5.0))
    assert torch.equal(only(negate(first)).bias, -torch.arange(5.0))
    assert negate(negate(first)) == first
    pruning = [name for name, row in METHODS.items() if not row.sums]
    assert len(pruning) == 8
    for method in pruning:
        with pytest.raises(ConfigError, match=f"(?s)method {method} cannot prune.*x.*cat"):
            combine([first, second], [1.0, 1.0], Recipe(method))
    huge = make(1, bias=torch.full((5,), 3e38))
    with pytest.raises(ConfigError, match="not finite"):
        combine([huge], [1e10], Recipe())


@pytest.mark.parametrize("call", [lambda a: combine([a], [1.0], Recipe()), negate, lambda a: compress(a, 1)])
def test_dora_is_refused_with_the_way_out(call):
    with pytest.raises(
        ConfigError, match=r"(?s)DoRA.*needs the base.*x.*onebase export --to portable --fit RANK"
    ):
        call(make(1, magnitude=torch.ones(5)))


def with_rows(seed, value, ids=(3, 8), **facts):
    rows = {"embed": TokenRows(ids, torch.full((len(ids), 4), value))}
    return replace(make(seed), tokens=rows, origin=Origin("base", **facts))


def test_token_rows_are_averaged_or_refused():
    made = combine([with_rows(1, 1.0), with_rows(2, 3.0)], [0.25, 0.75], Recipe())
    assert made.tokens["embed"].ids == (3, 8)
    assert torch.equal(made.tokens["embed"].rows, torch.full((2, 4), 2.5))
    kept = combine([with_rows(1, 0.1), make(2)], [1.0, -0.5], Recipe("ties"))
    assert torch.equal(kept.tokens["embed"].rows, torch.full((2, 4), 0.1))
    for call, message in (
        (lambda: combine([with_rows(1, 1.0)], [0.5], Recipe()), "embed, token rows.*sum to 0.5"),
        (lambda: combine([with_rows(1, 1.0)] * 2, [0.5, 0.5], Recipe("ties")), "token rows.*cannot prune"),
        (lambda: negate(with_rows(1, 1.0)), "(?s)token rows.*embed"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(BaseMismatch, match="rows of embed"):
        combine([with_rows(1, 1.0), with_rows(2, 1.0, ids=(3, 9))], [0.5, 0.5], Recipe())
    clash = [with_rows(1, 1.0, tokens={"<a>": 8}), with_rows(2, 1.0, tokens={"<b>": 8})]
    with pytest.raises(ConfigError, match="8: <a> and <b>"):
        combine(clash, [0.5, 0.5], Recipe())
    same = combine([clash[0], with_rows(2, 1.0)], [0.5, 0.5], Recipe())
    assert same.origin.tokens == {"<a>": 8}


def test_the_result_survives_its_file(tmp_path):
    """A convolution and a layer with a bias, as PEFT's format has them."""
    draw = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=draw)

    conv = LowRank(noise(2, 18), noise(4, 2), 1.0, "conv", kernel=(3, 3), bias=noise(4))
    plain = LowRank(noise(2, 6), noise(4, 2), 1.0, bias=noise(4))
    config = LoraConfig(rank=2, alpha=2, target_modules=["c", "l"], lora_bias=True)
    one = Adapter(config, {"c": conv, "l": plain}, origin=Origin("base"))
    both = combine([one, one], [0.5, 0.25], Recipe("svd", rank=2))
    assert read_adapter(save_adapter(both, tmp_path / "both")) == both


@settings(max_examples=30)
@given(st.integers(1, 6), st.booleans(), st.floats(0, 0.3), st.integers(0, 99))
def test_the_search_finds_what_the_full_decomposition_does(rank, wide, noise, seed):
    """Large enough for the search; a low rank with noise on it, as pruned updates are, and noise alone."""
    draw = torch.Generator().manual_seed(seed)
    low = (
        torch.randn(190, 4, generator=draw, dtype=torch.float64)
        @ torch.randn(4, 150, generator=draw).double()
    )
    matrix = low + noise * torch.randn(190, 150, generator=draw, dtype=torch.float64)
    matrix = matrix.T if wide else matrix
    a, b = best_fit(matrix, rank, steps=4)
    assert (a.shape, b.shape) == ((rank, matrix.shape[1]), (matrix.shape[0], rank))
    s = torch.linalg.svdvals(matrix)
    assert float((matrix - b @ a).norm()) == pytest.approx(float(s[rank:].norm()), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "matrix", [torch.zeros(140, 150), torch.eye(150), torch.ones(200, 140)], ids=["0", "1", "J"]
)
def test_best_fits_of_odd_matrices(matrix):
    a, b = best_fit(matrix.double(), 3)
    s = torch.linalg.svdvals(matrix.double())
    assert float((matrix - b @ a).norm()) == pytest.approx(float(s[3:].norm()), abs=1e-9)


@pytest.mark.parametrize("method", ["dare_linear_svd", "magnitude_prune_svd"])
def test_where_nothing_is_dropped_the_sum_is_fitted_from_the_factors(method):
    """The same answer as from the full updates, to rounding."""
    parts = [Part(_low(seed), weight, f"{seed}:q") for seed, weight in ((0, 0.7), (1, -0.4))]
    recipe = Recipe(method, rank=3)
    full = sum(part.strength * (part.low.B.double() @ part.low.A.double()) for part in parts)
    a, b = METHODS[method].run(parts, recipe)
    wanted_a, wanted_b = best_fit(full, 3)
    torch.testing.assert_close(b @ a, wanted_b @ wanted_a)


def _low(seed: int) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(2, 12, generator=draw), torch.randn(20, 2, generator=draw), 1.5)
