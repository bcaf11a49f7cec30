"""`onebase serve` under load for minutes: is every answer right, does anything leak, get stuck or fail, how fast is it?

Clients ask a server of its own process for adapters, the base and a mixture at once, streamed or not, and some leave
early; meanwhile adapters appear, are replaced, unloaded and loaded, broken ones are dropped in, and bad requests come.
Every whole answer is compared with what transformers' `generate` says of that adapter alone. Then: SIGTERM under load,
and kill -9 under load with a new start. Adapters are random updates made here. Clients ask again at once, so most of
a request's seconds are those of waiting for a slot.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.common import Gate, Result, checked, show
from benchmarks.soak.answers import Truth, mixed, random_adapter, save_tiny_base, truths
from benchmarks.soak.churn import CHANGING, CONTENTS, TENSORS, VISITOR, Churn, bad_requests
from benchmarks.soak.site import Site, digests
from benchmarks.soak.traffic import Ledger, Name, Soak
from onebase.models.base import Base, load_base
from onebase.storage.format import save_adapter
from onebase.web.service import base_name

BASE = "smollm2-135m"
MIXTURE = "mixture"
WEIGHTS = (0.6, 0.4)
MAX_BODY = 1 << 16
CONTEXT, SLOTS = 512, 16
ROOM = 0.7  # of the adapters that are there fit the memory, so that some must always go
GROWTH = 0.03  # of the mean; the most that the line through the resident memory may rise after the warm-up
WARM_UP = 0.25  # of the soak
FAULTS = ("wrong", "stuck", "status", "broken", "churn", "refusal", "look")
KINDS = ("arrival", "replacement", "visit", "breakage", "refusals", "looks")


class Setting(NamedTuple):
    """How long, how many, how hard."""

    clients: int
    seconds: float
    adapters: int  # that stay as they are
    tokens: int  # of the longest answer
    pause: float  # seconds between two disturbances
    sample: float  # seconds between two looks at the memory
    deadline: float  # seconds until a request counts as stuck


REAL = Setting(200, 600, 6, 20, 2.0, 2.0, 300)
QUICK = Setting(20, 20, 3, 12, 0.1, 0.25, 60)


@dataclass
class Stage:
    """What the server works with, and what is right."""

    base: Base
    ref: str
    folder: Path  # the adapters folder
    store: Path  # the contents by name
    truths: Mapping[str, Sequence[Truth]]
    setting: Setting
    logs: list[Path]

    @property
    def model(self) -> str:
        return base_name(self.ref)

    def names(self) -> dict[str, Name]:
        """Whom the clients ask for."""
        fixed = [f"a{number}" for number in range(self.setting.adapters)]
        mixture = {"mixture": dict(zip(fixed, WEIGHTS, strict=False))}
        found = [
            Name(self.model, ("",), ("",)),
            *(Name(name, (name,), (name,)) for name in fixed),
            Name(self.model, (MIXTURE,), (MIXTURE,), mixture),
            Name(CHANGING, CONTENTS, (self.changing(),)),
            Name(VISITOR, (VISITOR,), (VISITOR,)),
        ]
        return {name.key: name for name in found}

    def changing(self) -> str:
        """The contents that CHANGING has now."""
        found = digests(self.folder / CHANGING)[TENSORS]
        return next(one for one in CONTENTS if digests(self.store / one)[TENSORS] == found)

    def site(self) -> Site:
        """A new server."""
        self.logs.append(self.folder.parent / f"log-{len(self.logs)}.txt")
        options = {"context": CONTEXT, "slots": SLOTS, "max_body": MAX_BODY, "refresh": 1, "dtype": "float32"}
        memory, drain = self.memory(), self.setting.deadline
        allow = {"allow_runtime_loading": True, "queue": 2 * self.setting.clients}
        return Site(self.ref, self.folder, self.logs[-1], memory=memory, drain=drain, **options, **allow)

    def memory(self) -> float:
        """GB for the slots' keys and values, their adapters' factors and some of the adapters."""
        config: Any = self.base.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv = 2 * config.num_hidden_layers * SLOTS * config.num_key_value_heads * CONTEXT * width * 4
        sizes = [path.stat().st_size for path in self.store.glob("*/*.safetensors")]
        factors = SLOTS * 2 * max(sizes)  # a mixture's rank is the sum of two
        return (kv + factors + ROOM * sum(sizes)) / 1e9


def prepare(ref: str, folder: Path, setting: Setting) -> Stage:
    """The adapters, those that stay in the adapters folder, and every truth."""
    base = load_base(ref, "float32", "cpu")
    fixed = [f"a{number}" for number in range(setting.adapters)]
    store, served = folder / "store", folder / "adapters"
    made = {name: random_adapter(base, number) for number, name in enumerate([*fixed, VISITOR])}
    made |= {name: random_adapter(base, 100 + number, rank=8) for number, name in enumerate(CONTENTS)}
    for name, adapter in made.items():
        save_adapter(adapter, store / name)
    for name in (*fixed, VISITOR):
        save_adapter(made[name], served / name)
    save_adapter(made[CONTENTS[0]], served / CHANGING)
    right: dict[str, Sequence[Truth]] = {}
    for name, adapter in {"": None, **made, MIXTURE: mixed([made["a0"], made["a1"]], WEIGHTS)}.items():
        start = time.monotonic()
        right[name] = truths(base, adapter, setting.tokens)
        took = time.monotonic() - start
        print(f"the truth of {name or 'the base'}: {took:.0f} s", file=sys.stderr, flush=True)
    return Stage(base, ref, served, store, right, setting, [])


def alike(right: Mapping[str, Sequence[Truth]]) -> int:
    """Pairs of contents that no question tells apart: their answers could be mistaken for one another's."""
    names = sorted(right)
    return sum(
        all(
            one.tokens[: min(len(one.tokens), len(other.tokens))]
            == other.tokens[: min(len(one.tokens), len(other.tokens))]
            for one, other in zip(right[a], right[b], strict=True)
        )
        for n, a in enumerate(names)
        for b in names[:n]
    )


