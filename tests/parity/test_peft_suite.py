"""The LoRA configurations of PEFT's own test-suite: what PEFT saves gives the same output here, or is refused.

The rows are those of tests/test_custom_models.py and the decoder, encoder and sequence-to-sequence tests (0.21), on
small models of the same shape.
"""

import copy

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from merges import load, save
from onebase.adapters.injection import injected, use
from onebase.errors import FormatError
from onebase.models.base import wrap_base
from onebase.models.merging import plan_merge
from onebase.storage.adapter_files import TENSORS
from onebase.storage.format import load_adapter, read_adapter, save_adapter
from onebase.transforms.merge import merged
from onebase.transforms.merge_files import merge_files
from tiny import output, some_ids, tiny, tiny_inputs

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's


class Layers(nn.Module):
    """Named layers, one after the other with a tanh between them; the last gives two log-probabilities."""

    def __init__(self, shape, **layers):
        super().__init__()
        self.shape = shape
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        x = x.reshape(self.shape) if self.shape else x
        for name, layer in self.named_children():
            x = x.flatten(1) if name == "lin0" and self.shape else x
            x = layer(x, x, x)[0] if name == "mha" else layer(x)
            x = x if name == "emb" else x.tanh()
        return x.flatten(1)[:, :2].log_softmax(-1)


class OwnLinear(nn.Module):
    """A linear layer that is none: its weight is a parameter, stored (in, out)."""

    def __init__(self, features, out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(features, out)), nn.Parameter(torch.ones(out))

    def forward(self, x):
        return x @ self.weight + self.bias


def grouped(channels, out, groups):
    return Layers(
        (2, channels, 3, 3), conv2d=nn.Conv2d(channels, out, 3, groups=groups), lin0=nn.Linear(out, 2)
    )


FLOATS, IDS = torch.arange(90.0).reshape(9, 10) / 30, torch.arange(90).reshape(45, 2)
MODELS = {
    "mlp": lambda: (Layers(None, lin0=nn.Linear(10, 20), lin1=nn.Linear(20, 2)), FLOATS),
    "normed": lambda: (
        Layers(None, lin0=nn.Linear(10, 20), norm=nn.LayerNorm(20), lin1=nn.Linear(20, 2)),
        FLOATS,
    ),
    "embedding": lambda: (
        Layers(None, emb=nn.Embedding(100, 5), conv1d=Conv1D(1, 5), flat=nn.Flatten(), lin0=nn.Linear(2, 2)),
        IDS,
    ),
    "conv1d": lambda: (Layers((9, 1, 10), conv1d=nn.Conv1d(1, 1, 2), lin0=nn.Linear(9, 2)), FLOATS),
    "conv2d": lambda: (Layers((2, 5, 3, 3), conv2d=nn.Conv2d(5, 10, 3), lin0=nn.Linear(10, 2)), FLOATS),
    "conv2d 1x1": lambda: (Layers((10, 1, 3, 3), conv2d=nn.Conv2d(1, 4, 1), lin0=nn.Linear(36, 2)), FLOATS),
    "conv2d groups": lambda: (grouped(16, 16, 8), torch.arange(288.0) / 100),
    "conv2d groups2": lambda: (grouped(16, 32, 2), torch.arange(288.0) / 100),
    "conv3d": lambda: (
        Layers((2, 5, 3, 3, 3), conv3d=nn.Conv3d(5, 10, 3), lin0=nn.Linear(10, 2)),
        FLOATS.repeat(3, 1),
    ),
    "mha": lambda: (Layers(None, mha=nn.MultiheadAttention(10, 2), lin0=nn.Linear(10, 2)), FLOATS),
    "parameters": lambda: (Layers(None, lin0=OwnLinear(10, 20), lin1=OwnLinear(20, 2)), FLOATS),
}
LIN0, DORA, ALPHA = {"target_modules": ["lin0"]}, {"use_dora": True}, {"lora_alpha": 32}
ONLY, ALL = {"bias": "lora_only"}, {"bias": "all"}
BIAS, BOTH = {"lora_bias": True, "lora_alpha": 32}, {"target_modules": ["lin0", "lin1"]}


