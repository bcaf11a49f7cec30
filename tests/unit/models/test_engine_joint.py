"""Several adapters in one pass: each one's loss and gradients are those that it has alone, whatever the others are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import trained
from decoders import DECODERS, Wide, decoder, gradients, loss_row_by_row, some_layout
from onebase.adapters.injection import adapter_dropout, inject, trainable, use
from onebase.config import LoraConfig
from onebase.models.engine import Engine
from onebase.models.reading import Unsupported

pytestmark = pytest.mark.slow

# Four adapters that differ in rank, scale, places and start. Two of them adapt not every projection or layer.
MEMBERS = {
    "small": {"rank": 2, "alpha": 4},
    "large": {"rank": 9, "alpha": 8, "rslora": True},
    "attention": {"rank": 3, "target_modules": ["q_proj", "v_proj"]},
    "top": {"rank": 5, "layers": "2", "init": "pissa"},
}
FUSED = {"attention": {"rank": 3, "target_modules": ["qkv_proj"]}}
NODES = {  # a tree, rows that share nothing, one row, rows of which two share their first tokens
    "small": [(0, 5, -1), (5, 3, 0), (8, 4, 0), (12, 2, 2)],
    "large": [(0, 4, -1), (4, 6, -1), (10, 3, -1)],
    "attention": [(0, 7, -1)],
    "top": [(0, 3, -1), (3, 2, 0), (5, 4, 0), (9, 2, -1)],
}


def joined(name="llama", dtype=torch.float64, members=MEMBERS, **options):
    """A model with several adapters that want gradients, its engine, and their parameters by adapter."""
    model = decoder(name)
    members = {**members, **(FUSED if name == "phi3" else {})}
    for seed, (member, own) in enumerate(members.items()):
        inject(model, trained(model, LoraConfig(**{**own, **options}), seed), member)
    model.to(dtype)
    parameters = {member: trainable(model, member) for member in members}
    for own in parameters.values():
        for parameter in own.values():
            parameter.requires_grad_(True)
    return model, Engine(model, *members), parameters


def some_layouts(names=tuple(MEMBERS)):
    return {name: some_layout(NODES[name], seed) for seed, name in enumerate(names)}


def joint(engine, layouts, **options):
    """Each member's loss, from one pass."""
    members = [engine.member(name, layout) for name, (layout, _) in layouts.items()]
    return dict(zip(layouts, engine.joint_loss(members, **options), strict=True))


def together(losses, parameters):
    """Every adapter's gradients, from one backward pass."""
    flat = {(name, key): p for name, own in parameters.items() for key, p in own.items()}
    found = gradients(sum(losses.values()), flat)
    return {name: {key: found[name, key] for key in own} for name, own in parameters.items()}