@contextlib.asynccontextmanager
async def soaking(stage: Stage, site: Site, ledger: Ledger) -> AsyncIterator[Soak]:
    """What the clients of a server share, with as many connections as they want."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=site.url, timeout=None, limits=limits) as http:
        yield Soak(stage.base, stage.truths, stage.names(), ledger, http, stage.setting.deadline)


async def metrics(soak: Soak) -> dict[str, float]:
    """The server's metrics that have no labels."""
    lines = (await soak.http.get("/metrics")).text.splitlines()
    parts = [line.split() for line in lines if line and not line.startswith("#") and "{" not in line]
    return {name: float(value) for name, value in parts}


class Measured(NamedTuple):
    """One soak: (seconds, MB) of the server's memory, the engine's counts over it, and what was left at the end."""

    seconds: float
    memory: list[tuple[float, float]]
    engine: Mapping[str, float]
    left: float


async def soak_through(stage: Stage, site: Site, ledger: Ledger) -> Measured:
    """Clients and disturbances until the time is over."""
    setting, samples, until = stage.setting, [], asyncio.Event()
    async with soaking(stage, site, ledger) as soak:
        bad = bad_requests(stage.model, CONTEXT, MAX_BODY)
        churn = Churn(soak, stage.folder, stage.store, bad, random.Random(1))
        before, start = await metrics(soak), time.monotonic()
        tasks = [asyncio.create_task(soak.client(seed, until)) for seed in range(setting.clients)]
        tasks.append(asyncio.create_task(churn.run(until, setting.pause)))
        while (passed := time.monotonic() - start) < setting.seconds:
            samples.append((passed, site.resident()))
            await asyncio.sleep(setting.sample)
        until.set()
        print(f"{passed:.0f} s: {dict(ledger.counts)}, {samples[-1][1]:.0f} MB", file=sys.stderr, flush=True)
        after, ledger.in_time = await metrics(soak), ledger.counts["checked"]
        await asyncio.gather(*tasks)
        left = math.inf
        for _ in range(100):  # those who left are taken out within a step
            now = await metrics(soak)
            left = now["onebase_requests_running"] + now["onebase_requests_waiting"]
            if not left:
                break
            await asyncio.sleep(0.1)
    return Measured(passed, samples, {name: after[name] - before[name] for name in after}, left)


