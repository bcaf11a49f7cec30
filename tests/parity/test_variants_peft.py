"""PEFT's variants and ours: the same start, the same losses over steps of AdamW, the same merged weights."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from peft import EvaConfig, LoraGAConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft import LoraConfig as PeftConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from onebase.adapters.adapter import parted
from onebase.adapters.calibration import observed
from onebase.adapters.injection import extract, inject, injected, new_adapter, trainable, use
from onebase.adapters.kinds import merged_weight
from onebase.adapters.layers import base_modules
from onebase.adapters.targets import match
from onebase.config import LoraConfig
from onebase.models.base import wrap_base
from onebase.storage.format import load_adapter, read_adapter, save_adapter
from starts import first_half, seen_by
from tiny import output, some_ids, tiny

ARCHS = ("llama", "gpt2")
STEPS = 5
SMALL = {"rank": 4, "alpha": 6}


def peft_model(model, **options):
    """PEFT's model on a copy of the base, in eval mode; it warns where it falls back, which is not the point here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(model), PeftConfig(target_modules="all-linear", **options)).eval()


def peft_options(options):
    names = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}
    return {names.get(key, key): value for key, value in options.items()}


def loss_of(model, seed):
    ids = some_ids(4, 10, seed)
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def descend(model, parameters):
    """The losses of a few steps of AdamW on rows of their own."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.01), []
    for seed in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def ours(model, adapter):
    """The losses, and the adapter after them."""
    inject(model, adapter, "a")
    parameters = [parameter.requires_grad_(True) for parameter in trainable(model, "a").values()]
    with use(model, "a"):
        return descend(model, parameters), extract(model, "a")


def theirs(model):
    return descend(model, [parameter for parameter in model.parameters() if parameter.requires_grad])


def peft_layers(model):
    """PEFT's layers by the paths of the base."""
    found = {n.removeprefix("base_model.model."): m for n, m in model.named_modules()}
    return {name: module for name, module in found.items() if hasattr(module, "lora_A")}


def factors(layer):
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def merged_peft(model):
    model = copy.deepcopy(model).merge_and_unload()
    return dict(base_modules(model))


def same_merged(model, adapter, peer, atol=2e-5):
    """Effective weights: W + s·B·A here, what PEFT merges there (and where its start changed W, that too)."""
    weights, modules = merged_peft(peer), dict(base_modules(model))
    for path, low in adapter.lowrank.items():
        found = merged_weight(modules[path].weight, low)
        torch.testing.assert_close(found, weights[path].weight, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("arch", "init"), [("llama", "pissa"), ("gpt2", "pissa"), ("llama", "olora")])
