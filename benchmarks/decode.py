"""Decoding one request and 16, with no adapter and with one, against transformers' `generate` and PEFT.

Greedy, float32, tokens a second after everybody's first one. The gate: the tokens are theirs, also where the weights
were packed without loss. Fewer bits are measured beside it, with what they cost in logits and in held-out loss; and
with `--python`, an interpreter that has llama-cpp-python, llama.cpp on the built-in base's own Q4_1 file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch

from benchmarks.common import Gate, Result, alternate, checked, conclude, medians, parser, show
from benchmarks.serving import (
    SLOTS,
    Sides,
    begin,
    keep_tokens,
    new_engine,
    of_generate,
    of_onebase,
    options,
    other_tokens,
    prompts,
    with_peft,
)
from benchmarks.workload import load_rows, prompt_length
from onebase.files import cache_home
from onebase.models.base import Base, load_base
from onebase.models.builtin import BUILTINS, fetch_builtin
from onebase.serve.proof import choose_product
from onebase.serve.runner import Row, Runner

EXACT, FEWER_BITS = ("native", "packed"), ("int8", "int4")
BATCHES, ADAPTERS = (1, SLOTS), ("base", "adapter")
TARGETS = {"batch 1, adapter: transformers' base": 2.0}
HELD_OUT = 32  # rows
LLAMA = "llama.cpp Q4_1"
WAYS = (*EXACT, *FEWER_BITS)


def case_name(batch: int, adapter: str) -> str:
    return f"batch {batch}, {adapter}"


def ours(given: argparse.Namespace) -> dict[str, float]:
    base = load_base(given.base, "float32")
    asked = prompts(base, given.data, SLOTS)
    longest = max(map(len, asked)) + given.tokens + 1
    found: dict[str, float] = {}
    for weights in WAYS:
        engine, said = new_engine(base, Path(given.folder) / "adapters", weights, longest), {}
        of_onebase(engine, asked, [None] * SLOTS, 4)  # warm
        for batch, adapter in product(BATCHES, ADAPTERS):
            names = ["a0" if adapter == "adapter" else None] * batch
            done = of_onebase(engine, asked[:batch], names, given.tokens)
            found[f"{case_name(batch, adapter)}, {weights}"] = done.per_second
            said[case_name(batch, adapter)] = done.tokens
        keep_tokens(given.folder, weights, said)
    return found


def peer(given: argparse.Namespace) -> dict[str, float]:
    base = load_base(given.base, "float32")
    asked = prompts(base, given.data, SLOTS)
    found, said = {}, {}
    with torch.inference_mode():
        of_generate(base.model, asked, 4)
        for adapter in ADAPTERS:
            model = (
                with_peft(base, Path(given.folder) / "adapters", ["a0"])
                if adapter == "adapter"
                else base.model
            )
            for batch in BATCHES:
                done = of_generate(model, asked[:batch], given.tokens)
                found[case_name(batch, adapter)], said[case_name(batch, adapter)] = (
                    done.per_second,
                    done.tokens,
                )
    keep_tokens(given.folder, "peer", said)
    return found


def cost(given: argparse.Namespace) -> dict[str, float]:
    """What each way to hold the weights costs: the loss of held-out answers, and the logits against torch's."""
    base = load_base(given.base, "float32")
    exact, first = held_out(base, given.data, "plain"), dict[str, float]()
    first["loss, plain"] = exact[0]
    for weights in WAYS:
        loss, logits = held_out(base, given.data, weights)
        apart = (logits - exact[1]).abs().amax() / exact[1].abs().amax()
        same = (logits.argmax(dim=-1) == exact[1].argmax(dim=-1)).float().mean()
        found = {"loss": loss, "logits": float(apart), "same token": float(same)}
        first |= {f"{name}, {weights}": value for name, value in found.items()}
    return first


