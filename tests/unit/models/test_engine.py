"""The engine against the models' own forward, each row alone: losses, gradients, trees; and what it refuses."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapters import trained
from decoders import DECODERS, SIZES, Wide, adapted, decoder, gradients, loss_row_by_row, some_layout
from onebase.adapters.injection import adapter_dropout, eject, extract, inject, new_adapter, trainable, use
from onebase.config import LoraConfig
from onebase.data.template import Encoded
from onebase.data.trie import layout
from onebase.models.engine import Engine, engine_problem
from onebase.models.families import FAMILIES, Family
from onebase.models.reading import Unsupported

pytestmark = pytest.mark.slow

# Two trees and a lone row; the second node's children do not stand beside it.
NODES = [(0, 5, -1), (5, 3, 0), (8, 4, 0), (12, 2, 2), (14, 1, 2), (15, 7, -1), (22, 3, -1), (25, 2, 6)]


def compare(model, parameters, packed, rows, **options):
    """(relative difference of the losses, of the gradients, the engine's gradients)."""
    with use(model):
        ours = Engine(model, "default").loss(packed, **options)
        theirs = loss_row_by_row(model, rows)
    one, other = (gradients(loss, parameters) for loss in (ours, theirs))
    assert max(float(g.abs().max()) for g in other.values()) > 1e-3
    for name, expected in other.items():
        scale = max(float(expected.norm()), 1e-6)
        assert one[name].shape == expected.shape
        assert one[name].dtype == expected.dtype
        yield name, float((one[name] - expected).norm()) / scale
    yield "loss", abs(float((ours - theirs).detach() / theirs.detach()))


def assert_equal(model, parameters, packed, rows, tolerance=1e-9, **options):
    apart = dict(compare(model, parameters, packed, rows, **options))
    assert max(apart.values()) < tolerance, apart


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_losses_and_gradients_are_the_models_own(name, checkpoint):
    model = decoder(name)
    parameters = adapted(model, torch.float64)
    with Wide():
        assert_equal(model, parameters, *some_layout(NODES), checkpoint=checkpoint)


OPTIONS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "down": {"target_modules": ["down_proj"]},
    "o": {"target_modules": ["o_proj"]},
    "the upper layer": {"layers": "2"},
    "a middle layer's gate": {"layers": "1", "target_modules": ["gate_proj"]},
    "rslora": {"rslora": True},
    "pissa": {"init": "pissa"},
    "patterns": {"rank_pattern": {r"layers\.0\..*": 2, "q_proj": 7}, "alpha_pattern": {"up_proj": 3.0}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_some_layers_and_any_ranks(name, options):
    model = decoder(name)
    parameters = adapted(model, torch.float64, **options)
    with Wide():
        assert_equal(model, parameters, *some_layout(NODES))
        assert engine_problem(model, "default") is None


@st.composite
def forests(draw):
    """Up to five nodes with random parents, whose tokens stand in any order."""
    count = draw(st.integers(1, 5))
    lengths = [draw(st.integers(1, 6)) for _ in range(count)]
    parents = [draw(st.just(-1) | st.integers(-1, number - 1)) for number in range(count)]
    starts, end = {}, 0
    for number in draw(st.permutations(range(count))):
        starts[number], end = end, end + lengths[number]
    return [(starts[n], lengths[n], parents[n]) for n in range(count)]


@pytest.fixture(scope="module")
def ready():
    """A model with a window, one with softcaps and a tied head, in float64, each with its engine."""
    found = []
    for name in ("mistral", "gemma2"):
        model = decoder(name, num_hidden_layers=2, **({"layer_types": None} if name == "gemma2" else {}))
        parameters = adapted(model, torch.float64)
        with Wide():
            found.append((model, parameters, Engine(model, "default")))
    return found


@settings(max_examples=200)
@given(nodes=forests(), seed=st.integers(0, 999), which=st.integers(0, 1))
def test_any_packing_and_any_tree_is_its_rows_alone(ready, nodes, seed, which):
    model, parameters, engine = ready[which]
    packed, rows = some_layout(nodes, seed, every_node=seed % 2 == 0)
    with Wide(), use(model):
        ours, theirs = engine.loss(packed), loss_row_by_row(model, rows)
    assert float((ours - theirs).detach().abs()) <= 1e-9 * max(float(theirs.detach()), 1)
    if len(packed.targets):
        one, other = (gradients(loss, parameters) for loss in (ours, theirs))
        for key, expected in other.items():
            assert float((one[key] - expected).norm()) <= 1e-8 * max(float(expected.norm()), 1), key


@pytest.mark.parametrize("share", [False, True])
def test_layouts_of_encoded_rows(share):
    model = decoder("qwen3")
    parameters = adapted(model, torch.float64)
    prompt = list(range(10, 22))
    rows = [
        Encoded(n, prompt + end, [False] * len(prompt) + [True] * len(end))
        for n, end in enumerate([[5, 6, 2], [5, 7, 8, 2], [9, 2], [5, 6, 2]])
    ] + [Encoded(4, [30, 31, 32], [False, True, True])]
    packed = layout(rows, share)
    assert len(packed.ids) == (27 if share else 63)
    with Wide():
        alone = [(torch.tensor(row.ids), torch.tensor(row.loss)) for row in rows]
        assert_equal(model, parameters, packed, alone)


@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16_stays_near_float64(name):
    """Both round at other places, so both are held against float64; the gradients are float32.

    The engine multiplies with bfloat16 copies of the factors, the model's own forward with the factors: in these tiny
    models, whose updates are as large as their weights, its error is 1 to 7 times as large. A mistake makes it 1.
    """
    exact = decoder(name)
    parameters = adapted(exact)
    packed, rows = some_layout(NODES)
    base = copy.deepcopy(exact)
    for parameter in base.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    losses, found = [], []
    for net in (exact.double(), base):
        own = trainable(net, "default")
        with use(net):
            loss = Engine(net, "default").loss(packed)
            losses.append(float(loss.detach()))
            found.append(torch.cat([g.double().flatten() for g in gradients(loss, own).values()]))
    with use(base):
        loss = loss_row_by_row(base, rows)
    losses.append(float(loss.detach()))
    found.append(
        torch.cat([g.double().flatten() for g in gradients(loss, trainable(base, "default")).values()])
    )
    truth, ours, theirs = found
    assert abs(losses[1] - losses[0]) <= abs(losses[2] - losses[0]) + 0.02 * losses[0]
    errors = [float((g - truth).norm() / truth.norm()) for g in (ours, theirs)]
    assert errors[0] <= 8 * errors[1] + 0.02
    assert len(parameters) == len(trainable(base, "default"))


def test_dropout_drops_only_while_training_and_repeats_under_a_seed():
    model = decoder("llama")
    parameters = adapted(model, dropout=0.5)
    packed, _ = some_layout(NODES)
    engine = Engine(model, "default")
    plain, again = (float(engine.loss(packed).detach()) for _ in range(2))
    assert plain == again
    with adapter_dropout(model):
        found = []
        for checkpoint in (False, True):
            torch.manual_seed(3)
            loss = engine.loss(packed, checkpoint=checkpoint)
            found.append([loss, *gradients(loss, parameters).values()])
        other = float(engine.loss(packed).detach())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len({plain, float(found[0][0].detach()), other}) == 3


def test_many_masks_average_to_the_loss_without_dropout():
    """Only B's gradient at B = 0 is linear in the masked input, so there the mean must be the plain gradient."""
    model = decoder("llama", num_hidden_layers=1)
    parameters = adapted(model, dropout=0.5, target_modules=["down_proj"])
    parameters["model.layers.0.mlp.down_proj.B"].data.zero_()
    packed, _ = some_layout(NODES)
    engine = Engine(model, "default")
    key = "model.layers.0.mlp.down_proj.B"
    plain = gradients(engine.loss(packed), parameters)[key]
    with adapter_dropout(model):
        draws = [gradients(engine.loss(packed), parameters)[key] for _ in range(150)]
    mean = torch.stack(draws).mean(0)
    assert float((mean - plain).norm() / plain.norm()) < 0.2


def test_the_loss_has_no_graph_where_none_is_wanted():
    model = decoder("llama")
    adapted(model)
    packed, rows = some_layout(NODES)
    with torch.no_grad(), use(model):
        loss = Engine(model, "default").loss(packed)
        assert float(loss) == pytest.approx(float(loss_row_by_row(model, rows)), rel=1e-5)
    assert loss.grad_fn is None


def test_no_target_is_no_loss():
    model = decoder("llama")
    adapted(model)
    packed, _ = some_layout(NODES, share_of_loss=0.0)
    loss = Engine(model, "default").loss(packed)
    loss.backward()
    assert float(loss.detach()) == 0


def test_frozen_weights_get_no_gradient_even_if_they_want_one():
    model = decoder("qwen2")
    adapted(model)
    model.requires_grad_(True)
    packed, _ = some_layout(NODES)
    Engine(model, "default").loss(packed).backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert names == {name for name, _ in model.named_parameters() if ".slots." in name}


@pytest.mark.parametrize("name", DECODERS)
def test_the_probe_passes_and_leaves_no_trace(name):
    model = decoder(name)
    inject(model, new_adapter(model, LoraConfig(rank=2, dropout=0.1)))
    model.train()
    before = extract(model)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert engine_problem(model, "default") is None
    assert extract(model) == before
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    model.bfloat16()
    assert engine_problem(model, "default") is None


def test_the_other_adapters_on_the_model_take_no_part():
    model = decoder("llama")
    parameters = adapted(model)
    inject(
        model, trained(model, LoraConfig(rank=2, target_modules=["embed_tokens", "lm_head"]), seed=5), "other"
    )
    assert engine_problem(model, "default") is None
    assert_equal(model, parameters, *some_layout(NODES), tolerance=1e-4)
    assert "embed_tokens" in engine_problem(model, "other")


REFUSED = {
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, "changes model.embed_tokens"),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}, "changes lm_head"),
    "trained in full": ("llama", {"modules_to_save": ["norm"]}, "at model.norm (TrainedModule)"),
    "tokens": ("llama", {"trainable_tokens": ["id:5"]}, "at model.embed_tokens (TokenLayer)"),
    "dora": ("llama", {"dora": True}, "a magnitude or a bias at model.layers.0.self_attn.q_proj"),
    "bias": ("qwen2", {"lora_bias": True}, "a magnitude or a bias at model.layers.0.self_attn.q_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_do_more_are_refused(case):
    name, options, reason = REFUSED[case]
    model = decoder(name)
    inject(model, trained(model, LoraConfig(rank=2, **options)))
    problem = engine_problem(model, "default")
    assert reason in problem
    assert "\n" not in problem
    with pytest.raises(Unsupported, match=re.escape(reason)):
        Engine(model, "default")


def other_model(kind, **options):
    config = AutoConfig.for_model(kind, **{**SIZES, **options})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("gpt2", {}, "GPT2LMHeadModel is not a model that it knows"),
        ("mixtral", {"num_local_experts": 2}, "MixtralForCausalLM is not a model that it knows"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "change with the length of a row",
        ),
        ("llama", {"hidden_act": "relu"}, "activation is a ReLU"),
        ("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 8}, "not causal"),
    ],
)
def test_other_models_are_refused(kind, options, reason):
    model = other_model(kind, **options)
    inject(model, trained(model, LoraConfig(rank=2)))
    assert reason in engine_problem(model, "default")


