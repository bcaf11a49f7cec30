"""Which runs the claims want, in the order of their worth: a pure function of the rows that there are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from benchmarks.evidence.settings import TUNING_SEED, Setting
from onebase.training.optim import USUAL_LR

FULL, LORA = "full", "lora"
BOTH = (LORA, FULL)
ALL_RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FORMER_DEFAULT = 5e-4  # `onebase train`'s rate before these rows
DEFAULT = USUAL_LR  # at the width of this base
USUAL_RATES = (FORMER_DEFAULT, DEFAULT, 3e-3)
USUAL_TASKS = 2  # the first ones
MOVES = 2  # how often a search goes on beyond its edge


class Method(NamedTuple):
    """What learns: an adapter (options of LoraConfig and OptimConfig) or, without `lora`, every weight.

    `bits` and `block`: the base's linear weights are rounded to so many bits, each block of so many with its own scale
    (0: a row of the weight). `dtype`: the base's, where it is not the setting's.
    """

    title: str
    start: float  # the learning rate at which a search begins
    lora: Mapping[str, Any] | None = None
    optim: Mapping[str, Any] = {}
    bits: int = 0
    block: int = 0
    dtype: str = ""


def ranked(rank: int, **more: Any) -> dict[str, Any]:
    """Options of an adapter of this rank, with alpha twice the rank as by default."""
    return {"rank": rank, "alpha": 2.0 * rank, **more}


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, Method] = {
    FULL: Method("full fine-tuning", 3e-4),
    LORA: Method("LoRA, all linear, rank 16", 3e-3, ranked(16)),
    "attention": Method("attention only, rank 16", 3e-3, ranked(16, target_modules=ATTENTION)),
    "mlp": Method("MLP only, rank 16", 3e-3, ranked(16, target_modules=MLP)),
    "attention-even": Method("attention only, rank 42", 3e-3, ranked(42, target_modules=ATTENTION)),
    "mlp-even": Method("MLP only, rank 26", 3e-3, ranked(26, target_modules=MLP)),
    **{
        f"rank-{r}": Method(f"LoRA, all linear, rank {r}", 3e-3, ranked(r))
        for r in (1, 2, 4, 8, 32, 64, 128, 256)
    },
    "rslora-64": Method("rsLoRA, rank 64, alpha 32", 3e-3, {"rank": 64, "alpha": 32.0, "rslora": True}),
    "plus-64": Method("LoRA+ (16), rank 64", 3e-4, ranked(64), {"lora_plus": 16.0}),
    "int8": Method("8 bits, a scale a row", 3e-3, ranked(16), bits=8),
    "int4-64": Method("4 bits, blocks of 64", 3e-3, ranked(16), bits=4, block=64),
    "int4-row": Method("4 bits, a scale a row", 3e-3, ranked(16), bits=4),
    "lora-fp32": Method("LoRA, float32", 3e-3, ranked(16), dtype="float32"),
    "full-fp32": Method("full fine-tuning, float32", 3e-4, dtype="float32"),
}
PLACES = ("attention", "mlp", "attention-even", "mlp-even")
QUANTISED = ("int8", "int4-64", "int4-row")
STEP_SIDES = (
    "engine",
    "packed",
    "full",
)  # LoRA through the engine, through the model's own layers, all weights

SEEN = ("base", "dtype", "tasks", "pool", "tune_rows", "test_rows", "longest", "answers")
LEARNT = (*SEEN, "steps", "batch_size")
WIDE = ("base", "dtype", "tasks", "pool", "longest", "long_test_rows", "long_answers")
WIDE_LEARNT = (*WIDE, "long_steps", "batch_size")
LABELS = ("label_task", "label_base", "label_steps", "label_batch", "pool", "test_rows")
PAIRS = ("pair_task", "pair_base", "pair_steps", "pair_batch", "pool")


class Kind(NamedTuple):
    """A kind of run: its code's version (raised where its rows no longer count), and the sizes that it depends on."""

    version: int
    fields: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "base": Kind(1, SEEN),  # the base's scores
    "sizes": Kind(1, ("base", "dtype")),  # what is trained, in numbers and bytes
    "tune": Kind(1, LEARNT),  # a learning rate tried on the tuning seed and rows
    "final": Kind(1, LEARNT),  # a reported run
    "long": Kind(1, (*LEARNT, "long_steps")),  # a rate tried over more steps
    "usual": Kind(1, (*SEEN, "usual_epochs", "usual_batch")),  # a rate by the usual number of passes
    "long-base": Kind(1, WIDE),  # as base and final, over more steps and on more rows
    "long-final": Kind(1, WIDE_LEARNT),
    "label-base": Kind(1, LABELS),  # the constant answer
    "label-tune": Kind(1, LABELS),  # as tune and final, a class for a text
    "label-final": Kind(1, LABELS),
    "pair-base": Kind(1, PAIRS),  # vectors: the base's
    "pair-tune": Kind(1, PAIRS),
    "pair-final": Kind(1, PAIRS),
    "scarce": Kind(1, (*SEEN, "scarce_steps", "looks", "batch_size")),
    "swap": Kind(2, WIDE_LEARNT),  # all tasks' adapters on one base
    "step": Kind(1, ("base", "tasks", "batch_size", "longest", "timed_steps", "timed_runs")),
}


