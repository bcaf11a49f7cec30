"""Checks of an adapter against a base: names, shapes, fingerprint, sizes, template, and what it does to prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from onebase.adapters.fitting import fit_problems
from onebase.adapters.targets import adaptable, match
from onebase.data.template import PromptFormat
from onebase.diagnosis.case import Case, Finding, HasBase, some
from onebase.diagnosis.measures import held, intruders, share
from onebase.diagnosis.names import find_substitution
from onebase.errors import FormatError, TargetError, nearest

T = TypeVar("T")

LARGE, SMALL = 1.0, 1e-6  # |W' - W| over |W|: larger than the weight; below what bfloat16 keeps of a weight
FAR = 5.0  # nats a token: the base's own choice has become 150 times less likely
NEVER = 1e-8  # nats a token: what float32 leaves of two equal outputs

SVD_MODULES, SVD_COST = (
    6,
    2e10,
)  # intruders: modules looked at, and the sum of out x in x min(out, in): seconds
MERGE_MODULES, WEIGHT_SIZE = (
    40,
    5e7,
)  # merged already: modules looked at, and a weight's largest number of values
UNSURE = 0.1  # merged already: the standard deviation above which nothing is said


def known_base(case: Case) -> HasBase:
    """The base of a case whose check needs one."""
    assert case.base is not None
    return case.base


def fingerprint(case: Case) -> Iterator[Finding]:
    """Whether this is the base that the adapter was trained on."""
    base, origin = known_base(case), case.origin
    facts = {
        "recorded": origin.fingerprint,
        "base": base.fingerprint,
        "name": origin.base,
        "given": base.name,
    }
    if origin.fingerprint and origin.fingerprint == base.fingerprint:
        yield Finding("fine", f"the one it was trained on: {base.fingerprint[:19]}", facts=facts)
    elif origin.fingerprint and base.fingerprint:
        found = (
            f"trained on {origin.base or 'another base'} ({origin.fingerprint[:19]}), this is {base.name} "
        )
        advice = "use the base that it was trained on; another revision or dtype of the files counts too"
        yield Finding("error", f"{found}({base.fingerprint[:19]})", advice, facts)
    elif origin.base and origin.base != base.name:
        found = f"made for {origin.base}, this is {base.name}; without a fingerprint no more can be told"
        yield Finding("warning", found, "make sure that they are the same weights", facts)
    else:
        yield Finding(
            "skipped", "no fingerprint was recorded: whether it is this base cannot be told", facts=facts
        )


def keys(case: Case) -> Iterator[Finding]:
    """The adapter's modules against the base's: which are matched, missing, unexpected or of another shape."""
    model, full = known_base(case).model, _full_paths(case)
    given = [*case.files.lows, *full]
    unexpected = [path for path in given if path not in case.sites and path not in case.base_modules]
    missing = sorted(_wanted(case) - set(given))
    problems = fit_problems(model, case.files.stored.adapter) if case.files.stored is not None else []
    shapes = [text for text in problems if text.partition(":")[0] not in unexpected]
    facts: dict[str, Any] = {
        "matched": len(given) - len(unexpected), "missing": missing, "unexpected": unexpected, "shapes": shapes
    }  # fmt: skip
    if unexpected:
        yield _unexpected(unexpected, list(adaptable(model)), len(given))._replace(facts=facts)
    if missing and not unexpected:  # the other half of a rename is no second finding
        advice = "the file is incomplete, or its config is another adapter's"
        found = f"{len(missing)} modules that the config targets are not in the file: {some(missing)}"
        yield Finding("error", found, advice, facts)
    if shapes:
        advice = "it was made for a model of another size"
        yield Finding("error", f"{len(shapes)} updates do not fit: {some(shapes, 2)}", advice, facts)
    if not (unexpected or missing or shapes):
        if case.files.misfit:
            yield Finding(
                "error", f"it does not load onto this base: {case.files.misfit.strip()}", facts=facts
            )
        elif given:
            yield Finding("fine", f"all {len(given)} modules are the base's, none is missing", facts=facts)


def _full_paths(case: Case) -> list[str]:
    stored = case.files.stored
    return [*stored.adapter.full, *stored.adapter.tokens] if stored is not None else []


def _wanted(case: Case) -> set[str]:
    """The modules that the config means on this base; none where it does not say it in a way that can be told."""
    if case.files.stored is None:
        return set()
    try:
        config = replace(case.files.stored.adapter.config, dropout=0.0)
        return {target.path for target in match(known_base(case).model, config).targets}
    except TargetError:
        return set()


def _unexpected(paths: Sequence[str], valid: Sequence[str], given: int) -> Finding:
    found = f"the base lacks {len(paths)} of {given} modules: {some(paths, 2)}"
    change = find_substitution(paths, valid)
    if change is not None:
        advice = f"it looks renamed: {change[0]} in the names would match {change[1]} of them"
        return Finding("error", found, advice)
    alike = [path for path in valid if path.rpartition(".")[2] == paths[0].rpartition(".")[2]]
    near = nearest(paths[0], (alike or list(valid))[:2000], 1)
    advice = f"nearest to {paths[0]}: {near[0]}" if near else "it was made for another architecture"
    return Finding("error", found, advice)


def size(case: Case) -> Iterator[Finding]:
    """How large the update is beside the weight."""
    ratios = {m.path: m.ratio for m in case.modules if m.ratio is not None and not m.idle}
    if not ratios:
        return
    top = max(ratios, key=ratios.__getitem__)
    facts = {"largest": ratios[top], "mean": sum(ratios.values()) / len(ratios)}
    large = {path: ratio for path, ratio in ratios.items() if ratio > LARGE}
    if large:
        found = f"the update is larger than the weight in {len(large)} modules, most in {top} ({ratios[top]:.3g} times)"
        yield Finding(
            "warning", found, "the learning rate or alpha was too high, or the base is another one", facts
        )
    elif ratios[top] < SMALL:
        advice = "it was hardly trained: more steps, or a higher learning rate"
        yield Finding("warning", f"the update is at most {ratios[top]:.1e} of the weight", advice, facts)
    else:
        found = f"|W' - W| is {facts['mean']:.2%} of |W| in the mean, at most {ratios[top]:.2%} ({top})"
        yield Finding("fine", found, facts=facts)


def intruding(case: Case) -> Iterator[Finding]:
    """Singular vectors of W' that W has nothing like: a sign of forgetting."""
    able = [m.path for m in case.modules if m.spectrum is not None and not m.idle and m.path in case.fitting]
    cheap = _affordable(case, [path for path in able if case.fitting[path].kind != "embedding"])
    if not cheap:
        if able:
            yield Finding("skipped", "the weights are too large for full singular value decompositions")
        return
    rows = [intruders(case.weight(path), case.fitting[path]) for path in cheap]
    count, looked = (sum(column) for column in zip(*rows, strict=True))
    facts = {"modules": {path: row[0] for path, row in zip(cheap, rows, strict=True)}, "of": looked}
    found = f"{count} of the {looked} first singular vectors of W' have no near counterpart in W ({len(cheap)} modules)"
    if 2 * count > looked:
        advice = "expect it to forget what the base knew: a lower learning rate, rsLoRA with a higher rank, fewer steps"
        yield Finding("warning", found, advice, facts)
    else:
        yield Finding("fine", found, facts=facts)