def test_pissa_and_olora_start_and_learn_as_in_peft(arch, init, rslora):
    """PEFT's OLoRA factors a Conv1D's weight as it is stored, (in, out), and fails on it: so no GPT-2."""
    model, options = tiny(arch), {**SMALL, "rslora": rslora}
    peer = peft_model(model, init_lora_weights=init, **peft_options(options))
    adapter = new_adapter(model, LoraConfig(**options, init=init))
    for path, layer in peft_layers(peer).items():
        a, b = factors(layer)
        low = first_half(adapter.lowrank[path])
        torch.testing.assert_close(low.A, a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(low.B, b, rtol=1e-4, atol=1e-5)
        changed, weight = layer.get_base_layer().weight, model.get_submodule(path).weight
        assert (changed - weight).abs().max() > 1e-3  # PEFT has written to its base; ours holds W - s·B0·A0
        held = parted(adapter.lowrank[path], 4)[1]
        torch.testing.assert_close(merged_weight(weight, held), changed, rtol=1e-4, atol=1e-5)
    same_merged(model, adapter, peer)
    losses, trained = ours(model, adapter)
    assert losses == pytest.approx(theirs(peer), rel=1e-5)
    assert losses[-1] != losses[0]
    same_merged(model, trained, peer, 1e-3)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
def test_a_held_start_learns_as_plain_lora_on_the_changed_base(init, arch, tmp_path):
    """The residual base written out, and PEFT's plain LoRA on it from the same A and B."""
    model, config = tiny(arch), LoraConfig(**SMALL, init=init)
    adapter = new_adapter(model, config, seen=seen_by(model, config))
    residual = copy.deepcopy(model)
    for path, low in adapter.lowrank.items():
        weight = residual.get_submodule(path).weight
        weight.data = merged_weight(weight.data, parted(low, 4)[1]).contiguous()
    start = {path: first_half(low) for path, low in adapter.lowrank.items()}
    plain = replace(new_adapter(model, LoraConfig(**SMALL)), lowrank=start)
    save_adapter(plain, tmp_path / "start")
    peer = PeftModel.from_pretrained(residual, tmp_path / "start", is_trainable=True).eval()
    losses, trained = ours(model, adapter)
    assert losses == pytest.approx(theirs(peer), rel=1e-5)
    same_merged(model, trained, peer, 1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga", "orthogonal"])
def test_peft_reads_a_held_start_as_plain_lora(init, tmp_path):
    """On the plain base, without a word about its start."""
    model, ids, config = tiny("llama"), some_ids(), LoraConfig(**SMALL, init=init, rslora=True)
    adapter = new_adapter(model, config, seen=seen_by(model, config))
    _, trained = ours(model, adapter)
    with use(model, "a"):
        expected = output(model, ids)
    save_adapter(trained, tmp_path / "a")
    peer = PeftModel.from_pretrained(tiny("llama"), tmp_path / "a").eval()
    torch.testing.assert_close(output(peer, ids), expected, rtol=1e-4, atol=1e-4)
    assert (output(tiny("llama"), ids) - expected).abs().max() > 1e-2


def test_orthogonal_is_drawn_as_in_peft():
    """Other random numbers, the same distribution: sizes of the factors, and no product."""
    model = tiny("llama")
    peer = peft_model(model, init_lora_weights="orthogonal", r=8, lora_alpha=8)
    adapter = new_adapter(model, LoraConfig(rank=8, alpha=8, init="orthogonal"))
    sizes = {"A": [], "B": []}
    for path, layer in peft_layers(peer).items():
        a, b = factors(layer)
        low = adapter.lowrank[path]
        for name, mine, other in (("A", low.A, a), ("B", low.B, b)):
            sizes[name].append((mine.square().mean(), other.square().mean()))
        for one in (b @ a, low.B @ low.A):
            assert one.abs().max() < 1e-6
    for pairs in sizes.values():
        mine, other = (torch.stack(side).mean().sqrt() for side in zip(*pairs, strict=True))
        assert float(mine) == pytest.approx(float(other), rel=0.1)


@pytest.mark.parametrize("arch", ARCHS)
def test_eva_spans_what_pefts_does(arch):
    """PEFT without ranks spread anew (rho 1), and until nothing moves: its components are our eigenvectors."""
    model, ids = tiny(arch), some_ids(24, 12)
    config = EvaConfig(rho=1.0, tau=0.99999)
    peer = peft_model(model, init_lora_weights="eva", r=4, lora_alpha=6, eva_config=config)
    initialize_lora_eva_weights(peer, [{"input_ids": ids}], show_progress_bar=False)
    ours_config = LoraConfig(**SMALL, init="eva")
    adapter = new_adapter(model, ours_config, seen=seen_by(model, ours_config, ids))
    assert peer.peft_config["default"].rank_pattern == {}
    for path, layer in peft_layers(peer).items():
        a, b = factors(layer)
        low = adapter.lowrank[path]
        # Theirs is an incremental, randomised SVD: the leading directions agree, the last one nearly.
        overlap = torch.linalg.svdvals(low.A @ a.T)
        assert overlap[:3].min() > 0.98
        assert (low.A[0] @ a[0]) > 0.99  # and with the same sign
        assert not b.any()
        assert not low.B.any()


@pytest.mark.parametrize("arch", ARCHS)
def test_lora_ga_starts_as_pefts_does(arch):
    """PEFT looks in train mode, ours in eval mode: so without GPT-2's dropout."""
    model, ids = tiny(arch), some_ids(6, 12)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    options = PeftConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
        target_modules=_names(model),
    )
    twin = copy.deepcopy(model)

    def step():
        twin(input_ids=ids).logits.square().mean().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its hooks sit on modules whose inputs carry no gradient
        preprocess_loraga(twin, options, step)
    grads = {n: m._peft_loraga_grad for n, m in twin.named_modules() if hasattr(m, "_peft_loraga_grad")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = get_peft_model(twin, options).eval()
    config = LoraConfig(**SMALL, init="lora_ga")
    seen = seen_by(model, config, ids)
    adapter = new_adapter(model, config, seen=seen)
    for path, layer in peft_layers(peer).items():
        grad = grads[path].T if arch == "gpt2" else grads[path]
        torch.testing.assert_close(seen[path], grad, rtol=1e-3, atol=1e-3 * grad.abs().max())
        a, b = factors(layer)
        low = first_half(adapter.lowrank[path])
        assert torch.linalg.svdvals(low.A @ a.T).min() > 0.99
        spans = [torch.linalg.qr(side).Q for side in (low.B, b)]
        assert torch.linalg.svdvals(spans[0].T @ spans[1]).min() > 0.98
        # PEFT takes out for a Conv1D's rows, which are its in features.
        rows, out = layer.get_base_layer().weight.shape[0], low.B.shape[0]
        assert float(low.B.norm()) == pytest.approx(float(b.norm()) * (out / rows) ** 0.25, rel=1e-3)
    if arch == "llama":
        same_merged(model, adapter, peer)


def _names(model):
    return sorted({target.path.rsplit(".", 1)[-1] for target in match(model, LoraConfig(rank=2)).targets})


def shake(model):
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)


class Small(nn.Module):
    """An embedding, convolutions and a layer without a bias, for kinds that language models lack."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.wave = nn.Conv1d(12, 10, 3, padding=1, dilation=1)
        self.image = nn.Conv2d(10, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.wave(self.words(ids).mT)
        x = self.image(x[:, :, None, :].expand(-1, -1, 4, -1))
        return self.head(x.mean((-1, -2)))


def small():
    torch.manual_seed(0)
    return Small().requires_grad_(False).eval()


VARIANTS = {
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
}
MODELS = {
    "llama": (lambda: tiny("llama"), ["q_proj", "up_proj"]),
    "gpt2": (lambda: tiny("gpt2"), ["c_attn", "c_fc"]),
    "tied": (lambda: tiny("llama-tied"), ["embed_tokens", "q_proj"]),
    "small": (small, ["words", "wave", "image", "head"]),
    "layers": (small, ["wave", "image", "head"]),
}
CASES = [
    *((variant, name) for variant in ("dora", "dora, rslora") for name in ("llama", "gpt2", "tied", "small")),
    *(("lora_bias", name) for name in ("gpt2", "layers")),
]


def run(model, ids):
    result = model(ids)
    return result.logits if hasattr(result, "logits") else result


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_dora_and_lora_bias_compute_what_pefts_do(variant, name, tmp_path):
    """Output, gradients and merged weights of an adapter that PEFT made, and the start of our own.

    No padding token: PEFT gives its row no gradient.
    """
    make, names = MODELS[name]
    model, ids = make(), torch.arange(1, 19).reshape(3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = get_peft_model(
            copy.deepcopy(model), PeftConfig(r=4, lora_alpha=6, target_modules=names, **VARIANTS[variant])
        ).eval()
        options = {
            "dora": "dora" in variant,
            "rslora": "rslora" in variant,
            "lora_bias": variant == "lora_bias",
        }
        fresh = new_adapter(model, LoraConfig(**SMALL, target_modules=names, **options))
        for path, layer in peft_layers(peer).items():
            if "dora" in variant:
                magnitude = layer.lora_magnitude_vector["default"].weight.detach().flatten()
                torch.testing.assert_close(fresh.lowrank[path].magnitude, magnitude)
            else:
                assert torch.equal(fresh.lowrank[path].bias, layer.lora_B["default"].bias.detach())
        shake(peer)
        peer.save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", wrap_base(model))
    assert adapter.lowrank.keys() == fresh.lowrank.keys()
    plain = run(model, ids)
    expected = run(peer, ids)
    expected.square().mean().backward()
    with injected(model, adapter):
        parameters = trainable(model, "default")
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        found = run(model, ids)
        found.square().mean().backward()
        grads = {key: p.grad.flatten() for key, p in parameters.items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2
    compare_gradients(grads, peer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tied embedding: PEFT says that merging it unties
        same_merged(model, adapter, peer)


ENDS = {
    "A": ("lora_A.default.weight", "lora_embedding_A.default"),
    "B": ("lora_B.default.weight", "lora_embedding_B.default"),
    "bias": ("lora_B.default.bias",),
    "magnitude": ("lora_magnitude_vector.default.weight", "lora_magnitude_vector.default"),
}


def compare_gradients(grads, peer):
    theirs_by_name = {n: p.grad for n, p in peer.named_parameters() if p.requires_grad}
    assert len(grads) == len(theirs_by_name)
    for name, grad in grads.items():
        path, side = name.rsplit(".", 1)
        keys = [f"base_model.model.{path}.{end}" for end in ENDS[side]]
        (their,) = [theirs_by_name[key] for key in keys if key in theirs_by_name]
        torch.testing.assert_close(grad, their.flatten(), rtol=1e-3, atol=1e-6 + 1e-4 * their.abs().max())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("variant", ["dora", "lora_bias", "dora, pissa"])
def test_dora_and_lora_bias_learn_as_in_peft(arch, variant, tmp_path):
    if variant == "lora_bias" and arch == "llama":
        pytest.skip("no layer of it has a bias")
    model = tiny(arch)
    init = "pissa" if "pissa" in variant else "default"
    config = LoraConfig(**SMALL, dora="dora" in variant, lora_bias=variant == "lora_bias", init=init)
    adapter = new_adapter(model, config, seed=1)
    if init == "pissa":
        peer = peft_model(model, r=4, lora_alpha=6, init_lora_weights="pissa", use_dora=True)
    else:
        save_adapter(adapter, tmp_path / "start")
        peer = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "start", is_trainable=True).eval()
    losses, trained = ours(model, adapter)
    assert losses == pytest.approx(theirs(peer), rel=1e-5)
    same_merged(model, trained, peer, 1e-3)
    for low in trained.lowrank.values():
        start = low.magnitude if "dora" in variant else low.bias
        assert start is not None
        assert start.any()


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa"])
def test_peft_reads_a_bias_beside_any_start(init, tmp_path):
    """PEFT refuses a config of lora_bias that names a start, so ours names it elsewhere."""
    adapter = new_adapter(tiny("gpt2"), LoraConfig(**SMALL, init=init, lora_bias=True))
    save_adapter(adapter, tmp_path / "a")
    assert read_adapter(tmp_path / "a") == adapter
    PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "a")


def test_observed_gradients_do_not_need_the_whole_model(tmp_path):
    """A plain module of the user's own, with a loss of its own."""
    model, config = small(), LoraConfig(rank=2, alpha=2, init="lora_ga", target_modules=["head"])
    ids = torch.arange(1, 19).reshape(3, 6)
    with observed(model, match(model, config).targets, "lora_ga") as seen:
        model(ids).square().sum().backward()
    weight = copy.deepcopy(model)
    weight.head.weight.requires_grad_(True)
    weight(ids).square().sum().backward()
    torch.testing.assert_close(seen["head"], weight.head.weight.grad, rtol=1e-4, atol=1e-6)
