"""All checks in one table, run on a case; and the one line that sums them up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from onebase.diagnosis import against, own
from onebase.diagnosis.case import Case, Finding

LONGEST = 2000  # characters of a finding: a broken config may hold anything


class Check(NamedTuple):
    """One question about an adapter; `run` yields what was found, often a single finding."""

    asks: str
    run: Callable[[Case], Iterator[Finding]]
    needs_base: bool = False


CHECKS: dict[str, Check] = {
    "files": Check("are its files there and readable?", own.files),
    "settings": Check("is everything in its config computed?", own.settings),
    "names": Check("are its tensors named as readers expect?", own.names),
    "dtype": Check("what are its tensors stored as?", own.dtype),
    "values": Check("are its values finite and of a usual size?", own.values),
    "trained": Check("was every update stepped?", own.trained),
    "scale": Check("what is s in W + s·B·A, and where does it come from?", own.scale),
    "rank": Check("does it use its rank?", own.collapse),
    "base": Check("is this the base that it was trained on?", against.fingerprint, True),
    "keys": Check("do its modules meet the base's?", against.keys, True),
    "size": Check("how large is the update beside the weight?", against.size, True),
    "intruders": Check("does it add directions that the base lacks?", against.intruding, True),
    "merged": Check("is it in these weights already?", against.merged, True),
    "prompt": Check("can the base's tokenizer render its prompts?", against.prompt, True),
    "words": Check("are its tokenizer's ids the base's?", against.words, True),
    "effect": Check("what does it do to predictions?", against.effect, True),
}


def diagnose(case: Case) -> list[tuple[str, Finding]]:
    """(name of the check, what it found), in the table's order. A check that needs a base is skipped without one."""
    found: list[tuple[str, Finding]] = []
    for name, check in CHECKS.items():
        if check.needs_base and case.base is None:
            found.append((name, Finding("skipped", case.untried)))
        else:
            found += [(name, finding) for finding in check.run(case)]
    if case.files.refusal and all(finding.severity != "error" for _, finding in found):
        found.append(("files", Finding("error", case.files.refusal)))
    return [(name, finding._replace(found=finding.found[:LONGEST])) for name, finding in found]


def verdict(findings: list[tuple[str, Finding]]) -> str:
    """One line: the gravest of what was found, the effect before its causes, and how much more there is."""
    errors, warnings = (_of(findings, severity) for severity in ("error", "warning"))
    if not errors:
        aside = f", {_many(warnings, 'warning')}: {warnings[0].found}" if warnings else ""
        return f"healthy{aside}"
    first = next((finding for finding in errors if finding.found.startswith("no effect")), errors[0])
    more = [_many(errors[1:], "other error"), _many(warnings, "warning")]
    rest = " and ".join(text for text, items in zip(more, (errors[1:], warnings), strict=True) if items)
    return f"sick: {first.found}" + (f" ({rest})" if rest else "")


def _of(findings: list[tuple[str, Finding]], severity: str) -> list[Finding]:
    return [finding for _, finding in findings if finding.severity == severity]


def _many(items: list[Finding], word: str) -> str:
    return f"{len(items)} {word}{'s' if len(items) != 1 else ''}"