class Leg(NamedTuple):
    """The kinds of run that make one comparison: of the base, of a rate that is tried, and the reported ones."""

    base: str
    tune: str
    final: str


SHORT = Leg("base", "tune", "final")
LONG = Leg("long-base", "long", "long-final")
LABELLED = Leg("label-base", "label-tune", "label-final")
PAIRED = Leg("pair-base", "pair-tune", "pair-final")


def legs(setting: Setting) -> tuple[tuple[Leg, int], ...]:
    """The comparisons of whole answers, each with its number of steps."""
    return (SHORT, setting.steps), (LONG, setting.long_steps)


class Job(NamedTuple):
    """A run: all that decides its numbers, with the setting."""

    kind: str
    task: str = ""
    method: str = ""
    lr: float = 0.0
    seed: int = 0
    rows: int = 0

    def key(self, setting: Setting) -> str:
        """A name for the row, with a digest of the sizes that it depends on."""
        kind = KINDS[self.kind]
        facts = {name: value for name, value in asdict(setting).items() if name in kind.fields}
        facts |= {"method": list(METHODS[self.method][2:]) if self.method in METHODS else self.method}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=dict).encode()).hexdigest()[:8]
        parts = [
            self.task,
            self.method,
            f"lr {self.lr:g}" * bool(self.lr),
            f"rows {self.rows}" * bool(self.rows),
        ]
        told = " ".join(part for part in parts if part)
        return f"{self.kind}.{kind.version} {told} seed {self.seed} {setting.name}-{digest}".replace(
            "  ", " "
        )


class View(Protocol):
    """The rows of a setting."""

    def get(self, job: Job) -> Mapping[str, Any] | None:
        """What the job gave, None where it has not been run."""
        ...


def search(losses: Mapping[float, float], start: float) -> tuple[list[float], float | None]:
    """(rates to try next, the best rate once it is settled), of a grid in half decades around `start`.

    Three rates first; while the best stands at the edge the grid goes on there, `MOVES` times at most.
    """
    rates = rates_from(start)
    if missing := [rate for rate in rates if rate not in losses]:
        return missing, None
    known = sorted(losses)
    best = min(known, key=losses.__getitem__)
    edge = known[0] == best or known[-1] == best
    if not edge or len(known) >= len(rates) + MOVES:
        return [], best
    place = ALL_RATES.index(best) + (1 if known[-1] == best else -1)
    return ([ALL_RATES[place]], None) if 0 <= place < len(ALL_RATES) else ([], best)


def rates_from(start: float) -> list[float]:
    """The start and its neighbours."""
    place = ALL_RATES.index(start)
    return [ALL_RATES[place], ALL_RATES[place - 1], ALL_RATES[place + 1]]


