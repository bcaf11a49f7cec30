"""Trains a tiny model for a few steps in many settings and writes the losses down: `python tests/golden/make.py`.

`losses.json` beside this file holds the loss of every step as it was when the curves were last approved;
`test_golden.py` trains again and compares. A change that moves a curve shows there: make the file anew only where the
change is meant, and say so in the commit. Run it with `PYTHONPATH=tests` from the repository's root; a name or more as
arguments prints the curves of these settings instead of writing.

The base is in float64 and its weights, the rows and the adapter's start come from generators of whole random bits, so
that other processors give the same curves to about 1e-7. Dropout's masks are MKL's, where torch is built with it.
"""

import json
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from onebase.adapters.injection import eject, eval_mode, inject, new_adapter, trainable, use
from onebase.config import LoraConfig, OptimConfig
from onebase.data.pack import prompt_groups
from onebase.data.template import Encoded
from onebase.models.base import wrap_base
from onebase.models.scoring import Thrift, Way, scorer
from onebase.training.checkpoint import Progress
from onebase.training.loop import NAME, Session, Stepped, run_loop
from onebase.training.optim import learned, make_optimizer
from tiny import tiny

LOSSES = Path(__file__).with_name("losses.json")
STEPS = 8
LORA = {"rank": 4, "alpha": 8}
OPTIM = {"lr": 5e-3, "batch_size": 4, "accumulate": 2, "max_steps": STEPS, "epochs": 100, "save_every": 100}

VARIANTS = {
    "lora": ({}, {}),
    "rslora": ({"rslora": True}, {}),
    "dora": ({"dora": True}, {}),
    "pissa": ({"init": "pissa"}, {}),
    "freeze_a": ({}, {"freeze_a": True}),
    "dropout": ({"dropout": 0.2}, {}),
    "group_prompts": ({}, {"group_prompts": True}),
    "lora_plus": ({}, {"lora_plus": 4, "schedule": "cosine", "weight_decay": 0.01, "clip": 0.5}),
    "recompute": ({}, {"recompute": True}),
}
WAYS = {  # which variants each way of scoring computes
    "engine": ("lora", "rslora", "pissa", "freeze_a", "dropout", "group_prompts", "lora_plus", "recompute"),
    "packed": ("lora", "rslora", "dora", "pissa", "freeze_a", "dropout", "group_prompts", "lora_plus"),
    "padded": ("lora", "rslora", "dora", "pissa", "freeze_a", "dropout", "group_prompts", "lora_plus"),
}
SETTINGS = [f"{way} {variant}" for way, variants in WAYS.items() for variant in variants]


def rows() -> list[Encoded]:
    """18 rows that answer six prompts of 9 to 14 tokens, with 3 to 7 tokens each."""
    chance = random.Random(7)
    prompts = [[chance.randrange(3, 96) for _ in range(chance.randint(9, 14))] for _ in range(6)]
    made: list[Encoded] = []
    for number in range(18):
        prompt = prompts[number % 6]
        answer = [chance.randrange(3, 96) for _ in range(chance.randint(3, 7))]
        made.append(Encoded(number + 1, prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return made


def base():
    """A tiny Llama in float64 whose weights are whole random bits; norms are 1."""
    model = tiny("llama").double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((drawn - 0.5) * 0.3)
    return wrap_base(model)


def losses(setting: str) -> list[float]:
    """The loss of every step of one setting, each from the same start."""
    way, variant = setting.split()
    lora, optim = VARIANTS[variant]
    config, frozen, data = OptimConfig(**OPTIM | optim), base(), rows()
    adapter = new_adapter(frozen.model, LoraConfig(**LORA | lora), seed=1)
    inject(frozen.model, adapter, NAME).double()
    parameters = learned(trainable(frozen.model, NAME), config)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with torch.random.fork_rng(), TemporaryDirectory() as folder:
        torch.manual_seed(5)
        session = Session(
            model=frozen.model,
            parameters=parameters,
            optimizer=make_optimizer(parameters, config),
            train_rows=data,
            valid_rows=(),
            score=scorer(frozen, Way(way), NAME, Thrift(checkpoint=config.recompute)),
            groups=prompt_groups(data) if config.group_prompts else (),
            config=config,
            seed=2,
            folder=Path(folder),
            facts={},
            check_unused=True,
        )
        with eval_mode(frozen.model), use(frozen.model, NAME):
            events = list(run_loop(session, Progress(), lambda: False))
    eject(frozen.model)
    return [event.metrics["loss"] for event in events if isinstance(event, Stepped)]


def main() -> None:
    if asked := sys.argv[1:]:
        print(json.dumps({setting: losses(setting) for setting in asked}, indent=1))
        return
    LOSSES.write_text(
        json.dumps({name: losses(name) for name in SETTINGS}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