def held_out(base: Base, data: str, weights: str) -> tuple[float, torch.Tensor]:
    """(nats a token of the answers, the logits there), token by token as in decoding."""
    rows = load_rows(base, data, HELD_OUT)
    longest = max(len(row.ids) for row in rows)
    runner = Runner(base.model, len(rows), longest, choose_product(base.model, weights).hold)
    lost, logits = list[torch.Tensor](), list[torch.Tensor]()
    runner.forward([Row(slot, row.ids[: prompt_length(row) - 1], 0, False) for slot, row in enumerate(rows)])
    for at in range(longest):
        places = {slot: prompt_length(row) - 1 + at for slot, row in enumerate(rows)}
        running = {slot: place for slot, place in places.items() if place + 1 < len(rows[slot].ids)}
        if not running:
            break
        asked = [Row(slot, [rows[slot].ids[place]], place) for slot, place in running.items()]
        logits.append(runner.forward(asked))
        wanted = torch.tensor([rows[slot].ids[place + 1] for slot, place in running.items()])
        lost.append(torch.nn.functional.cross_entropy(logits[-1], wanted, reduction="none"))
    return float(torch.cat(lost).mean()), torch.cat(logits)


def llama(given: argparse.Namespace) -> dict[str, float]:
    """llama.cpp's tokens a second for the first prompt, and how many of its tokens are those of our packed weights."""
    if given.base not in BUILTINS:
        raise SystemExit(f"--python needs a built-in base ({', '.join(BUILTINS)}), not {given.base}")
    model = fetch_builtin(BUILTINS[given.base], cache_home())
    prompt = prompts(load_base(given.base, "float32"), given.data, 1)[0]
    task = {"model": str(model), "prompt": prompt, "count": given.tokens, "threads": torch.get_num_threads()}
    command = [given.python, str(Path(__file__).with_name("llama_decode.py")), json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama.cpp failed:\n{done.stderr}")
    found = json.loads(done.stdout)
    ours = json.loads((Path(given.folder) / "packed.json").read_text("utf-8"))[case_name(1, "base")][0]
    same = sum(a == b for a, b in zip(found["tokens"], ours, strict=True)) / len(ours)
    return {LLAMA: found["tokens_per_second"], "same tokens": same}


def main(given: argparse.Namespace) -> None:
    sides = Sides(__file__, given, 1)
    given.folder = sides.folder
    names = ("ours", "peer", *([LLAMA] if given.python else []))
    try:
        runs = alternate(given.runs, lambda side: llama(given) if side == LLAMA else sides.run(side), names)
        costs = sides.run("cost")
        gates = [
            Gate(f"{weights}: greedy tokens of {count:.0f} that are not PEFT's", wrong, 0)
            for weights in EXACT
            for wrong, count in [other_tokens(sides.folder, weights)]
        ]
    finally:
        sides.close()
    passed = checked("decode", *gates)
    mine, theirs = medians(runs["ours"]), medians(runs["peer"])
    compared = {
        "batch 1, adapter: transformers' base": (mine["batch 1, adapter, native"], theirs["batch 1, base"])
    }
    for (batch, adapter), weights in product(product(BATCHES, ADAPTERS), WAYS):
        case, other = case_name(batch, adapter), "transformers" if adapter == "base" else "PEFT"
        compared[f"{case}, {weights}: {other}"] = (mine[f"{case}, {weights}"], theirs[case])
    if given.python:
        q4, same = (medians(runs[LLAMA])[name] for name in (LLAMA, "same tokens"))
        compared |= {
            f"batch 1, base, {w}: {LLAMA}": (mine[f"batch 1, base, {w}"], q4) for w in ("packed", "int4")
        }
        print(f"{LLAMA}: {same:.0%} of its tokens are those of the packed weights", file=sys.stderr)
    measured = [
        (weights, *(f"{costs[f'{name}, {weights}']:.4g}" for name in ("loss", "logits", "same token")))
        for weights in WAYS
    ]
    head = (
        "weights",
        f"held-out loss ({costs['loss, plain']:.4g} by torch)",
        "logits differ by",
        "same likeliest token",
    )
    show("what the weights' bits cost", head, measured)
    tokens = dict.fromkeys(compared, "tokens/s")
    # Figures beside the claims: they have no other side.
    mine_too = {name: one for name, (one, _) in compared.items()} | costs
    result = Result(
        "decode",
        mine_too,
        {name: other for name, (_, other) in compared.items()},
        tokens | dict.fromkeys(costs, "nats, share of the largest logit, share of tokens"),
        TARGETS,
        passed,
        given.runs,
        more=True,
    )
    conclude("decoding, float32", result)


if __name__ == "__main__":
    ALL = {"ours": ours, "peer": peer, "cost": cost}
    made = options(parser(__doc__, 3, tuple(ALL)), 48)
    made.add_argument("--python", default="", help="an interpreter that has llama-cpp-python")
    arguments = made.parse_args()
    begin(arguments, main, ALL)