def _affordable(case: Case, paths: Sequence[str]) -> list[str]:
    """A few modules from all depths whose decompositions take seconds together."""
    chosen, left = list[str](), SVD_COST
    for path in _spread(paths, SVD_MODULES):
        low = case.fitting[path]
        out, features = low.B.shape[0] // low.blocks, low.A.shape[1]
        cost = out * features * min(out, features)
        if cost <= left and case.weight(path).numel() <= WEIGHT_SIZE:
            chosen.append(path)
            left -= cost
    return chosen


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[n * (len(items) - 1) // (count - 1)] for n in range(count)]


def merged(case: Case) -> Iterator[Finding]:
    """Whether the base's weights hold the update already, so that using it would add it twice."""
    base, origin = known_base(case), case.origin
    if origin.fingerprint and origin.fingerprint == base.fingerprint:
        yield Finding("fine", "no: this is the base that it was trained on")
        return
    able = [m.path for m in case.modules if m.spectrum is not None and not m.idle and m.path in case.fitting]
    able = [p for p in able if case.fitting[p].magnitude is None and case.weight(p).numel() <= WEIGHT_SIZE]
    shares = [share(case.weight(path), case.fitting[path]) for path in _spread(able, MERGE_MODULES)]
    if not shares or held(shares)[1] > UNSURE:
        yield Finding(
            "skipped", "cannot be told: the weights vary more along the update than the update is large"
        )
        return
    amount, spread = held(shares)
    facts = {"held": amount, "deviation": spread, "modules": len(shares)}
    agreeing = sum(_is_about(1.0, *held([one])) for one in shares)
    if _is_about(1.0, amount, spread) and 4 * agreeing >= 3 * len(shares):
        found = f"yes: along the update the weights hold {amount:.2f} times (± {spread:.2f}) what it adds"
        yield Finding(
            "error", found, "use this base without the adapter, or the base from before the merge", facts
        )
    elif _is_about(0.0, amount, spread):
        yield Finding(
            "fine", f"no: the weights hold {amount:.2f} times (± {spread:.2f}) the update", facts=facts
        )
    else:
        found = f"cannot be told: the weights hold {amount:.2f} times (± {spread:.2f}) the update"
        yield Finding("skipped", found, facts=facts)


def _is_about(wanted: float, amount: float, spread: float) -> bool:
    """Within four standard deviations, or a twentieth; with `spread` below UNSURE that tells 0 from 1."""
    return abs(amount - wanted) <= max(4 * spread, 0.05)


def prompt(case: Case) -> Iterator[Finding]:
    """The recorded prompt format against what the base's tokenizer can render."""
    tokenizer, recorded = known_base(case).tokenizer, case.origin.prompt
    own = getattr(tokenizer, "chat_template", None)
    try:
        form = PromptFormat.from_dict(recorded)
    except FormatError as error:
        yield Finding("error", str(error), "correct onebase.json")
        return
    facts = {"prompt": dict(recorded), "tokenizer": tokenizer is not None, "template": bool(own)}
    if form.chat and not own:
        lacks = (
            "this base's tokenizer has no chat template"
            if tokenizer is not None
            else "this base has no tokenizer"
        )
        advice = "use the instruct base that it was trained on"
        yield Finding("error", f"it was trained on rendered chats, and {lacks}", advice, facts)
    elif case.files.template and case.files.template.strip() != str(own or "").strip():
        found = "the chat template beside the adapter is not the base's: it was trained on other prompts"
        yield Finding("warning", found, "render prompts with the adapter's own chat template", facts)
    elif not recorded:
        yield Finding(
            "skipped", "no prompt format was recorded: use the one that it was trained with", facts=facts
        )
    else:
        kind = (
            "chats through the base's template"
            if form.chat
            else f"prompt, then {form.separator!r}, then the answer"
        )
        yield Finding(
            "fine", kind + (f", system message {form.system!r}" if form.system else ""), facts=facts
        )


def words(case: Case) -> Iterator[Finding]:
    """The tokenizer beside the adapter, where there is one: whether a text has the ids that it was trained on."""
    theirs, tokenizer = case.files.vocabulary, known_base(case).tokenizer
    if not theirs or tokenizer is None:
        yield Finding("fine", "no tokenizer lies beside it that could differ from the base's")
        return
    own = tokenizer.get_vocab() | dict(case.origin.tokens)
    other = sorted(token for token in theirs if token in own and own[token] != theirs[token])
    unknown = sorted(theirs.keys() - own.keys())
    facts = {"tokens": len(theirs), "other": len(other), "unknown": len(unknown)}
    if other:
        first = other[0]
        found = f"{len(other)} of the {len(theirs)} tokens beside it have other ids in the base's tokenizer: "
        found += f"{first!r} is {theirs[first]} there and {own[first]} here"
        yield Finding(
            "error", found, "it was trained with another tokenizer: use the base that has it", facts
        )
    elif unknown:
        found = f"the base's tokenizer lacks {len(unknown)} of the {len(theirs)} tokens beside it: "
        found += some([repr(token) for token in unknown])
        yield Finding("warning", found, "texts with these have other ids than in training", facts)
    else:
        yield Finding("fine", f"the {len(theirs)} tokens beside it are the base's", facts=facts)


def effect(case: Case) -> Iterator[Finding]:
    """What the adapter does to the base's predictions on a few prompts."""
    if case.effect is None:
        yield Finding("skipped", case.untried)
        return
    tokens, mean, largest, changed = case.effect
    facts = case.effect._asdict()
    if mean != mean:
        yield Finding(
            "error",
            f"NaN on {tokens} tokens of prompts",
            "it overflows: lower its scale, or train again",
            facts,
        )
        return
    found = f"KL(base || adapted) {mean:.3g} nats a token, at most {largest:.3g}; "
    found += f"another likeliest token at {changed:.1%} of {tokens} tokens"
    if largest <= NEVER:
        advice = f"the update is 0, or too small for the base's {known_base(case).dtype}"
        yield Finding(
            "error", f"no effect: the same output with and without it on {tokens} tokens", advice, facts
        )
    elif mean > FAR:
        advice = "its output has little to do with the base's: look at scale and sizes, and at the base's fingerprint"
        yield Finding("warning", found, advice, facts)
    else:
        yield Finding("fine", found, facts=facts)