def tried(view: View, task: str, method: str, leg: Leg = SHORT) -> dict[float, float]:
    """The rates that were run, with their losses on the tuning rows; one that diverged has an infinite loss."""
    found = {rate: view.get(Job(leg.tune, task, method, rate, TUNING_SEED)) for rate in ALL_RATES}
    return {rate: float("inf") if row["tune"] is None else row["tune"] for rate, row in found.items() if row}


def start_of(view: View, task: str, method: str, leg: Leg) -> float | None:
    """Where a search begins: longer runs begin at the best rate of short ones."""
    return best_rate(view, task, method) if leg == LONG else METHODS[method].start


def best_rate(view: View, task: str, method: str, leg: Leg = SHORT) -> float | None:
    """The settled rate of a method, None while the search goes on."""
    start = start_of(view, task, method, leg)
    return search(tried(view, task, method, leg), start)[1] if start else None


def tuning(view: View, task: str, method: str, leg: Leg = SHORT) -> Iterator[Job]:
    """The next runs of a search."""
    start = start_of(view, task, method, leg)
    for rate in search(tried(view, task, method, leg), start)[0] if start else ():
        yield Job(leg.tune, task, method, rate, TUNING_SEED)


def finals(view: View, task: str, method: str, seeds: Sequence[int], leg: Leg = SHORT) -> Iterator[Job]:
    """The reported runs of a settled rate."""
    if rate := best_rate(view, task, method, leg):
        for seed in seeds:
            yield Job(leg.final, task, method, rate, seed)


Wanted = Iterator[Job]


def base_scores(setting: Setting, view: View) -> Wanted:
    yield Job(SHORT.base)


def sizes(setting: Setting, view: View) -> Wanted:
    for rank in setting.ranks:
        yield Job("sizes", method=f"rank-{rank}" if rank != 16 else LORA)
    yield Job("sizes", method=FULL)


def first_seed(setting: Setting, view: View) -> Wanted:
    for task in setting.tasks:
        for method in BOTH:
            yield from tuning(view, task, method)
        for method in BOTH:
            yield from finals(view, task, method, setting.seeds[:1])


def main_seeds(setting: Setting, view: View) -> Wanted:
    for method in BOTH:
        yield from finals(view, setting.main_task, method, setting.seeds[1:])


def other_seeds(setting: Setting, view: View) -> Wanted:
    for task in setting.tasks[1:]:
        for method in BOTH:
            yield from finals(view, task, method, setting.seeds[1:])


def swap(setting: Setting, view: View) -> Wanted:
    if all(best_rate(view, task, LORA, LONG) for task in setting.tasks):
        yield Job("swap")


def variants(setting: Setting) -> list[str]:
    return [*PLACES, *(f"rank-{rank}" for rank in setting.learned_ranks), "rslora-64", "plus-64"]


def where_first(setting: Setting, view: View) -> Wanted:
    for method in variants(setting):
        yield Job(SHORT.tune, setting.main_task, method, METHODS[method].start, TUNING_SEED)


def where_tuned(setting: Setting, view: View) -> Wanted:
    for method in variants(setting):
        yield from tuning(view, setting.main_task, method)


def where_final(setting: Setting, view: View) -> Wanted:
    for seed in setting.seeds:
        for method in variants(setting):
            yield from finals(view, setting.main_task, method, (seed,))


def scarce(setting: Setting, view: View) -> Wanted:
    task = setting.main_task
    for seed in setting.seeds:
        for rows in setting.scarce:
            for method in BOTH:
                if rate := best_rate(view, task, method):
                    yield Job("scarce", task, method, rate, seed, rows)


def quantised(setting: Setting, view: View, seeds: slice = slice(1)) -> Wanted:
    """At the rate of the plain base: the update is the same, the base is not."""
    task = setting.main_task
    if rate := best_rate(view, task, LORA):
        for seed in setting.seeds[seeds]:
            for method in QUANTISED:
                yield Job(SHORT.final, task, method, rate, seed)


