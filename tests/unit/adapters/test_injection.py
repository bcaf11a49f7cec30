"""Adapters on a model and off it again: names, several at once, modules trained in full, what is left behind."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from adapters import every_kind, trained
from onebase.adapters.injection import (
    adapter_dropout,
    adapter_names,
    base_tensors,
    eject,
    extract,
    fit_problems,
    inject,
    injected,
    new_adapter,
    trainable,
    use,
)
from onebase.adapters.layers import LoraLayer, Slot, TrainedModule, base_modules
from onebase.adapters.targets import match
from onebase.config import LoraConfig
from onebase.errors import AdapterNameError, BaseMismatch
from tiny import output, some_ids, tiny

ODD_NAMES = ["v1.2", "keys", "a%b", "a%2Eb", "a.b", "@", "training", "base", "", "ä ö/ü", "pop"]


def q_only(model, seed: int = 0, **options):
    return trained(model, LoraConfig(rank=2, alpha=4, target_modules="q_proj", **options), seed)


def everything(model, seed: int = 0):
    """An adapter with low-rank updates on all kinds of layers, and a head and an embedding trained in full."""
    config = LoraConfig(rank=2, alpha=4, modules_to_save=["lm_head", "embed_tokens"])
    return trained(model, config, seed)


def rows_are_as_alone(model, ids, names):
    """Each row of a mixed batch is what that row's adapter gives; returns the mixed output."""
    with use(model, names):
        mixed = output(model, ids)
    for row, name in enumerate(names):
        with use(model, name):
            torch.testing.assert_close(mixed[row], output(model, ids)[row], rtol=1e-4, atol=1e-4)
    return mixed