class Doubling(nn.Linear):
    """A linear layer that is not only that."""

    def forward(self, x):
        return 2 * super().forward(x)


def replace_norm(model):
    model.model.norm = nn.RMSNorm(32)


def add_module(model):
    model.model.layers[1].extra = nn.Linear(3, 3)


def own_linear(model):
    model.model.layers[1].mlp.up_proj = Doubling(32, 48, bias=False)


def add_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


def own_forward(model):
    norm = model.model.norm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def wrap(model):
    model.model.layers[0].self_attn = nn.Sequential(model.model.layers[0].self_attn)


CHANGES = {
    replace_norm: "its norm is a RMSNorm of torch.nn",
    add_module: "does not know model.layers.1.extra",
    own_linear: "its up_proj is a Doubling",
    add_hook: "has a hook",
    own_forward: "forward of its own",
    wrap: "Sequential has no q_proj",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_models_are_refused(change):
    model = decoder("llama")
    change(model)
    inject(model, trained(model, LoraConfig(rank=2, target_modules=["down_proj"])))
    assert CHANGES[change] in engine_problem(model, "default")


WRONG_ROWS = {
    "multiplier": {"residual": lambda config: 0.9},
    "rotation": {"interleaved": True},
    "offset": {"norm_offset": 0.1},
    "window": {"window": lambda attention: 3},
    "softcap": {"softcap": lambda attention: 0.5},
    "no rotation": {"rotates": lambda attention: False},
    "logits": {"logits": lambda config: 0.9},
}


@pytest.mark.parametrize("change", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_a_wrong_row_does_not_pass_the_probe(change, monkeypatch):
    model = decoder("llama")
    inject(model, new_adapter(model, LoraConfig(rank=2)))
    assert engine_problem(model, "default") is None
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", Family(**change))
    assert "differ by" in engine_problem(model, "default")


def test_an_engine_sees_later_changes_of_the_adapter():
    model = decoder("llama")
    adapted(model)
    engine = Engine(model, "default")
    packed, rows = some_layout(NODES)
    for parameter in trainable(model, "default").values():
        parameter.data.mul_(0.5)
    with use(model):
        assert float(engine.loss(packed).detach()) == pytest.approx(
            float(loss_row_by_row(model, rows).detach()), rel=1e-5
        )
    eject(model)