def quantised_more(setting: Setting, view: View) -> Wanted:
    yield from quantised(setting, view, slice(1, None))


def precision(setting: Setting, view: View) -> Wanted:
    """The control of bfloat16: both methods once in float32, at the rates of bfloat16."""
    for method in BOTH:
        if setting.dtype != "float32" and (rate := best_rate(view, setting.main_task, method)):
            yield Job(SHORT.final, setting.main_task, f"{method}-fp32", rate, setting.seeds[0])


def longer(setting: Setting, view: View) -> Wanted:
    """What short runs cannot tell: the same comparison over more steps, on more held-out rows."""
    yield Job(LONG.base)
    for task in setting.tasks:
        for method in BOTH:
            yield from tuning(view, task, method, LONG)
        for seed in setting.seeds:
            for method in BOTH:
                yield from finals(view, task, method, (seed,), LONG)


def default_rate(setting: Setting, view: View) -> Wanted:
    """LoRA at `onebase train`'s own rate and at its former one, in short runs and in longer ones."""
    for task in setting.tasks:
        for leg in (SHORT, LONG):
            for rate in (DEFAULT, FORMER_DEFAULT):
                yield Job(leg.tune, task, LORA, rate, TUNING_SEED)


def usual(setting: Setting, view: View) -> Wanted:
    """The same question of runs as long as `onebase train`'s, on the tasks whose rows are short."""
    for task in setting.tasks[:USUAL_TASKS]:
        for rate in USUAL_RATES:
            yield Job("usual", task, LORA, rate, TUNING_SEED)


def labels(setting: Setting, view: View) -> Wanted:
    yield from on_encoder(setting, view, setting.label_task, LABELLED)


def pairs(setting: Setting, view: View) -> Wanted:
    yield from on_encoder(setting, view, setting.pair_task, PAIRED)


def on_encoder(setting: Setting, view: View, task: str, leg: Leg) -> Wanted:
    yield Job(leg.base, task)
    for method in BOTH:
        yield from tuning(view, task, method, leg)
        yield from finals(view, task, method, setting.seeds, leg)


def steps(setting: Setting, view: View) -> Wanted:
    for run in range(setting.timed_runs):
        for dtype in ("bfloat16", "float32") if setting.dtype == "bfloat16" else ("float32",):
            for side in STEP_SIDES:
                yield Job("step", setting.main_task, f"{side} {dtype}", seed=run)


class Phase(NamedTuple):
    """Runs that are wanted, and the numbers of the claims that they serve; `quiet` ones need an idle machine."""

    claims: tuple[int, ...]
    wanted: Callable[[Setting, View], Wanted]
    quiet: bool = False


PHASES = (
    Phase((3,), steps, quiet=True),
    Phase((4, 5, 9), base_scores),
    Phase((2,), sizes),
    Phase((1, 4, 5, 7), first_seed),
    Phase((4, 5), main_seeds),
    Phase((8,), where_first),
    Phase((9,), quantised),
    Phase((6,), scarce),
    Phase((4,), labels),
    Phase((4,), pairs),
    Phase((4,), default_rate),
    Phase((4, 5), other_seeds),
    Phase((8,), where_tuned),
    Phase((4,), precision),
    Phase((9,), quantised_more),
    Phase((8,), where_final),
    Phase((1, 4, 5, 7), longer),
    Phase((7,), swap),
    Phase((4,), usual),
)


def wanted(setting: Setting, view: View, only: frozenset[int], quiet: bool) -> Iterator[Job]:
    """The runs that are missing and whose needs are met, the most valuable first.

    `only`: claims, none for all. Timed runs come with `quiet`, or where `only` is their claim alone.
    """
    for phase in PHASES:
        asked = not only or only & set(phase.claims)
        if asked and (not phase.quiet or quiet or only == set(phase.claims)):
            yield from (job for job in phase.wanted(setting, view) if view.get(job) is None)
