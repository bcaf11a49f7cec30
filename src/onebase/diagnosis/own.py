"""Checks of an adapter by itself: files, names, values, scale, spectrum. Each a function of the case alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from onebase.adapters.targets import pattern_value
from onebase.diagnosis.case import Case, Finding, some
from onebase.diagnosis.salvage import number, pattern
from onebase.storage.adapter_files import TENSORS
from onebase.storage.peft_config import is_refused, type_problems
from onebase.storage.shards import DTYPES

# Where a warning begins. Trained factors are far from these bounds: A starts at 1/sqrt(in features), and a first
# step of AdamW makes B as large as the learning rate.
HUGE, TINY = 1e3, 1e-8
HIGH_SCALE = 16.0  # alpha 16 at rank 1; peers' defaults are 1 and 2
COLLAPSED = 0.99  # share of the squared norm in one direction

MAKER = "ask its maker for another copy, or train again"


def files(case: Case) -> Iterator[Finding]:
    """The files that an adapter needs: there, readable, and no pickle."""
    for fault in case.files.faults:
        yield Finding("error", fault.found, fault.advice)
    if not case.files.faults:
        size = sum(info.end - info.start for info in case.files.infos)
        found = f"{len(case.files.infos)} tensors, {size} bytes"
        yield Finding("fine", found, facts={"tensors": len(case.files.infos), "bytes": size})


def settings(case: Case) -> Iterator[Finding]:
    """Settings that change what the adapter computes, and values that no reader takes."""
    raw = case.files.raw
    refused = {key: value for key, value in raw.items() if is_refused(key, value)}
    for key, value in refused.items():
        found = f"{key}={value!r}: onebase does not compute it, and as plain LoRA it would be silently wrong"
        yield Finding(
            "error", found, "use it with the library that made it, or have that merge it", {key: value}
        )
    problems = type_problems(raw) if raw else []
    for problem in problems:
        yield Finding("error", problem, "correct adapter_config.json")
    if raw and not refused and not problems:
        yield Finding("fine", f"{raw.get('peft_type')}, nothing in adapter_config.json that is not computed")


def dtype(case: Case) -> Iterator[Finding]:
    """The dtypes that the tensors are stored in."""
    counts = dict(Counter(info.dtype for info in case.files.infos).most_common())
    odd = [n for n in counts if not (DTYPES[n].is_floating_point and DTYPES[n].itemsize <= 4)]
    if odd:
        names = [info.name for info in case.files.infos if info.dtype in odd]
        found = f"{', '.join(odd)} tensors ({some(names)}), which float32 does not hold exactly"
        yield Finding("error", found, "store them as float32", {"dtypes": counts})
    elif counts:
        found = ", ".join(f"{count} tensors {name}" for name, count in counts.items())
        yield Finding("fine", found, facts={"dtypes": counts})


def names(case: Case) -> Iterator[Finding]:
    """Tensor names that fit no base, since something foreign is in them."""
    for wrong, found in case.files.wrong_names.items():
        text = f"{len(found)} of {len(case.files.infos)} tensor names have {wrong}: {some(found, 2)}"
        advice = "rename the tensors; a reader that skips unknown names loads an adapter without effect"
        yield Finding("error", text, advice, {"names": found[:20]})
    if case.files.infos and not case.files.wrong_names:
        yield Finding("fine", "tensor names as PEFT writes them")


def values(case: Case) -> Iterator[Finding]:
    """NaN, infinity, and values too large or too small to come from training."""
    broken = [
        n for n, t in case.files.tensors.items() if t.is_floating_point() and not t.float().isfinite().all()
    ]
    if broken:
        advice = "the training diverged, or float16 overflowed: lower the learning rate, or train in bfloat16"
        yield Finding("error", f"NaN or infinity in {some(broken)}", advice, {"tensors": broken[:20]})
    sizes = {m.path: m.largest for m in case.modules if math.isfinite(m.largest)}
    huge = {path: size for path, size in sizes.items() if size > HUGE}
    tiny = {path: size for path, size in sizes.items() if 0 < size < TINY}
    if huge:
        found = f"values as large as {max(huge.values()):.3g} in {some(huge)}"
        yield Finding("warning", found, "the training diverged: lower the learning rate", huge)
    if tiny:
        yield Finding(
            "warning", f"no value above {TINY:g} in {some(tiny)}", "was the adapter scaled down?", tiny
        )
    if sizes and not (broken or huge or tiny):
        yield Finding(
            "fine", f"finite, at most {max(sizes.values()):.3g}", facts={"largest": max(sizes.values())}
        )


def trained(case: Case) -> Iterator[Finding]:
    """Updates that are exactly 0: B was never stepped."""
    idle = [m.path for m in case.modules if m.idle]
    facts = {"idle": len(idle), "modules": len(case.modules)}
    if not case.modules:
        if not _besides(case):
            yield Finding("error", "no pair of A and B could be read", f"look into {TENSORS}", facts)
    elif not idle:
        yield Finding("fine", f"B·A is not 0 in any of {len(case.modules)} modules", facts=facts)
    elif len(idle) == len(case.modules) and not _besides(case):
        advice = "it was saved before its first step, or its parameters never reached the optimiser: train it"
        yield Finding("error", f"no effect: B·A is 0 in all {len(idle)} modules", advice, facts)
    else:
        advice = "these modules took no part in the training: frozen, unused in the forward pass, or pruned"
        yield Finding(
            "warning", f"B·A is 0 in {len(idle)} of {len(case.modules)} modules: {some(idle)}", advice, facts
        )


def _besides(case: Case) -> bool:
    """Whether the adapter holds something else than B·A that may have an effect."""
    if case.files.stored is None:
        return False
    adapter = case.files.stored.adapter
    extra = [low.bias is not None and bool(low.bias.any()) for low in adapter.lowrank.values()]
    extra += [low.magnitude is not None for low in adapter.lowrank.values()]
    return bool(adapter.full or adapter.tokens) or any(extra)


def scale(case: Case) -> Iterator[Finding]:
    """s in W + s·B·A: its value, where it comes from, and ranks and patterns that contradict the tensors."""
    raw = case.files.raw
    if not raw:
        return
    alpha, rank, root = number(raw, "lora_alpha"), number(raw, "r"), bool(raw.get("use_rslora"))
    scales = sorted({m.scale for m in case.modules})
    facts: dict[str, Any] = {"alpha": alpha, "rank": rank, "rslora": root, "scales": scales[:20]}
    rule = f"alpha/{'sqrt(r)' if root else 'r'} = {alpha:g}/{f'sqrt({rank:g})' if root else f'{rank:g}'}"
    patterns = {key: pattern(raw, key) for key in ("rank_pattern", "alpha_pattern")}
    by_pattern = (
        " with " + " and ".join(k for k, p in patterns.items() if p) if any(patterns.values()) else ""
    )
    problems = [
        *_odd_alphas([alpha, *patterns["alpha_pattern"].values()]),
        *_odd_ranks(case, rank, patterns["rank_pattern"]),
        *_idle_patterns(case, patterns),
    ]
    high = [s for s in scales if abs(s) > HIGH_SCALE]
    if high:
        advice = (
            "a scale from other training code, or alpha meant for rsLoRA? Compare with how it was trained"
        )
        problems.append(Finding("warning", f"s is {high[-1]:g}, from {rule}{by_pattern}", advice))
    yield from (problem._replace(facts=facts) for problem in problems)
    if scales and not problems:
        yield Finding("fine", f"s = {some(f'{s:g}' for s in scales)}, from {rule}{by_pattern}", facts=facts)


def _odd_alphas(alphas: list[float]) -> Iterator[Finding]:
    if 0 in alphas:
        yield Finding("error", "no effect: an alpha of 0 multiplies the update by 0", "correct lora_alpha")
    if min(alphas) < 0:
        advice = "right only where it was meant to take an effect away"
        yield Finding("warning", f"alpha is {min(alphas):g}: the update is subtracted", advice)


def _odd_ranks(case: Case, rank: float, ranks: Mapping[str, float]) -> Iterator[Finding]:
    """Tensors of another rank than the config says; a reader that knows this refuses them."""
    if case.files.stored is not None:
        return
    wrong = [m for m in case.modules if pattern_value(ranks, [m.path], rank) != m.rank]
    if wrong:
        has = some(sorted({str(m.rank) for m in wrong}))
        found = (
            f"the config says rank {rank:g}, {len(wrong)} modules have {has}: {some(m.path for m in wrong)}"
        )
        yield Finding(
            "error", found, "correct r and lora_alpha in adapter_config.json, or add a rank_pattern"
        )


def _idle_patterns(case: Case, patterns: Mapping[str, Mapping[str, float]]) -> Iterator[Finding]:
    for option, keys in patterns.items():
        for key in keys:
            if case.modules and not any(pattern_value({key: True}, [m.path], False) for m in case.modules):
                advice = "the modules that it meant have the scale of all others: correct its name"
                yield Finding("warning", f"{option} {key} matches no module of the file", advice)


def collapse(case: Case) -> Iterator[Finding]:
    """How many directions the updates use of their rank."""
    live = [m for m in case.modules if m.spectrum is not None and m.spectrum.norm and m.rank > 1]
    if not live:
        return
    stable = [m.spectrum.stable_rank for m in live if m.spectrum is not None]
    flat = [m.path for m in live if m.spectrum is not None and m.spectrum.top_share > COLLAPSED]
    mean = sum(stable) / len(stable)
    facts = {"mean stable rank": mean, "collapsed": len(flat), "modules": len(live)}
    if 2 * len(flat) >= len(live):
        found = (
            f"one direction carries over {COLLAPSED:.0%} of the update in {len(flat)} of {len(live)} modules"
        )
        advice = "a smaller rank would do as well; or the learning rate was too high, or the rows too alike"
        yield Finding("warning", found, advice, facts)
    else:
        found = f"stable rank {mean:.2f} in the mean, of rank {some(sorted({m.rank for m in live}))}"
        yield Finding("fine", found, facts=facts)