def on(*names):
    return {"target_modules": list(names)}


# (model, PEFT's settings): read, and the same output.
READ = [
    ("mlp", {"target_modules": "lin0"}),
    ("mlp", LIN0),
    ("mlp", on("lin1")),
    ("mlp", BOTH),
    ("mlp", LIN0 | {"modules_to_save": ["lin1"]}),
    ("mlp", LIN0 | {"lora_alpha": 4, "lora_dropout": 0.1}),
    ("mlp", LIN0 | DORA),
    ("mlp", BOTH | DORA),
    ("mlp", {"target_modules": "lin1"} | DORA | ALPHA),
    ("mlp", LIN0 | {"init_lora_weights": "mica", "r": 4}),
    ("mlp", BOTH | BIAS),
    ("mlp", LIN0 | {"target_parameters": ["lin1.weight"]}),
    *(
        ("embedding", on(*names) | extra)
        for extra in ({}, DORA)
        for names in (["conv1d"], ["emb"], ["emb", "conv1d"])
    ),
    ("embedding", on("conv1d") | {"trainable_token_indices": {"emb": [0, 10]}}),
    ("embedding", LIN0 | {"trainable_token_indices": {"emb": [3, 4, 5, 6]}}),
    *((f"conv{n}d", on(f"conv{n}d") | extra) for extra in ({}, DORA, BIAS) for n in (1, 2, 3)),
    *((f"conv{n}d", on(f"conv{n}d", "lin0") | extra) for extra in ({}, DORA) for n in (2, 3)),
    ("conv2d 1x1", on("conv2d")),
    ("mha", on("mha")),
    ("mha", on("mha", "lin0")),
    ("parameters", {"target_parameters": ["lin0.weight"]}),
    ("parameters", {"target_parameters": ["lin1.weight"]}),
]
# (model, settings, what the error names)
REFUSED = [
    ("mlp", LIN0 | {"kasa_config": KasaConfig(), "r": 4}, "kasa_config"),
    ("mlp", LIN0 | {"velora_config": VeloraConfig(num_groups=2, init_type="random")}, "velora_config"),
    ("mlp", BOTH | {"velora_config": VeloraConfig(num_groups=2, init_type="batch_average")}, "velora_config"),
    ("mlp", LIN0 | {"monteclora_config": MontecloraConfig(num_samples=2)}, "monteclora_config"),
    (
        "mlp",
        BOTH | {"use_bdlora": BdLoraConfig(target_modules_bd_a=["lin0"], match_strict=False)},
        "use_bdlora",
    ),
    (
        "mlp",
        BOTH | {"use_bdlora": BdLoraConfig(target_modules_bd_b=["lin1"], nblocks=2, match_strict=False)},
        "use_bdlora",
    ),
    ("mlp", on("lin0") | {"init_lora_weights": "pissa", "r": 4}, "init_lora_weights='pissa'"),
    ("mlp", on("lin0") | {"init_lora_weights": "olora", "r": 4}, "init_lora_weights='olora'"),
    *(
        (f"conv2d {name}", on("conv2d") | extra, r"groups")
        for name in ("groups", "groups2")
        for extra in ({}, DORA)
    ),
]


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = MODELS[name]()
    return model.eval().requires_grad_(False), x


def saved(model, settings, folder):
    """PEFT's model after some training, stored in the folder."""
    theirs = get_peft_model(copy.deepcopy(model), PeftConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(folder)
    return theirs


def label(value):
    return value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items())[:90]


