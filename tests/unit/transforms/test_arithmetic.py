"""Arithmetic on adapters: exact where it says so, the papers' numbers where they are small enough to check by hand."""

import json
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.adapters.adapter import Adapter, LowRank, Origin
from onebase.config import CombineMethod, LoraConfig, Recipe
from onebase.errors import BaseMismatch, ConfigError
from onebase.storage.format import read_adapter, save_adapter
from onebase.transforms.arithmetic import combine, compress, deviations, negate, norms
from onebase.transforms.combining import METHODS

IN, OUT = 7, 5
BASE = Origin("base")
PLAIN = [name for name, row in METHODS.items() if not row.same_rank]


def make(ranks, seed=0, scale=0.5, dtype=torch.float64, origin=BASE, **facts):
    """An adapter with random updates (OUT, IN) of these ranks: {path: rank}."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    low = {path: LowRank(noise(rank, IN), noise(OUT, rank), scale) for path, rank in ranks.items()}
    return Adapter(LoraConfig(rank=1, target_modules=list(ranks)), low, origin=origin, **facts)


def of(*matrices):
    """Adapters whose only update is exactly this matrix."""
    wide = [torch.tensor(m, dtype=torch.float64) for m in matrices]
    low = [LowRank(m, torch.eye(m.shape[0], dtype=torch.float64), 1.0) for m in wide]
    return [Adapter(LoraConfig(target_modules=["x"]), {"x": one}, origin=BASE) for one in low]


def dense(adapter, path="x"):
    low = adapter.lowrank.get(path)
    return low.scale * low.B @ low.A if low else torch.zeros(OUT, IN, dtype=torch.float64)


def weighted_sum(adapters, weights, path="x"):
    return sum(w * dense(adapter, path) for adapter, w in zip(adapters, weights, strict=True))


def mixed(adapters, *weights, **options):
    return dense(combine(adapters, weights, Recipe(**options)))


weights_of = st.lists(st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3), min_size=1, max_size=4)
ranks_of = st.dictionaries(st.sampled_from(["x", "y", "z"]), st.integers(1, 4), min_size=1)


@given(st.data(), weights_of, st.floats(-2, 2).filter(lambda s: abs(s) > 1e-3))
@settings(max_examples=40)
def test_cat_is_the_weighted_sum_and_svd_its_best_fit(data, weights, scale):
    adapters = [make(data.draw(ranks_of), seed, scale) for seed in range(len(weights))]
    cat, svd = (combine(adapters, weights, Recipe(name)) for name in ("cat", "svd"))
    top = max(low.rank for adapter in adapters for low in adapter.lowrank.values())
    for path, low in cat.lowrank.items():
        want = weighted_sum(adapters, weights, path)
        assert low.rank == sum(a.lowrank[path].rank for a in adapters if path in a.lowrank)
        torch.testing.assert_close(dense(cat, path), want, rtol=1e-10, atol=1e-10)
        u, s, vh = torch.linalg.svd(want)
        best = u[:, :top] * s[:top] @ vh[:top] if top < len(s) else want
        torch.testing.assert_close(dense(svd, path), best, rtol=1e-7, atol=1e-10)
    assert set(cat.lowrank) == set(svd.lowrank) == {path for a in adapters for path in a.lowrank}


@given(st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=16)
def test_compression_loses_the_tail_of_the_singular_values(rank, kept):
    adapter = make({"x": rank, "y": 4}, scale=2.0)
    small, errors = compress(adapter, kept)
    for path in ("x", "y"):
        s = torch.linalg.svdvals(dense(adapter, path))
        want = float(s[kept:].norm() / s.norm())
        assert errors[path] == pytest.approx(want, abs=1e-12)
        assert float((dense(adapter, path) - dense(small, path)).norm() / s.norm()) == pytest.approx(
            want, abs=1e-12
        )
        assert small.lowrank[path].rank == min(kept, adapter.lowrank[path].rank)


def test_negation_turns_the_sign_and_twice_is_nothing():
    adapter = make({"x": 2}, dtype=torch.float32, origin=Origin("b", "f", training={"steps": 3}))
    turned = negate(adapter)
    assert torch.equal(dense(turned), -dense(adapter))
    assert turned.origin.training == {"steps": 3, "negated": True}
    assert negate(turned) == adapter
    assert turned != adapter


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_of_weight_one_keeps_its_update(method):
    adapter = make({"x": 3, "y": 3}, scale=-0.3)
    alone = combine([adapter], [1.0], Recipe(method))
    for path in ("x", "y"):
        torch.testing.assert_close(dense(alone, path), dense(adapter, path), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixed([adapter], -2.0, method=method), -2 * dense(adapter))


def test_linear_weights_each_factor_by_a_root_and_so_has_cross_terms():
    first, second = make({"x": 2}, 1, scale=4.0), make({"x": 2}, 2, scale=9.0)
    (a1, b1, *_), (a2, b2, *_) = first.lowrank["x"], second.lowrank["x"]
    made = combine([first, second], [1.0, -1.0], Recipe("linear")).lowrank["x"]
    torch.testing.assert_close(made.A, 2 * a1 - 3 * a2)
    torch.testing.assert_close(made.B, 2 * b1 + 3 * b2)


def test_pruning_keeps_the_largest_values():
    matrices = of([[4.0, 1.0], [-2.0, 3.0]], [[2.0, -5.0], [-1.0, -1.5]])
    options = {"method": "magnitude_prune_svd", "density": 0.5}
    torch.testing.assert_close(
        mixed(matrices, 1.0, 2.0, **options), torch.tensor([[8.0, -10.0], [0, 3]]).double()
    )


def test_ties_means_what_agrees_with_the_elected_sign():
    trimmed = of([[4.0, 1.0], [-2.0, 3.0]], [[2.0, -5.0], [-1.0, -1.5]])
    got = mixed(trimmed, 1.0, 1.0, method="ties_svd", density=0.5)
    torch.testing.assert_close(got, torch.tensor([[3.0, -5.0], [0, 3]]).double())
    votes = of([[5.0]], [[-2.0]], [[-1.0]])
    assert mixed(votes, 1.0, 1.0, 1.0, method="ties_svd").item() == pytest.approx(5.0)
    assert mixed(votes, 1.0, 1.0, 1.0, method="ties_svd", sign="frequency").item() == pytest.approx(-1.5)
    # A weight scales what was elected; it has no vote.
    assert mixed(votes, -3.0, 1.0, 1.0, method="ties_svd").item() == pytest.approx(-15.0)


def test_dare_drops_at_random_and_keeps_the_expectation():
    (adapter,) = of(torch.arange(1.0, 401.0).view(20, 20).tolist())
    options = {"method": "dare_linear_svd", "density": 0.25, "rank": 20}
    draws = [mixed([adapter], 1.0, seed=seed, **options) for seed in range(200)]
    kept = draws[0].abs() > 1e-6
    assert 70 < int(kept.sum()) < 130
    torch.testing.assert_close(draws[0][kept], 4 * dense(adapter)[kept])
    # The mean of 200 draws of each value has a relative standard deviation of sqrt(3 / 200) = 0.12.
    off = (torch.stack(draws).mean(0) / dense(adapter) - 1).abs()
    assert off.max() < 5 * math.sqrt(3 / 200)
    assert off.mean() < 0.12


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if "seed" in row.reads])
def test_draws_depend_on_seed_path_and_place_alone(method):
    ranks = {"x": 3, "y": 3, "z": 3}
    pair = [make(ranks, 1), make(ranks, 2)]
    recipe = Recipe(method, density=0.5, seed=4)
    made = combine(pair, [1.0, 0.5], recipe)
    turned = [replace(a, lowrank=dict(reversed(a.lowrank.items()))) for a in pair]
    torch.manual_seed(99)
    assert combine(turned, [1.0, 0.5], recipe).tensors().keys() == made.tensors().keys()
    for path in ranks:
        alone = [replace(a, lowrank={path: a.lowrank[path]}) for a in turned]
        assert torch.equal(dense(combine(alone, [1.0, 0.5], recipe), path), dense(made, path))
    other = combine(pair, [1.0, 0.5], replace(recipe, seed=5))
    assert not torch.equal(dense(other), dense(made))
    same = combine([pair[0], pair[0]], [1.0, 1.0], Recipe("dare_linear", density=0.5)).lowrank["x"]
    twice = 2 * math.sqrt(0.5) * pair[0].lowrank["x"].A
    assert not torch.isclose(same.A, 2 * twice).logical_or(same.A == 0).all()  # the two masks differ


def test_norms_and_deviations_are_those_of_the_full_updates():
    pair, weights = [make({"x": 2, "y": 3}, 1), make({"x": 4}, 2)], [0.5, -2.0]
    result = combine(pair, weights, Recipe("svd", rank=3))
    for path, norm in norms(result).items():
        want = weighted_sum(pair, weights, path)
        assert norm == pytest.approx(float(dense(result, path).norm()))
        error = float((dense(result, path) - want).norm() / want.norm())
        assert deviations(result, pair, weights)[path] == pytest.approx(error, abs=1e-12)
    assert deviations(result, pair, weights)["x"] > 0.01
    nothing = combine([pair[0], pair[0]], [1.0, -1.0], Recipe("cat"))
    assert all(error < 1 for error in deviations(nothing, [pair[0]] * 2, [1.0, -1.0]).values())


def with_head(seed, fill, **facts):
    adapter = make({"x": 2}, seed, full={"head": {"weight": torch.full((2, 2), fill)}}, **facts)
    return replace(adapter, config=replace(adapter.config, modules_to_save=["head"]))


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_modules_trained_in_full_are_averaged(method):
    made = combine([with_head(1, 3.0), with_head(2, 5.0)], [0.25, 0.75], Recipe(method))
    assert torch.equal(made.full["head"]["weight"], torch.full((2, 2), 4.5))
    assert made.config.modules_to_save == ("head",)


@pytest.mark.parametrize("method", METHODS)
def test_a_module_of_one_adapter_stays_as_it_is(method):
    made = combine([with_head(1, 0.1), make({"x": 2}, 2)], [1.0, -0.5], Recipe(method))
    assert torch.equal(made.full["head"]["weight"], torch.full((2, 2), 0.1))


def test_an_adapter_without_low_rank_updates_keeps_its_module():
    head = replace(
        with_head(1, 2.0), lowrank={}, config=LoraConfig(target_modules=[], modules_to_save="head")
    )
    assert combine([head, head], [0.5, 0.5], Recipe("svd")).full["head"]["weight"].mean() == 2.0


def test_the_result_survives_its_file(tmp_path):
    """Ranks differ, and one path is the end of another: each must get its own rank and alpha back."""
    ranks = {"layers.0.q": 3, "encoder.layers.0.q": 2, "encoder.layers.1.q": 2, "layers.1.q": 1}
    pair = [make(ranks, seed, dtype=torch.float32) for seed in (1, 2)]
    for number, recipe in enumerate((Recipe("cat"), Recipe("svd", rank=2))):
        both = combine(pair, [0.5, 0.5], recipe)
        assert {low.scale for low in both.lowrank.values()} == {1.0}
        assert read_adapter(save_adapter(both, tmp_path / str(number))) == both


def test_the_origin_says_how_it_was_made():
    first = make({"x": 2}, 1, origin=Origin("base", "f1", "CAUSAL_LM", {"chat": True}, {"steps": 5}))
    second = make({"x": 2}, 2, origin=Origin("folder/base", "f1", "", {}, {"steps": 7}))
    origin = combine([second, first], [0.5, 0.25], Recipe("dare_ties", density=0.5, seed=3)).origin
    assert (origin.base, origin.fingerprint, origin.task) == ("folder/base", "f1", "CAUSAL_LM")
    assert origin.prompt == {"chat": True}
    facts = {"combined": [{"steps": 7}, {"steps": 5}], "weights": [0.5, 0.25], "method": "dare_ties"}
    assert origin.training == facts | {"density": 0.5, "sign": "total", "seed": 3}
    json.dumps(origin.training)


BASES = {
    "fingerprints differ": (Origin("base", "f1"), Origin("base", "f2")),
    "names differ": (Origin("a"), Origin("b")),
    "one without fingerprint": (Origin("a", "f1"), Origin("b")),
}


@pytest.mark.parametrize("case", BASES)
def test_other_bases_are_refused_unless_allowed(case):
    pair = [make({"x": 2}, origin=origin) for origin in BASES[case]]
    with pytest.raises(BaseMismatch, match="different bases") as error:
        combine(pair, [0.5, 0.5], Recipe())
    assert all((origin.fingerprint or origin.base) in str(error.value) for origin in BASES[case])
    allowed = combine(pair, [0.5, 0.5], Recipe(), allow_base_mismatch=True)
    assert allowed.origin.base == BASES[case][0].base
    assert allowed.origin.fingerprint in ("", "f1")


UNKNOWN = {
    "one says nothing": (Origin(), Origin("a", "f1")),
    "none says anything": (Origin(), Origin()),
    "a name and a fingerprint": (Origin("a"), Origin("", "f1")),
    "one of three": (Origin("a", "f1"), Origin("a", "f1"), Origin()),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_bases_that_nothing_says_are_the_same_are_refused_unless_allowed(case):
    adapters = [make({"x": 2}, origin=origin) for origin in UNKNOWN[case]]
    weights = [1 / len(adapters)] * len(adapters)
    with pytest.raises(BaseMismatch, match="nothing says that the bases are one"):
        combine(adapters, weights, Recipe())
    allowed = combine(adapters, weights, Recipe(), allow_base_mismatch=True)
    assert allowed.origin.fingerprint == max(origin.fingerprint for origin in UNKNOWN[case])
    assert combine(adapters[:1], [1.0], Recipe()).origin.base == UNKNOWN[case][0].base


def test_other_shapes_kinds_and_full_modules_are_refused():
    plain, saved = make({"x": 2, "y": 2}), make({"x": 2}, full={"y": {"weight": torch.zeros(2)}})
    low = plain.lowrank["x"]
    wide = replace(saved, lowrank={"x": low._replace(A=torch.zeros(2, IN + 1).double())})
    with pytest.raises(BaseMismatch) as error:
        combine([plain, wide], [0.5, 0.5], Recipe(), allow_base_mismatch=True)
    assert "x: " in str(error.value)
    assert all(f"(5, {width}, 'linear')" in str(error.value) for width in (IN, IN + 1))
    assert "y: one adapter updates it, another trains y in full" in str(error.value)
    embedding = replace(plain, lowrank={"x": low._replace(kind="embedding")})
    with pytest.raises(BaseMismatch, match="embedding"):
        combine([plain, embedding], [0.5, 0.5], Recipe())
    heads = [replace(with_head(1, 1.0), full={"head": {"weight": torch.ones(n)}}) for n in (2, 3)]
    with pytest.raises(BaseMismatch, match="head"):
        combine(heads, [0.5, 0.5], Recipe())


PROMPTS = [replace(BASE, prompt={"chat": chat}) for chat in (True, False)]
NAN = replace(make({"x": 2}), lowrank={"x": LowRank(torch.full((2, IN), math.nan), torch.ones(OUT, 2), 1.0)})
REFUSED = {
    "no adapters": (lambda: combine([], [], Recipe()), "no adapters"),
    "a weight too few": (lambda: combine([make({"x": 2})] * 2, [1.0], Recipe()), "1 weights for 2 adapters"),
    "NaN weight": (lambda: combine([make({"x": 2})], [math.nan], Recipe()), "finite"),
    "infinite weight": (lambda: combine([make({"x": 2})], [-math.inf], Recipe()), "finite"),
    "overflow": (lambda: combine([make({"x": 2}, dtype=torch.float32)], [1e300], Recipe()), "not finite"),
    "overflow in svd": (lambda: combine([make({"x": 2})], [1e308], Recipe("svd")), "not finite"),
    "NaN in cat": (lambda: combine([NAN], [1.0], Recipe("cat")), "not finite"),
    "NaN in svd": (lambda: combine([NAN], [1.0], Recipe("svd")), "not finite"),
    "NaN in ties_svd": (lambda: combine([NAN], [1.0], Recipe("ties_svd")), "not finite"),
    "density 0": (lambda: Recipe("ties", density=0.0), r"density=0.0.*\(0, 1\]"),
    "density 2": (lambda: Recipe("ties", density=2.0), r"density=2.0.*\(0, 1\]"),
    "density NaN": (lambda: Recipe("ties", density=math.nan), r"\(0, 1\]"),
    "rank below 0": (lambda: Recipe("svd", rank=-1), "rank=-1"),
    "rank above the shape": (lambda: mixed([make({"x": 4})], 1.0, method="ties_svd", rank=6), "above 5"),
    "rank above the sum": (lambda: mixed([make({"x": 2})], 1.0, method="svd", rank=3), "above 2"),
    "compress to nothing": (lambda: compress(make({"x": 2}), 0), "at least 1"),
    "compress upwards": (lambda: compress(make({"x": 2}), 3), "above 2"),
    "no such method": (lambda: Recipe("tie"), "ties"),
    "no such sign": (lambda: Recipe("ties", sign="mean"), "total or frequency"),
    "nothing kept": (lambda: mixed([make({"x": 2})], 1.0, method="ties", density=0.01), "none of the 14"),
    "prompts differ": (
        lambda: combine([make({"x": 2}, origin=o) for o in PROMPTS], [1.0, 1.0], Recipe()),
        "(?s)prompt formats.*True.*False.*prompt-from",
    ),
    "tasks differ": (
        lambda: combine(
            [make({"x": 2}, origin=Origin("base", task=t)) for t in ("A", "B")], [1.0, 1.0], Recipe()
        ),
        "different tasks: A, B",
    ),
    "full weights off 1": (lambda: combine([with_head(1, 1.0)], [0.5], Recipe()), "(?s)head.*0.5.*sum to 1"),
    "full by ties": (lambda: combine([with_head(1, 1.0)] * 2, [0.5, 0.5], Recipe("ties")), "(?s)head.*cat"),
    "negated head": (lambda: negate(with_head(1, 1.0)), "head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_differ_need_a_method_that_can(method):
    pair = [make({"x": 2, "y": 1}), make({"x": 3, "y": 1})]
    if method in PLAIN:
        assert combine(pair, [0.5, 0.5], Recipe(method)).lowrank["x"].rank >= 3
        return
    with pytest.raises(ConfigError, match=r"(?s)x: ranks 2, 3.*cat, svd") as error:
        combine(pair, [0.5, 0.5], Recipe(method))
    assert "y:" not in str(error.value)


OTHER = {"rank": 2, "density": 0.5, "sign": "frequency", "seed": 1}


@pytest.mark.parametrize("option", OTHER)
@pytest.mark.parametrize("method", METHODS)
def test_an_option_that_a_method_does_not_use_is_refused(method, option):
    pair, recipe = [make({"x": 3}, 1), make({"x": 3}, 2)], Recipe(method, **{option: OTHER[option]})
    if option not in METHODS[method].reads:
        with pytest.raises(ConfigError, match=f"(?s){option}.*method {method} does not use it"):
            combine(pair, [1.0, 1.0], recipe)
        return
    density = 0.5 if "density" in METHODS[method].reads else 1.0
    changed = combine(pair, [1.0, 1.0], replace(recipe, density=density))
    usual = combine(pair, [1.0, 1.0], Recipe(method, density=1.0 if option == "density" else density))
    assert not torch.equal(dense(changed), dense(usual))


def test_every_method_has_a_row():
    assert list(METHODS) == list(get_args(CombineMethod))
