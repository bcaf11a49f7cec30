"""Tensor and module names that went wrong: what is foreign in them, and the one change that would make them fit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from onebase.storage.peft_tokens import PREFIX


class Repair(NamedTuple):
    """A way in which a tensor's name is wrong, whatever the base, and how it is put right."""

    wrong: str
    pattern: re.Pattern[str]
    right: str


# In this order: each sees what the ones before it left.
REPAIRS = (
    Repair("a prefix that DataParallel put there", re.compile(r"^(?:module\.)+"), ""),
    Repair("a prefix that torch.compile put there", re.compile(r"\b_orig_mod\."), ""),
    Repair(
        "a prefix that FSDP or checkpointing put there",
        re.compile(r"\b(?:_fsdp_wrapped_module|_checkpoint_wrapped_module)\."),
        "",
    ),
    Repair(f"{PREFIX} twice", re.compile(rf"^(?:{re.escape(PREFIX)}){{2,}}"), PREFIX),
    Repair(
        "the adapter's name inside (PEFT's in-memory names, not those of its files)",
        re.compile(r"\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$|bias$)[^.]+"),
        r".\1",
    ),
    Repair("the adapter's name inside", re.compile(r"\.modules_to_save\.[^.]+(?=\.)"), ""),
    Repair(f"no {PREFIX} in front", re.compile(rf"^(?!{re.escape(PREFIX)})"), PREFIX),
)


class Repaired(NamedTuple):
    """Tensor names put right: old -> new, and by each wrong the names that had it."""

    names: dict[str, str]
    wrongs: dict[str, list[str]]


def repair(names: Iterable[str]) -> Repaired:
    """Put right what is wrong with tensor names whatever the base is."""
    found: dict[str, str] = {}
    wrongs: dict[str, list[str]] = {}
    for name in names:
        new = name
        for row in REPAIRS:
            before, new = new, row.pattern.sub(row.right, new)
            if new != before:
                wrongs.setdefault(row.wrong, []).append(name)
        found[name] = new
    return Repaired(found, wrongs)


class Substitution(NamedTuple):
    """`old` becomes `new` in a path: at its start, or at the first place where it stands."""

    old: tuple[str, ...]
    new: tuple[str, ...]
    at_start: bool

    def apply(self, path: str) -> str:
        """The path after it; the same path where `old` does not stand in it."""
        parts, size = tuple(path.split(".")), len(self.old)
        places = [0] if self.at_start else range(len(parts) - size + 1)
        for place in places:
            if parts[place : place + size] == self.old:
                return ".".join(parts[:place] + self.new + parts[place + size :])
        return path

    def __str__(self) -> str:
        return " -> ".join(
            "".join(f"{part}." for part in side) or "(nothing)" for side in (self.old, self.new)
        )


def find_substitution(wrong: Sequence[str], right: Collection[str]) -> tuple[Substitution, int] | None:
    """The change that makes most of the wrong paths right ones, and of how many; None where none helps half of them.

    Never one of layer numbers. Examples: `model. -> model.language_model.`, `attention. -> self_attn.`.
    """
    known = set(right)
    made = {change for path in _some(wrong, 3) for change in _changes(path, right)}

    def hits(change: Substitution, paths: Sequence[str]) -> int:
        return len({change.apply(path) for path in paths} & known)

    def order(change: Substitution, paths: Sequence[str]) -> tuple[int, bool, int, Substitution]:
        return -hits(change, paths), not change.at_start, len(change.old) + len(change.new), change

    first = sorted(made, key=lambda change: order(change, _some(wrong, 20)))[:5]
    best = min(first, key=lambda change: order(change, wrong), default=None)
    if best is None or 2 * (count := hits(best, wrong)) < len(wrong):
        return None
    return best, count


def _some(items: Sequence[str], count: int) -> list[str]:
    """At most `count` of the items, evenly spread."""
    step = max(1, -(-len(items) // count))
    return list(items[::step])


def _changes(path: str, right: Collection[str]) -> set[Substitution]:
    """The changes that turn this path into one of the right ones with the same last name."""
    mine = tuple(path.split("."))
    found: set[Substitution] = set()
    for other in right:
        theirs = tuple(other.split("."))
        if theirs[-1] != mine[-1]:
            continue
        end = _shared(mine[::-1], theirs[::-1])
        found.add(Substitution(mine[: len(mine) - end], theirs[: len(theirs) - end], True))
        start = min(_shared(mine, theirs), len(mine) - end, len(theirs) - end)
        # Where something is only put in, a name beside it must say where: the one before, or the one behind.
        beside = [(0, 0)] if start < len(mine) - end else [(1, 0), (0, 1)]
        for left, right_side in beside:
            first, last = max(0, start - left), max(0, end - right_side)
            old, new = mine[first : len(mine) - last], theirs[first : len(theirs) - last]
            found.add(Substitution(old, new, False))
    numbered = {c for c in found if any(part.isdigit() for part in c.old + c.new)}
    return {
        change for change in found - numbered if change.old != change.new and (change.old or change.at_start)
    }


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many names two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