class Confusing(nn.Module):
    """A model whose own modules bear the names that the wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleDict(
            {"base": nn.Linear(4, 4), "slots": nn.Linear(4, 4), "copies": nn.Linear(4, 4)}
        )
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.base["slots"].weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("derived", torch.ones(2), persistent=False)

    def forward(self, x):
        for layer in self.base.values():
            x = layer(x).relu()
        return self.tied(x)


CONFUSING_TENSORS = [
    *("kept", "base.base.weight", "base.base.bias", "base.slots.weight", "base.slots.bias"),
    *("base.copies.weight", "base.copies.bias", "tied.bias"),
]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "base.base,slots"},
        {"target_modules": "copies", "modules_to_save": "base.base"},
        {"target_modules": "tied", "modules_to_save": ["slots", "copies"]},
        {"target_modules": "all-linear", "modules_to_save": ["base"]},
    ],
)
def test_base_tensors_keep_their_names_whatever_the_modules_are_called(options):
    model = Confusing().eval().requires_grad_(False)
    before = list(base_tensors(model))
    assert [name for name, _ in before] == CONFUSING_TENSORS  # the tied weight once, by its first name
    adapter = trained(model, LoraConfig(rank=2, **options))
    inject(model, adapter, "base")
    assert [name for name, _ in base_tensors(model)] == CONFUSING_TENSORS
    assert all(
        a.data_ptr() == b.data_ptr() for (_, a), (_, b) in zip(before, base_tensors(model), strict=True)
    )
    assert extract(model, "base") == adapter
    eject(model)
    assert list(model.state_dict()) == list(Confusing().state_dict())


@pytest.mark.parametrize("arch", ["llama", "llama-tied", "gpt2", "bert"])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_one_adapter_may_update_what_another_trains_in_full(arch, order):
    model, ids = tiny(arch), some_ids()
    before, modules = {n: t.data_ptr() for n, t in base_tensors(model)}, dict(model.named_modules())
    assert ("lm_head.weight" in before) is (arch == "llama")  # tied ones come once
    full = ["pooler"] if arch == "bert" else ["lm_head"]
    config = LoraConfig(rank=2, alpha=4, modules_to_save=full)
    adapters = {"a": trained(model, every_kind(model), 1), "b": trained(model, config, 2)}
    for name in order:
        inject(model, adapters[name], name)
    assert {n: t.data_ptr() for n, t in base_tensors(model)} == before
    assert {name: extract(model, name) for name in adapters} == adapters
    if arch.startswith("llama"):  # the others embed positions once for the whole batch
        rows_are_as_alone(model, ids, ["b", None, "a"])
    assert new_adapter(model, config, 3) == new_adapter(tiny(arch), config, 3)
    for name in order:
        eject(model, [name])
    assert dict(model.named_modules()) == modules


def test_paths_of_the_base_do_not_change():
    model = tiny("llama")
    before = dict(base_modules(model))
    inject(model, everything(model), "a")
    inject(model, q_only(model), "b")
    assert dict(base_modules(model)) == before  # the same objects under the same paths


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extract_gives_the_adapter_back_whatever_the_bases_dtype(arch, dtype):
    model = tiny(arch).to(dtype)
    config = replace(every_kind(model), modules_to_save=("lm_head",) if arch == "llama" else ())
    adapter = trained(model, config)
    assert bool(adapter.full) is (arch == "llama")
    inject(model, adapter, "a")
    taken = extract(model, "a")
    assert taken == adapter
    assert {tensor.dtype for tensor in taken.tensors().values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, dtype}
    with use(model, "a"):
        assert output(model, some_ids()).dtype == dtype


def test_the_model_holds_copies_and_extract_gives_copies():
    model = tiny("llama")
    adapter = everything(model)
    inject(model, adapter, "a")
    kept = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    taken = extract(model, "a")
    for parameter in trainable(model, "a").values():
        parameter.data += 1
    assert all(torch.equal(adapter.tensors()[name], tensor) for name, tensor in kept.items())
    assert taken == adapter
    moved = extract(model, "a").tensors()
    assert all(torch.equal(moved[name], tensor + 1) for name, tensor in kept.items())


def test_trainable_parameters_are_the_adapters_own_tensors():
    model = tiny("llama")
    adapter = everything(model)
    inject(model, adapter, "a")
    inject(model, q_only(model, 1), "b")
    assert list(trainable(model, "a")) == sorted(adapter.tensors())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for parameter in trainable(model, "b").values():
        parameter.requires_grad_(True)
    with use(model, "b"):
        model(some_ids()).logits.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(with_gradient) == len(trainable(model, "b")) == 2 * 2
    assert all(".slots." in name for name in with_gradient)


def test_eject_one_of_several_leaves_the_others_as_they_are():
    model, ids = tiny("llama"), some_ids()
    plain, modules = output(model, ids), dict(model.named_modules())
    adapters = {"a": everything(model, 1), "b": q_only(model, 2), "c": everything(model, 3)}
    alone = {}
    for name, adapter in adapters.items():
        with injected(model, adapter, name):
            alone[name] = output(model, ids)
    for name, adapter in adapters.items():
        inject(model, adapter, name)
    for gone, left in (("a", ["b", "c"]), ("c", ["b"])):
        eject(model, [gone])
        assert adapter_names(model) == left
        with pytest.raises(AdapterNameError, match=f"adapter '{gone}'"):
            extract(model, gone)
        for name in left:
            assert extract(model, name) == adapters[name]
            with use(model, name):
                assert torch.equal(output(model, ids), alone[name])
    wrapped = {
        path for path, module in model.named_modules() if isinstance(module, LoraLayer | TrainedModule)
    }
    assert wrapped == set(adapters["b"].lowrank)  # what only a and c needed is bare again
    eject(model, ["b"])
    assert dict(model.named_modules()) == modules
    assert torch.equal(output(model, ids), plain)


def test_eject_of_an_unknown_name_takes_nothing_off():
    model = tiny("llama")
    inject(model, q_only(model), "mine")
    with pytest.raises(AdapterNameError, match="nearest valid: mine"):
        eject(model, ["mien"])
    assert adapter_names(model) == ["mine"]
    eject(eject(model))  # nothing left to take off: no error, as with an empty list
    assert adapter_names(model) == []


def test_one_name_cannot_be_injected_twice_and_the_first_stays():
    model = tiny("llama")
    first = q_only(model, 1)
    inject(model, first, "a")
    with pytest.raises(AdapterNameError, match="already carries one of that name"):
        inject(model, everything(model, 2), "a")
    assert extract(model, "a") == first
    eject(model)
    second = everything(model, 2)
    inject(model, second, "a")  # free again
    assert extract(model, "a") == second


def test_odd_names_are_kept_apart():
    model, ids = tiny("llama"), some_ids(rows=len(ODD_NAMES))
    adapters = {name: q_only(model, seed, modules_to_save="lm_head") for seed, name in enumerate(ODD_NAMES)}
    for name, adapter in adapters.items():
        inject(model, adapter, name)
    assert adapter_names(model) == ODD_NAMES
    assert all(extract(model, name) == adapter for name, adapter in adapters.items())
    rows_are_as_alone(model, ids, ODD_NAMES)
    eject(model, ["a.b", "keys"])
    assert adapter_names(model) == [name for name in ODD_NAMES if name not in ("a.b", "keys")]
    assert extract(model, "a%2Eb") == adapters["a%2Eb"]


def test_a_full_module_stands_in_for_the_rows_that_chose_it():
    model, ids = tiny("llama"), some_ids(rows=4)
    plain = output(model, ids)
    a, b = everything(model, 1), q_only(model, 2)
    only_full = replace(trained(model, LoraConfig(rank=2, modules_to_save=["norm"]), 3), lowrank={})
    for name, adapter in (("a", a), ("b", b), ("norm", only_full)):
        inject(model, adapter, name)
    assert {type(model.model.embed_tokens), type(model.lm_head), type(model.model.norm)} == {TrainedModule}
    names = ["a", None, "norm", "b"]
    mixed = rows_are_as_alone(model, ids, names)
    torch.testing.assert_close(mixed[1], plain[1], rtol=1e-4, atol=1e-5)
    assert all(not torch.allclose(mixed[row], plain[row], atol=1e-3) for row in (0, 2, 3))


def test_a_full_module_computes_with_its_own_weights():
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    model = nn.Sequential(layer)
    adapter = trained(model, LoraConfig(target_modules=[], modules_to_save=["0"]))
    weight, bias = (adapter.full["0"][key] for key in ("weight", "bias"))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    inject(model, adapter, "a")
    with use(model, "a"):
        assert torch.equal(model(x), (x.float() @ weight.T + bias).bfloat16())
    with use(model, None):
        assert torch.equal(model(x), layer(x))
    with use(model, ["a", None, None, "a"]):
        mixed = model(x)
    assert torch.equal(mixed[1:3], layer(x)[1:3])
    assert torch.equal(mixed[[0, 3]], (x.float() @ weight.T + bias).bfloat16()[[0, 3]])


@pytest.mark.parametrize("scaled", [False, True])
def test_an_embeddings_update_is_looked_up_and_scaled_as_the_embedding_is(scaled):
    model, ids = tiny("gemma3" if scaled else "llama"), some_ids()
    embedding = model.get_input_embeddings()
    adapter = trained(model, LoraConfig(rank=2, alpha=6, target_modules=["embed_tokens"]))
    (low,) = adapter.lowrank.values()
    assert (low.kind, low.A.shape, low.B.shape, low.scale) == ("embedding", (2, 96), (32, 2), 3.0)
    expected = embedding.weight[ids] + 3.0 * low.A.T[ids] @ low.B.T
    factor = float(getattr(embedding, "embed_scale", 1.0))
    assert (factor != 1.0) is scaled
    with injected(model, adapter):
        torch.testing.assert_close(model.get_input_embeddings()(ids), expected * factor)


def test_use_nests_and_comes_back_after_an_error():
    model, ids = tiny("llama"), some_ids()
    for seed, name in enumerate("ab"):
        inject(model, q_only(model, seed), name)
    with use(model, "a"):
        a = output(model, ids)
        with use(model, "b"):
            b = output(model, ids)
            with pytest.raises(AdapterNameError), use(model, "c"):
                pass
            assert torch.equal(output(model, ids), b)
        with pytest.raises(KeyError), use(model, None):
            raise KeyError
        assert torch.equal(output(model, ids), a)
    assert not torch.equal(a, b)
    with pytest.raises(AdapterNameError, match="this call chose none"):
        output(model, ids)


def test_injected_takes_the_adapter_off_after_an_error():
    model, modules = tiny("llama"), dict(tiny("llama").named_modules()).keys()
    with pytest.raises(KeyError), injected(model, everything(model)):
        raise KeyError
    assert dict(model.named_modules()).keys() == modules
    assert output(model, some_ids()).isfinite().all()  # no choice is needed any more


def test_injected_leaves_what_was_there():
    model, ids = tiny("llama"), some_ids()
    inject(model, q_only(model, 1), "mine")
    with use(model, "mine"):
        before = output(model, ids)
        with injected(model, everything(model, 2), "guest"):
            assert not torch.equal(output(model, ids), before)
        with injected(model, None):
            assert not torch.equal(output(model, ids), before)
        assert torch.equal(output(model, ids), before)
    assert adapter_names(model) == ["mine"]


def test_adapter_dropout_turns_on_the_adapters_alone_and_puts_the_flags_back():
    model, ids = tiny("llama"), some_ids()
    inject(model, q_only(model, dropout=0.5), "a")
    assert not any(module.training for module in model.modules())  # as the model that they were put on
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    layers[0].training = True  # a flag that is not as the others must come back too
    before = [(module, module.training) for module in model.modules()]
    with use(model, "a"):
        quiet = [module for module in model.modules() if not isinstance(module, LoraLayer)]
        with adapter_dropout(model):
            assert all(layer.training for layer in layers)
            assert not any(module.training for module in quiet)
            assert not torch.equal(output(model, ids), output(model, ids))
        assert [(module, module.training) for module in model.modules()] == before
        with pytest.raises(KeyError), adapter_dropout(model):
            raise KeyError
        assert [(module, module.training) for module in model.modules()] == before
        layers[0].training = False
        assert torch.equal(output(model, ids), output(model, ids))


def test_dropout_keeps_the_expected_update():
    """Inputs are dropped with probability p and the rest scaled by 1/(1-p); the base's part is left alone."""
    model = nn.Sequential(nn.Linear(64, 3)).eval()
    x = torch.ones(1, 64)
    config = LoraConfig(rank=2, alpha=2, target_modules="0", dropout=0.25)
    adapter = trained(model, config)
    ones = {"0": adapter.lowrank["0"]._replace(A=torch.ones(2, 64), B=torch.ones(3, 2))}
    with injected(model, replace(adapter, lowrank=ones)), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        with adapter_dropout(model):
            draws = torch.cat([model(x) - model[0].base(x) for _ in range(400)])
        counts = draws * 0.75 / 2  # two equal rows of A, each adding up the inputs that were kept
        torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)
        assert abs(float(counts.mean()) - 0.75 * 64) < 1
        torch.testing.assert_close(model(x) - model[0].base(x), torch.full((1, 3), 128.0))


