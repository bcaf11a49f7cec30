"""Decoding 16 requests on 16 different adapters, against PEFT's mixed batch and against our own base alone.

Greedy, float32, tokens a second after everybody's first one. The gate: every adapter's tokens are PEFT's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common import Gate, alternate, checked, conclude, medians, parser
from benchmarks.serving import (
    SLOTS,
    Sides,
    begin,
    compared,
    keep_tokens,
    new_engine,
    of_generate,
    of_onebase,
    options,
    other_tokens,
    prompts,
    with_peft,
)
from onebase.models.base import load_base

NAMES = [f"a{number}" for number in range(SLOTS)]
TARGETS = {"16 adapters: PEFT's mixed batch": 6.0, "16 adapters: our base": 0.8, "base: transformers": 1.6}
OURS = {"native": "ours", "packed": "packed"}  # how the weights are held -> whose tokens the gate reads
PACKED = "16 adapters, packed: PEFT's mixed batch"


def ours(given: argparse.Namespace) -> dict[str, float]:
    base = load_base(given.base, "float32")
    asked = prompts(base, given.data, SLOTS)
    longest = max(map(len, asked)) + given.tokens + 1
    found: dict[str, float] = {}
    for weights, side in OURS.items():
        said = {}
        engine = new_engine(base, Path(given.folder) / "adapters", weights, longest)
        of_onebase(engine, asked, NAMES, 4)  # warm
        cases = {"adapters": NAMES, "base": [None] * SLOTS}
        for case, names in cases.items():
            done = of_onebase(engine, asked, names, given.tokens)
            found[f"{case} {weights}"], said[case] = done.per_second, done.tokens
        keep_tokens(given.folder, side, said)
    return found


def peer(given: argparse.Namespace) -> dict[str, float]:
    base = load_base(given.base, "float32")
    asked = prompts(base, given.data, SLOTS)
    with torch.inference_mode():
        of_generate(base.model, asked, 4)
        plain = of_generate(base.model, asked, given.tokens)
        model = with_peft(base, Path(given.folder) / "adapters", NAMES)
        mixed = of_generate(model, asked, given.tokens, NAMES)
    keep_tokens(given.folder, "peer", {"adapters": mixed.tokens, "base": plain.tokens})
    return {"adapters": mixed.per_second, "base": plain.per_second}


def main(given: argparse.Namespace) -> None:
    sides = Sides(__file__, given, SLOTS)
    try:
        runs = alternate(given.runs, sides.run)
        gates = [
            Gate(f"{label}greedy tokens of {count:.0f} that are not PEFT's", wrong, 0)
            for label, side in (("", "ours"), ("packed: ", "packed"))
            for wrong, count in [other_tokens(sides.folder, side)]
        ]
    finally:
        sides.close()
    passed = checked("mixed_decode", *gates)
    mine, theirs = medians(runs["ours"]), medians(runs["peer"])
    pairs = {
        "16 adapters: PEFT's mixed batch": (mine["adapters native"], theirs["adapters"]),
        "16 adapters: our base": (mine["adapters native"], mine["base native"]),
        "base: transformers": (mine["base native"], theirs["base"]),
        PACKED: (mine["adapters packed"], theirs["adapters"]),
        "16 adapters, packed: our base": (mine["adapters packed"], mine["base packed"]),
        "base, packed: transformers": (mine["base packed"], theirs["base"]),
    }
    result = compared(
        "mixed_decode", pairs, "tokens/s", target=TARGETS, gate=passed, runs=given.runs, more=True
    )
    conclude("16 requests at once, float32", result)


if __name__ == "__main__":
    arguments = options(parser(__doc__, 3), 48).parse_args()
    begin(arguments, main, {"ours": ours, "peer": peer})