async def wave(stage: Stage, site: Site, ledger: Ledger, kill: bool) -> int:
    """Full load, then SIGTERM, or kill -9: the exit code. After SIGTERM what runs must end, and rightly."""
    draws = [random.Random(seed) for seed in range(stage.setting.clients)]
    lost = Ledger(quiet=True) if kill else ledger  # answers of a server that was killed are nobody's fault
    async with soaking(stage, site, lost) as soak:
        names = list(soak.names.values())
        asks = [soak.checked(draw.choice(names), draw, draw.random() < 0.5) for draw in draws]
        tasks = [asyncio.create_task(ask) for ask in asks]
        while (await metrics(soak))["onebase_requests_running"] < min(SLOTS, len(tasks)) / 2:
            if all(task.done() for task in tasks):
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0 if kill else 1)  # requests on their way arrive
        if kill:
            site.kill()
        else:
            site.ask_to_end()
        await asyncio.gather(*tasks)
    if kill and lost.counts["broken"] == 0:
        ledger.fault("churn", "kill -9 met no request at work")
    return await asyncio.to_thread(site.ended, stage.setting.deadline)


async def each_once(stage: Stage, site: Site, ledger: Ledger) -> None:
    """Every name is asked, streamed and whole."""
    async with soaking(stage, site, ledger) as soak:
        draw = random.Random(2)
        asks = [soak.checked(name, draw, stream) for name in soak.names.values() for stream in (False, True)]
        await asyncio.gather(*asks)


class Found(NamedTuple):
    """All that a run says: the soak and its ledger; then the ends of servers, and theirs."""

    soak: Ledger
    measured: Measured
    after: Ledger
    ends: Mapping[str, float]


def run(stage: Stage) -> Found:
    """The soak, SIGTERM under load, kill -9 under load, a new start."""
    ledger, after, ends = Ledger(), Ledger(), dict[str, float]()
    with stage.site() as site:
        measured = asyncio.run(soak_through(stage, site, ledger))
        ends["exit code after SIGTERM under load"] = asyncio.run(wave(stage, site, after, kill=False))
    files = digests(stage.folder)
    with stage.site() as site:
        asyncio.run(wave(stage, site, after, kill=True))
    ends["files that kill -9 changed"] = len(files.items() ^ digests(stage.folder).items())
    with stage.site() as site:
        asyncio.run(each_once(stage, site, after))
        site.ask_to_end()
        ends["exit code after SIGTERM, idle"] = site.ended(stage.setting.deadline)
    return Found(ledger, measured, after, ends)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line through the points, by least squares."""
    x, y = zip(*points, strict=True)
    return statistics.linear_regression(x, y).slope if len(points) > 1 else 0.0


def steady(measured: Measured) -> list[tuple[float, float]]:
    """The memory after the warm-up."""
    return [point for point in measured.memory if point[0] >= WARM_UP * measured.seconds]


def percentile(values: Sequence[float], part: float) -> float:
    """The value that this part of them does not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)] if values else math.nan


def figures(found: Found) -> dict[str, float]:
    """What is told, by name."""
    ledger, measured = found.soak, found.measured
    points = steady(measured)
    engine, seconds = measured.engine, measured.seconds
    told: dict[str, float] = {"minutes": seconds / 60, "answers": ledger.counts["checked"]}
    told |= {"left early": ledger.counts["left"], "turned away (429)": ledger.counts["status 429"]}
    told |= {f"disturbances: {kind}": ledger.counts[kind] for kind in KINDS}
    told["answers/s"] = ledger.in_time / seconds
    told["tokens/s"] = engine["onebase_generated_tokens_total"] / seconds
    told["prompt tokens/s"] = engine["onebase_prompt_tokens_total"] / seconds
    told["adapters read from disk"] = engine["onebase_adapter_loads_total"]
    for what, values in (("first token", ledger.first), ("whole answer", ledger.whole)):
        told |= {f"{what}, p{part}": percentile(values, part / 100) for part in (50, 95, 99)}
    told["slowest list, health or page"] = ledger.slowest
    told["memory at the start"], told["memory, largest"] = (
        measured.memory[0][1],
        max(memory for _, memory in measured.memory),
    )
    told["memory, mean after the warm-up"] = statistics.fmean(memory for _, memory in points)
    told["memory, slope after the warm-up"] = 60 * slope(points)
    return told | {kind: ledger.counts[kind] + found.after.counts[kind] for kind in FAULTS}