def test_every_misfit_is_named_at_once_and_nothing_is_touched():
    model, small = tiny("llama"), nn.ModuleDict({"q_proj": nn.Embedding(4, 4), "lm_head": nn.Linear(2, 2)})
    adapter = trained(small, LoraConfig(rank=1, target_modules="q_proj", modules_to_save="lm_head"))
    state = {"lm_head": adapter.full["lm_head"], "head": {"weight": torch.ones(1)}}
    path = "model.layers.0.self_attn.q_proj"
    bad = replace(
        adapter, lowrank={path: adapter.lowrank["q_proj"], "nowhere": adapter.lowrank["q_proj"]}, full=state
    )
    problems = fit_problems(model, bad)
    assert [problem.partition(":")[0] for problem in problems] == [path, "nowhere", "lm_head", "head"]
    assert "the base has a Linear, the adapter is for a layer of kind embedding" in problems[0]
    assert "no such module" in problems[3]
    with pytest.raises(BaseMismatch) as caught:
        inject(model, bad)
    assert all(problem in str(caught.value) for problem in problems)
    assert not any(isinstance(module, LoraLayer | TrainedModule | Slot) for module in model.modules())


def test_the_coverage_of_an_injected_model_is_the_bases():
    model, config = tiny("llama"), LoraConfig(rank=2)
    before = match(model, config)
    inject(model, everything(model), "a")
    assert match(model, config) == before
    assert new_adapter(model, config, seed=1) == new_adapter(tiny("llama"), config, seed=1)


def test_a_fresh_full_module_is_a_wide_copy_of_the_bases():
    model = tiny("llama").to(torch.bfloat16)
    fresh = new_adapter(model, LoraConfig(rank=2, modules_to_save="lm_head"))
    weight = fresh.full["lm_head"]["weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight.bfloat16(), model.lm_head.weight)
    weight += 1
    assert not torch.equal(weight.bfloat16(), model.lm_head.weight)