def assert_close(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert float((found[key] - gradient).norm()) <= tolerance * max(float(gradient.norm()), 1e-6), key


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_each_member_is_the_models_own_forward(name, checkpoint):
    """Against transformers, each row alone; so the others' rows and adapters have no part in it."""
    with Wide():
        model, engine, parameters = joined(name)
        layouts = some_layouts()
        losses = joint(engine, layouts, checkpoint=checkpoint)
        found = together(losses, parameters)
        for member, (_, rows) in layouts.items():
            with use(model, member):
                alone = loss_row_by_row(model, rows)
            assert float(losses[member].detach()) == pytest.approx(float(alone.detach()), rel=1e-9)
            assert_close(found[member], gradients(alone, parameters[member]))


def test_a_loss_has_gradients_for_its_own_adapter_alone():
    _, engine, parameters = joined()
    losses = joint(engine, some_layouts())
    for member in MEMBERS:
        others = [p for name, own in parameters.items() if name != member for p in own.values()]
        found = torch.autograd.grad(losses[member], others, materialize_grads=True, retain_graph=True)
        assert not any(gradient.any() for gradient in found)


@pytest.fixture(scope="module")
def ready():
    with Wide():
        return joined("gemma2")


@settings(max_examples=25)
@given(data=st.data())
def test_any_members_in_any_order_are_themselves_alone(ready, data):
    _, engine, parameters = ready
    names = data.draw(st.lists(st.sampled_from(list(MEMBERS)), min_size=1, max_size=4, unique=True))
    layouts = {}
    for name in names:
        lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
        nodes = [
            (sum(lengths[:n]), length, data.draw(st.integers(-1, n - 1))) for n, length in enumerate(lengths)
        ]
        layouts[name] = some_layout(nodes, data.draw(st.integers(0, 99)))
    with Wide():
        losses = joint(engine, layouts)
        found = together(losses, {name: parameters[name] for name in names})
        for name in names:
            alone = joint(engine, {name: layouts[name]})
            one, other = float(losses[name].detach()), float(alone[name].detach())
            assert one == pytest.approx(other, rel=1e-9, abs=1e-12)
            assert_close(found[name], gradients(alone[name], parameters[name]))


def test_dropout_is_each_members_own():
    """A member's masks come from the random state when it is made ready, so they are those that it has alone."""
    model, engine, parameters = joined(dropout=0.4, init="default")
    layouts = some_layouts()
    with adapter_dropout(model):
        plain, members = [], []
        for seed, (name, (layout, _)) in enumerate(layouts.items()):
            torch.manual_seed(seed)
            loss = Engine(model, name).loss(layout)
            plain.append((float(loss.detach()), gradients(loss, parameters[name])))
            torch.manual_seed(seed)
            members.append(engine.member(name, layout))
        losses = dict(zip(layouts, engine.joint_loss(members), strict=True))
    found = together(losses, parameters)
    for name, (loss, own) in zip(layouts, plain, strict=True):
        assert float(losses[name].detach()) == pytest.approx(loss, rel=1e-12)
        assert_close(found[name], own)
    without = joint(engine, layouts)
    assert all(abs(float((losses[name] - without[name]).detach())) > 1e-3 for name in layouts)


def test_one_member_with_dropout_leaves_the_others_theirs():
    model, engine, _ = joined(members={"small": {"rank": 2, "dropout": 0.5}, "large": {"rank": 4}})
    layouts = some_layouts(("small", "large"))
    without = joint(engine, layouts)
    with adapter_dropout(model):
        losses = joint(engine, layouts)
    assert float(losses["large"].detach()) == pytest.approx(float(without["large"].detach()), rel=1e-12)
    assert abs(float((losses["small"] - without["small"]).detach())) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_member_that_broke_leaves_the_others_alone(name, value):
    _, engine, parameters = joined(name)
    layouts = some_layouts()
    losses = joint(engine, layouts)
    expected = together(losses, parameters)
    for parameter in parameters["large"].values():
        parameter.data.fill_(value)
    broken = joint(engine, layouts)
    found = together(broken, parameters)
    assert not torch.isfinite(broken["large"])
    for member in ("small", "attention", "top"):
        assert torch.equal(broken[member], losses[member])
        assert_close(found[member], expected[member], 1e-12)


def test_a_member_without_targets_has_no_loss():
    _, engine, parameters = joined()
    layouts = some_layouts()
    layouts["large"] = some_layout(NODES["large"], share_of_loss=0.0)
    losses = joint(engine, layouts)
    found = together(losses, parameters)
    assert float(losses["large"].detach()) == 0
    assert not any(gradient.any() for gradient in found["large"].values())
    assert any(gradient.any() for gradient in found["small"].values())


@torch.no_grad()
def test_bfloat16_members_are_as_they_are_alone():
    """One product over all rows may round otherwise than each one's own."""
    model, _, _ = joined(dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if ".slots." not in name:
            parameter.data = parameter.data.bfloat16()
    layouts = some_layouts()
    losses = joint(Engine(model, *MEMBERS), layouts)
    for name, (layout, _) in layouts.items():
        alone = float(Engine(model, name).loss(layout))
        assert float(losses[name]) == pytest.approx(alone, rel=2e-2)


def test_a_member_that_does_more_is_refused():
    model, _, _ = joined()
    inject(model, trained(model, LoraConfig(rank=2, dora=True)), "dora")
    Engine(model, *MEMBERS)
    with pytest.raises(Unsupported, match="a magnitude or a bias"):
        Engine(model, *MEMBERS, "dora")
