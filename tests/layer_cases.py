"""A model for every kind of layer, plain modules and transformers, each with its inputs and what to adapt in it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from onebase.config import LoraConfig
from tiny import tiny, tiny_inputs


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 6, bias=False)

    def forward(self, x):
        return self.lin1(self.lin0(x).relu())


class Convolutions(nn.Module):
    """One with everything that a convolution can have, then one that is a matrix at each position."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Attention(nn.Module):
    """Self-attention, or attention to inputs of other widths, whose three weights are stored apart."""

    def __init__(self, batch_first, **widths):
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 4, batch_first=batch_first, bias=not widths, **widths)
        self.lin = nn.Linear(16, 3)
        self.widths = list(widths.values())

    def forward(self, x):
        x = x if self.mha.batch_first else x.transpose(0, 1)
        y, weights = self.mha(x, *(x[..., :width] for width in self.widths or (16, 16)))
        y = y if self.mha.batch_first else y.transpose(0, 1)
        return self.lin(y) + weights.square().mean((1, 2))[:, None, None]


class Encoder(nn.Module):
    """torch's own encoder, whose eval mode has a fused path; the last positions of each row are padding."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -2:] = True
        return self.encoder(x, src_key_padding_mask=padding)[:, :-2]


class Parameters(nn.Module):
    """Parameters that their module uses without a layer: a matrix, a stack of them, one that is no matrix product."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Parameter(torch.randn(6, 12))  # registered before `up`
            self.up = nn.Parameter(torch.randn(12, 6))

        def forward(self, x):
            return F.linear(F.linear(x, self.up).tanh(), self.down)

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 5, 6))
            self.mix = nn.Parameter(torch.randn(4, 3, 6))

        def forward(self, x):
            return torch.einsum("bti,koi->bto", x + self.position, self.mix)

    def __init__(self):
        super().__init__()
        self.inner, self.heads = self.Inner(), self.Heads()

    def forward(self, x):
        return self.heads(self.inner(x))


VARIANTS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "lora_bias": {"lora_bias": True},
}
PLAIN, NO_BIAS = ("lora", "rslora"), ("lora", "dora")


class Case(NamedTuple):
    """A model, its input's shape without the rows (or a transformers model's name), and what to adapt."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = ()
    targets: str | list[str] = "all-linear"
    parameters: tuple[str, ...] = ()
    variants: tuple[str, ...] = tuple(VARIANTS)
    name: str = ""  # of a tiny transformers model
    fused: bool = False  # torch has a path for the whole layer, which it takes where nothing stands inside

    def model(self) -> nn.Module:
        """In eval mode, nothing to train, the same each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().eval().requires_grad_(False)

    def inputs(self, rows: int = 3) -> dict[str, torch.Tensor]:
        """Keyword arguments, rows first."""
        if self.name:
            return tiny_inputs(self.name, rows)
        return {"x": torch.randn(rows, *self.shape, generator=torch.Generator().manual_seed(1))}

    def config(self, variant: str = "lora") -> LoraConfig:
        """What to adapt, as a variant."""
        options = {"target_modules": self.targets, "target_parameters": self.parameters} | VARIANTS[variant]
        return LoraConfig(rank=2, alpha=5, **options)

    def call(self, model: nn.Module, rows: slice = slice(None), count: int = 3) -> torch.Tensor:
        """The model's output for some of the rows."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs(count).items()}
        if self.fused and torch.is_grad_enabled():  # which shuts the fused path
            inputs["x"] = inputs["x"].requires_grad_(True)
        result = model(**inputs)
        return result if isinstance(result, torch.Tensor) else result.logits


def _conv1d():
    wide = nn.Conv1d(4, 6, 3, stride=2, padding=3, dilation=2, padding_mode="reflect")
    return Convolutions(wide, nn.Conv1d(6, 5, 1, bias=False))


def _conv2d():
    wide = nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), padding_mode="circular")
    return Convolutions(wide, nn.Conv2d(5, 4, 3, padding="same", bias=False))


def _conv3d():
    wide = nn.Conv3d(2, 4, (2, 3, 1), padding=(1, 2, 0), padding_mode="replicate")
    return Convolutions(wide, nn.Conv3d(4, 3, 1))


def _strided(kind: type[nn.Module], channels: int) -> nn.Module:
    """What PEFT computes right: it drops a convolution's dilation and padding mode, and does not merge 1x1x1."""
    return Convolutions(kind(channels, 6, 2, stride=2, padding=1), kind(6, 5, 2, bias=False))


EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
BOTH = ["first", "second"]


def _tiny(name: str, targets: str | list[str] = "all-linear", parameters=(), variants=PLAIN) -> Case:
    return Case(lambda: tiny(name), (), targets, parameters, variants, name)


CASES: dict[str, Case] = {
    "mlp": Case(Mlp, (10,)),
    "conv1d": Case(_conv1d, (4, 11), BOTH),
    "conv2d": Case(_conv2d, (3, 7, 6), BOTH),
    "conv3d": Case(_conv3d, (2, 4, 3, 2), BOTH),
    "conv1d, strided": Case(lambda: _strided(nn.Conv1d, 4), (4, 7), BOTH),
    "conv2d, strided": Case(lambda: _strided(nn.Conv2d, 3), (3, 6, 5), BOTH),
    "conv3d, strided": Case(lambda: _strided(nn.Conv3d, 2), (2, 4, 3, 5), BOTH),
    "attention": Case(lambda: Attention(True), (5, 16), ["mha", "lin"], (), PLAIN),
    "attention, sequence first": Case(lambda: Attention(False), (5, 16), ["mha"], (), PLAIN),
    "attention, weights apart": Case(lambda: Attention(True, kdim=12, vdim=8), (5, 16), ["mha"], (), PLAIN),
    "encoder": Case(Encoder, (6, 16), ["self_attn", "linear1", "linear2"], (), PLAIN, fused=True),
    "parameters": Case(Parameters, (5, 6), [], ("down", "up", "mix"), PLAIN),
    "a layer's weight": Case(Mlp, (10,), ["lin0"], ("lin1.weight",), PLAIN),
    "mixtral": _tiny("mixtral"),
    "qwen3-moe": _tiny("qwen3-moe"),
    "gpt-oss": _tiny("gpt-oss", variants=tuple(VARIANTS)),
    "gpt-oss experts": _tiny("gpt-oss", ["q_proj"], EXPERTS),
    "t5": _tiny("t5", variants=NO_BIAS),
    "t5 embeddings": _tiny("t5", ["embed_tokens", "lm_head", "wi", "q"], variants=NO_BIAS),
    "vit": _tiny("vit", variants=tuple(VARIANTS)),
    "vit patches": _tiny("vit", ["projection", "classifier", "q_proj"], variants=tuple(VARIANTS)),
}
EACH = [(name, variant) for name, case in CASES.items() for variant in case.variants]
