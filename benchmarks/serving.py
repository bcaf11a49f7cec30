"""The work that the serving benchmarks share: prompts, adapters on disk, and how fast each side decodes."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import Result, in_fresh_process
from benchmarks.workload import BASE, DATA, load_rows, prompt_length
from onebase.adapters.adapter import Origin
from onebase.adapters.injection import new_adapter
from onebase.config import LoraConfig
from onebase.models.base import Base, load_base
from onebase.serve.engine import Engine
from onebase.serve.pool import AdapterPool
from onebase.serve.request import Limits, Request
from onebase.storage.format import save_adapter

RANK, ALPHA = 8, 16.0
SLOTS = 16
Tokens = list[list[int]]
Main = Callable[[argparse.Namespace], None]
Side = Callable[[argparse.Namespace], dict[str, float]]


def options(made: argparse.ArgumentParser, tokens: int) -> argparse.ArgumentParser:
    """What the serving benchmarks can be told."""
    made.add_argument("--base", default=BASE, help=f"base model (default: {BASE})")
    made.add_argument("--data", default=DATA, help=f"rows whose prompts are used (default: {DATA})")
    made.add_argument("--tokens", type=int, default=tokens, help=f"tokens of an answer (default: {tokens})")
    made.add_argument("--folder", help=argparse.SUPPRESS)  # where the adapters are, and the sides' tokens go
    return made


def passed_on(given: argparse.Namespace, folder: str) -> list[str]:
    """The same options for one side's process."""
    return ["--base", given.base, "--data", given.data, "--tokens", str(given.tokens), "--folder", folder]


def prompts(base: Base, data: str, count: int) -> list[tuple[int, ...]]:
    """The first `count` different prompts of the rows."""
    found: dict[tuple[int, ...], None] = {}
    for row in load_rows(base, data, 40 * count):
        found.setdefault(tuple(row.ids[: prompt_length(row)]))
        if len(found) == count:
            return list(found)
    raise SystemExit(f"{data} has {len(found)} different prompts in its first rows, {count} are needed")


def write_adapters(base: Base, folder: Path, count: int) -> list[str]:
    """Adapters on all linear layers, a0, a1 ..., each of other values, B away from 0; gives the names."""
    start = new_adapter(
        base.model, LoraConfig(rank=RANK, alpha=ALPHA), 0, Origin(base.name, base.fingerprint)
    )
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        low = {
            path: one._replace(B=torch.randn(one.B.shape, generator=draw) * 5e-3)
            for path, one in start.lowrank.items()
        }
        save_adapter(replace(start, lowrank=low), folder / f"a{number}")
    return [f"a{number}" for number in range(count)]


class Decoded(NamedTuple):
    """What a side said, and how fast after everybody's first token."""

    tokens: Tokens
    per_second: float


def of_onebase(
    engine: Engine, asked: Sequence[tuple[int, ...]], names: Sequence[str | None], count: int
) -> Decoded:
    """The engine's answers to all prompts at once."""
    for number, (prompt, name) in enumerate(zip(asked, names, strict=True)):
        engine.add_request(Request(str(number), prompt, name, max_tokens=count))
    found: Tokens = [[] for _ in asked]
    start, before = 0.0, 0
    while engine.has_work:
        for event in engine.step():
            found[int(event.request)] += event.tokens
        if not start and all(found):
            start, before = time.perf_counter(), sum(map(len, found))
    return Decoded(found, (sum(map(len, found)) - before) / (time.perf_counter() - start))


def new_engine(base: Base, folder: Path, weights: str, longest: int, **limits: Any) -> Engine:
    """An engine of 16 slots that hold the longest sequence."""
    made = Engine(base, AdapterPool(base, folder), Limits(slots=SLOTS, context=longest, **limits), weights)
    if made.slow:
        raise SystemExit(f"the engine does not compute this base: {made.slow}")
    return made


class _Clock:
    """A logits processor that notes when each token is chosen."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def of_generate(
    model: Any, asked: Sequence[tuple[int, ...]], count: int, names: Sequence[str] | None = None
) -> Decoded:
    """transformers' `generate` on all prompts at once, padded on the left; `names`: PEFT's adapter for each."""
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in asked])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
    clock = _Clock()
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        logits_processor=[clock],
        **({} if names is None else {"adapter_names": list(names)}),
    )
    seconds = clock.times[-1] - clock.times[0]
    return Decoded(made[:, longest:].tolist(), (count - 1) * len(asked) / seconds)


def with_peft(base: Base, folder: Path, names: Sequence[str]) -> Any:
    """The base inside PEFT, with these adapters."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(base.model, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    return model


def keep_tokens(folder: str, side: str, found: dict[str, Tokens]) -> None:
    """Leave a side's answers where the gate finds them."""
    (Path(folder) / f"{side}.json").write_text(json.dumps(found), encoding="utf-8")


def other_tokens(folder: str, one: str = "ours", other: str = "peer") -> tuple[float, float]:
    """(how many of one side's tokens are not the other's, of how many), over the cases that both have."""
    mine, theirs = (json.loads((Path(folder) / f"{side}.json").read_text("utf-8")) for side in (one, other))
    pairs = [
        (a, b)
        for case in mine.keys() & theirs.keys()
        for row, other_row in zip(mine[case], theirs[case], strict=True)
        for a, b in zip(row, other_row, strict=True)
    ]
    return float(sum(a != b for a, b in pairs)), float(len(pairs))


def compared(name: str, pairs: Mapping[str, tuple[float, float]], unit: str, **more: Any) -> Result:
    """The result of (ours, the other's) for each claim, all in one unit; `more`: the other fields."""
    ours, others = ({claim: pair[side] for claim, pair in pairs.items()} for side in (0, 1))
    return Result(name, ours, others, dict.fromkeys(pairs, unit), **more)


def begin(given: argparse.Namespace, main: Main, sides: Mapping[str, Side]) -> None:
    """Run the benchmark, or in a process of its own the side that it asked for."""
    if given.side:
        print(json.dumps(sides[given.side](given)))
    else:
        main(given)


class Sides:
    """Runs the sides of a benchmark in fresh processes that share a folder of adapters."""

    def __init__(self, script: str, given: argparse.Namespace, adapters: int) -> None:
        self._script, self._given = script, given
        self._place = tempfile.TemporaryDirectory()
        self.folder = self._place.name
        (Path(self.folder) / "adapters").mkdir()
        write_adapters(load_base(given.base, "float32"), Path(self.folder) / "adapters", adapters)

    def run(self, side: str) -> dict[str, float]:
        """One run of a side."""
        return in_fresh_process(self._script, side, *passed_on(self._given, self.folder))

    def close(self) -> None:
        """Delete the adapters."""
        self._place.cleanup()