@pytest.mark.parametrize(("name", "settings"), READ, ids=label)
def test_an_adapter_of_pefts_suite_gives_the_same_output(name, settings, tmp_path):
    model, x = build(name)
    theirs = saved(model, settings, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", wrap_base(model))
    with torch.no_grad():
        expected, plain = theirs(x), model(x)
        with injected(model, adapter):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert (expected - plain).abs().max() > 1e-3
        with injected(model, read_adapter(tmp_path / "a")):  # and where the base was not there to ask
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    save_adapter(adapter, tmp_path / "b")
    assert load_adapter(tmp_path / "b", wrap_base(model)) == adapter


@pytest.mark.parametrize(("name", "settings", "told"), REFUSED, ids=label)
def test_an_adapter_that_is_not_computed_is_refused_by_name(name, settings, told, tmp_path):
    model, _ = build(name)
    saved(model, settings, tmp_path / "a")
    with pytest.raises(FormatError, match=told):
        load_adapter(tmp_path / "a", wrap_base(model))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", BOTH | ONLY),
        ("mlp", LIN0 | BIAS | ONLY),
        ("conv2d", on("conv2d", "lin0") | ONLY),
        ("embedding", on("emb", "lin0") | ONLY),
        ("mlp", LIN0 | ALL),  # lin1 has no update
        ("mlp", {"target_modules": "lin0", "rank_pattern": {"lin1": 1}, "use_rslora": True} | ALL),
        ("normed", on("lin1") | ALL),
        ("normed", on("lin1") | {"modules_to_save": ["norm"]} | ALL),
        ("conv2d", on("lin0") | ALL),
        ("embedding", on("emb") | ALL),
    ],
    ids=label,
)
def test_trained_biases_become_a_part_of_the_updates(name, settings, tmp_path):
    """bias="lora_only" and "all" store whole biases; here they are lora_bias, which PEFT reads as the same."""
    model, x = build(name)
    theirs = saved(model, {"r": 2, **settings}, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", wrap_base(model))
    assert adapter.config.lora_bias
    save_adapter(adapter, tmp_path / "b")
    assert load_adapter(tmp_path / "b", wrap_base(model)) == adapter
    with torch.no_grad():
        expected, plain = theirs(x), model(x)
        assert (expected - plain).abs().max() > 1e-3
        with injected(model, adapter):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        with merged(model, adapter):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        if name != "embedding":  # PEFT takes no lora_bias beside an embedding's update, and says so
            again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "b").eval()
            torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(FormatError, match=r"needed to tell what was added[\s\S]*--to peft --base"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_bias_of_a_transformer(name, tmp_path):
    """Those that training left alone are no part of the adapter; norms are small, and trained in full."""
    model, ids = tiny(name), some_ids()
    theirs = saved(
        model, {"r": 2, "target_modules": [{"bert": "query", "gpt2": "c_attn"}[name]]} | ALL, tmp_path / "a"
    )
    adapter = load_adapter(tmp_path / "a", wrap_base(model))
    norm = {"bert": "encoder.layer.0.output.LayerNorm", "gpt2": "transformer.h.0.ln_1"}[name]
    assert adapter.full[norm].keys() == {"weight", "bias"}
    assert not any(t.ndim > 1 for state in adapter.full.values() for t in state.values())
    save_adapter(adapter, tmp_path / "b")
    assert load_adapter(tmp_path / "b", wrap_base(model)) == adapter
    base = save(model, tmp_path / "base")
    whole = load(merge_files(plan_merge(base, tmp_path / "a"), tmp_path / "whole"), type(model))
    with injected(model, adapter), torch.no_grad():
        expected = output(theirs, ids)
        torch.testing.assert_close(output(model, ids), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output(whole, ids), expected, rtol=1e-4, atol=1e-4)
        again = PeftModel.from_pretrained(tiny(name), tmp_path / "b").eval()
        torch.testing.assert_close(output(again, ids), expected, rtol=1e-4, atol=1e-4)
    tensors = load_file(tmp_path / "a" / TENSORS)
    own = {n: t for n, t in model.state_dict().items() if n.endswith(".bias")}
    still = {f"base_model.model.{n}": t for n, t in own.items() if f"base_model.model.{n}" in tensors}
    save_file(tensors | still, tmp_path / "a" / TENSORS)
    assert load_adapter(tmp_path / "a", wrap_base(model)).full == {}


def test_trained_biases_that_have_no_place(tmp_path):
    model, _ = build("mlp")
    attention, _ = build("mha")
    saved(attention, LIN0 | ALL, tmp_path / "mha")
    with pytest.raises(FormatError, match=r"mha\.out_proj\.bias: a trained bias of a NonDynamicallyQ"):
        load_adapter(tmp_path / "mha", wrap_base(attention))
    saved(model, LIN0 | DORA | ALL, tmp_path / "dora all")
    with pytest.raises(FormatError, match=r"lin1\.bias: a trained bias beside DoRA"):
        load_adapter(tmp_path / "dora all", wrap_base(model))
    saved(model, LIN0 | {"bias": "lora_only"}, tmp_path / "a")
    saved(model, LIN0 | DORA | {"bias": "lora_only"}, tmp_path / "dora")
    with pytest.raises(FormatError, match=r"lin0\.bias: a trained bias beside DoRA"):
        load_adapter(tmp_path / "dora", wrap_base(model))
    model.lin0.bias = None
    with pytest.raises(FormatError, match=r"lin0\.bias: a trained bias, and the base has none"):
        load_adapter(tmp_path / "a", wrap_base(model))


DECODER = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05}
TRANSFORMERS = [
    *((name, DECODER) for name in ("llama", "gpt2", "t5", "bert")),
    *((name, DECODER | {"use_dora": True}) for name in ("llama", "gpt2", "t5", "bert")),
    ("llama", DECODER | {"trainable_token_indices": [0, 1, 3]}),
    ("llama-tied", DECODER | {"trainable_token_indices": {"embed_tokens": [0, 1, 3]}}),
    (
        "mixtral",
        {
            "r": 8,
            "lora_alpha": 16,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    (
        "gpt-oss",
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
    ),
    ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
]


@pytest.mark.parametrize(("name", "settings"), TRANSFORMERS, ids=label)
def test_an_adapter_on_transformers_gives_the_same_output(name, settings, tmp_path):
    """Without target_modules PEFT takes its default for the architecture."""
    model, inputs = tiny(name), tiny_inputs(name)
    theirs = saved(model, settings, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", wrap_base(model))
    with torch.no_grad():
        expected = theirs(**inputs)[0]
        with injected(model, adapter):
            got = model(**inputs)[0]
        assert (got - expected).abs().max() <= 2e-4 * expected.abs().max()
        assert (expected - model(**inputs)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "saved_modules", [None, ["embed_tokens", "lm_head"]], ids=["copies", "modules_to_save"]
)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_added_tokens_come_with_the_adapter(name, saved_modules, tmp_path):
    """PEFT resizes the base and stores the larger embedding and head; here they stand in for the plain base's."""
    model = tiny(name)
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(99)
    settings = PeftConfig(
        r=2, target_modules=["q_proj"], modules_to_save=saved_modules, init_lora_weights=False
    )
    theirs = get_peft_model(larger, settings).eval()
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=saved_modules is None)
    adapter = load_adapter(tmp_path / "a", wrap_base(model))
    assert adapter.full.keys() == {"model.embed_tokens", "lm_head"}
    assert {state["weight"].shape for state in adapter.full.values()} == {(99, 32)}
    ids = torch.tensor([[3, 98, 96, 4], [5, 6, 7, 8]])
    with torch.no_grad():
        expected = theirs(ids).logits
        with injected(model, adapter):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
            with use(model, ["default", None]):  # the plain base has no such tokens
                mixed = model(ids).logits
            with use(model, None):
                plain = model(ids[1:]).logits
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1:, :, :96], plain, rtol=1e-4, atol=1e-5)
    assert (mixed[1, :, 96:] == -torch.inf).all()
    save_adapter(adapter, tmp_path / "b")
    assert load_adapter(tmp_path / "b", wrap_base(model)) == adapter
    assert model.get_input_embeddings().weight.shape == (96, 32)