UNITS = {"answers/s": "1/s", "tokens/s": "1/s", "prompt tokens/s": "1/s", "minutes": "min"}
PREFIXES = {
    "first token": "s",
    "whole answer": "s",
    "slowest": "s",
    "memory": "MB",
    "memory, slope": "MB/min",
}


def unit(name: str) -> str:
    """A figure's unit."""
    fitting = [prefix for prefix in PREFIXES if name.startswith(prefix)]
    return PREFIXES[max(fitting, key=len)] if fitting else UNITS.get(name, "")


def gates(stage: Stage, found: Found) -> list[Gate]:
    """What must hold."""
    points = steady(found.measured)
    span = points[-1][0] - points[0][0]
    growth = slope(points) * span / statistics.fmean(memory for _, memory in points)
    unasked = [name for name in stage.names().values() if not found.soak.by_name[name.key]]
    never = [kind for kind in (*KINDS, "checked", "left") if not found.soak.counts[kind]]
    bad = sum(path.read_text(encoding="utf-8", errors="replace").count("Traceback") for path in stage.logs)
    kinds = {"wrong": "wrong answers", "stuck": "stuck requests"}
    return [
        Gate("pairs of adapters that no question tells apart", alike(stage.truths), 0),
        Gate("models without a checked answer", len(unasked), 0),
        Gate("kinds of disturbance that never came", len(never), 0),
        *(
            Gate(kinds.get(kind, f"faults: {kind}"), found.soak.counts[kind] + found.after.counts[kind], 0)
            for kind in FAULTS
        ),
        Gate("requests left in the engine when nobody asks", found.measured.left, 0),
        Gate("growth of the memory after the warm-up, part of its mean", growth, GROWTH),
        Gate("tracebacks in the servers' logs", bad, 0),
        *(Gate(what, abs(value), 0) for what, value in found.ends.items()),
    ]


def main(options: argparse.Namespace) -> None:
    setting = QUICK if options.quick else REAL
    setting = setting._replace(
        clients=options.clients or setting.clients,
        seconds=60 * options.minutes if options.minutes else setting.seconds,
        deadline=options.deadline or setting.deadline,
    )
    with tempfile.TemporaryDirectory() as folder:
        ref = options.base or (save_tiny_base(Path(folder) / "tiny") if options.quick else BASE)
        stage = prepare(ref, Path(folder), setting)
        found = run(stage)
        for log in stage.logs if found.soak.faults or found.after.faults else []:
            print(
                f"--- {log.name}\n{log.read_text(encoding='utf-8', errors='replace')[-5000:]}",
                file=sys.stderr,
            )
        told = figures(found)
        title = f"{setting.clients} clients of {stage.model}, {SLOTS} slots, {len(stage.names())} models"
        show(title, ("", "", "unit"), [(name, f"{value:,.4g}", unit(name)) for name, value in told.items()])
        passed = checked("serve_soak", *gates(stage, found))
    print(Result("serve_soak", told, {}, {name: unit(name) for name in told}, {}, passed, 1).line())


if __name__ == "__main__":
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument(
        "--base", default="", help=f"base model (default: {BASE}, with --quick a tiny random one)"
    )
    made.add_argument("--minutes", type=float, default=0, help="of the soak (default: 10, with --quick 1/3)")
    made.add_argument("--clients", type=int, default=0, help="at once (default: 200, with --quick 20)")
    made.add_argument("--deadline", type=float, default=0, help="seconds until a request counts as stuck")
    made.add_argument(
        "--quick", action="store_true", help="a tiny base, few clients, 20 seconds: does it run?"
    )
    main(made.parse_args())
