"""Rows that have a label: which classes there are, in which order, and texts as the ids that a head reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from onebase.config import DataConfig
from onebase.data.checks import Finding
from onebase.data.read import Example, Label
from onebase.data.template import Encoded, EncodedSet, Tokenizer, fit
from onebase.errors import DataError, FormatError, nearest
from onebase.tasks import CLASSIFY, REGRESS

SHOWN = 5  # row numbers, or labels, in a message


@dataclass(frozen=True)
class Head:
    """What a head says of a text: one of `labels`, in the order of its outputs, or a number (`regress`).

    `counts` are the training rows of each class (empty where they were not recorded), `mean` is the mean of the
    training rows' numbers.
    """

    task: str
    labels: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    mean: float = 0.0

    @property
    def outputs(self) -> int:
        """How many numbers the head gives for a text."""
        return len(self.labels) if self.task == CLASSIFY else 1

    @property
    def constant(self) -> str | float:
        """What one would say without reading the text: the class of most training rows (the first of several), their
        mean.
        """
        if self.task == REGRESS:
            return self.mean
        return self.labels[self.counts.index(max(self.counts))] if self.counts else self.labels[0]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: `from_dict(h.as_dict()) == h`. `id2label` is as in a transformers config."""
        if self.task == REGRESS:
            return {"task": self.task, "mean": self.mean}
        names = {str(number): name for number, name in enumerate(self.labels)}
        return {"task": self.task, "id2label": names, "rows": list(self.counts)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Head:
        """The inverse of `as_dict`; a FormatError for anything else, since it is read from a file."""
        match dict(values):
            case {"task": "regress", "mean": int() | float() as mean}:
                return cls(REGRESS, mean=float(mean))
            case {"task": "classify", "id2label": {**names}, "rows": [*counts]} if _numbered(names, counts):
                return cls(CLASSIFY, tuple(str(names[str(n)]) for n in range(len(names))), tuple(counts))
            case _:
                raise FormatError("head", f"{dict(values)!r} is no description of one")


def _numbered(names: Mapping[Any, Any], counts: Sequence[Any]) -> bool:
    texts = all(isinstance(name, str) for name in names.values()) and len(set(names.values())) == len(names)
    whole = all(type(count) is int and count >= 0 for count in counts)
    return (
        texts and whole and set(names) == set(map(str, range(len(names)))) and len(counts) in (0, len(names))
    )


def label_name(value: Label) -> str:
    """A class's name: the label as JSON and CSV write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def learn_head(task: str, examples: Sequence[Example]) -> Head:
    """The head that these training rows call for.

    Classes are the labels that occur: sorted by size where all are numbers, else by their text, so that the order of
    rows does not matter. Raises DataError with row numbers for labels that cannot be learnt.
    """
    if task == REGRESS:
        return Head(REGRESS, mean=fmean(_number(example) for example in examples))
    _check_types(examples)
    counts = Counter(label_name(_label(example)) for example in examples)
    if len(counts) < 2:
        found = f"all {len(examples)} training rows have the label {next(iter(counts))!r}"
        raise DataError("task classify", found, hint="a head learns to tell at least two classes apart")
    order = sorted(counts, key=_size if all(_size(name) < math.inf for name in counts) else str)
    return Head(CLASSIFY, tuple(order), tuple(counts[name] for name in order))


def _size(name: str) -> float:
    """The number that a label spells; infinity for none."""
    try:
        return float(name) if math.isfinite(float(name)) else math.inf
    except ValueError:
        return math.inf


def reference(example: Example) -> str:
    """The label that a row has, as text. Raises DataError where it has none."""
    return label_name(_label(example))


def _label(example: Example) -> Label:
    if example.label is None:
        raise DataError(f"row {example.row}", "it has no label")
    return example.label


def _check_types(examples: Sequence[Example]) -> None:
    kinds: dict[str, int] = {}
    for example in examples:
        kinds.setdefault(type(_label(example)).__name__, example.row)
    words = {
        "str": "text",
        "bool": "true or false",
        "int": "a whole number",
        "float": "a number with a fraction",
    }
    if "float" in kinds:
        found = f"row {kinds['float']} has {words['float']} as its label"
        raise DataError("task classify", found, hint="numbers are learnt with --task regress")
    if len(kinds) > 1:
        found = ", ".join(f"row {row} has {words[kind]}" for kind, row in kinds.items())
        raise DataError("task classify", f"the labels are of different types: {found}")


def _number(example: Example) -> float:
    """The number that a row is to be given; text that spells one counts, as a CSV file has no other."""
    value = _label(example)
    size = _size(value) if isinstance(value, str) else float(value)
    if isinstance(value, bool) or not math.isfinite(size):
        raise DataError(
            f"row {example.row}", f"its label {value!r} is no finite number, as --task regress needs"
        )
    return size


def encode_labelled(
    tokenizer: Tokenizer, examples: Sequence[Example], head: Head | None, config: DataConfig, context: int
) -> EncodedSet:
    """Token ids and label of every row; without a head, of texts that have no label.

    A text, or a pair of texts, becomes what the base's tokenizer makes of it, special tokens included, as in
    pre-training. Raises DataError for a class that the head does not know, a text without tokens, and, with
    overlong=error, rows that are too long.
    """
    labels = [None] * len(examples) if head is None else _targets(head, examples)
    coded = _tokens(tokenizer, examples)
    rows = [
        Encoded(example.row, ids, [False] * len(ids), label=label, types=types)
        for example, label, (ids, types) in zip(examples, labels, coded, strict=True)
    ]
    if empty := [row.row for row in rows if not row.ids]:
        raise DataError("rows without a token", f"the text is empty in rows {empty[:SHOWN]}")
    of_row = {id(row): example for row, example in zip(rows, examples, strict=True)}

    def cut(row: Encoded, limit: int) -> Encoded:
        """Shorter by the tokenizer's own rule: the longer text loses its end, special tokens stay."""
        ((ids, types),) = _tokens(tokenizer, [of_row[id(row)]], truncation=True, max_length=limit)
        return row._replace(ids=ids, loss=[False] * len(ids), types=types, truncated=True)

    return fit(EncodedSet(rows), config, context, cut)


def _tokens(
    tokenizer: Tokenizer, examples: Sequence[Example], **options: Any
) -> list[tuple[list[int], tuple[int, ...]]]:
    """(ids, token types where they are not all 0) of each row."""
    if not examples:
        return []
    pairs = [example.text_pair for example in examples]
    second: Any = {"text_pair": pairs} if any(pair is not None for pair in pairs) else {}
    coded = tokenizer([example.text for example in examples], **second, verbose=False, **options)
    types = coded.get("token_type_ids") or [[]] * len(examples)
    return [
        (list(ids), tuple(own) if any(own) else ())
        for ids, own in zip(coded["input_ids"], types, strict=True)
    ]


def _targets(head: Head, examples: Sequence[Example]) -> list[float]:
    if head.task == REGRESS:
        return [_number(example) for example in examples]
    numbers = {name: float(number) for number, name in enumerate(head.labels)}
    names = [label_name(_label(example)) for example in examples]
    unknown = [
        (example.row, name) for example, name in zip(examples, names, strict=True) if name not in numbers
    ]
    if unknown:
        told = ", ".join(f"{name!r} in row {row}" for row, name in unknown[:SHOWN])
        hint = f"training knew {', '.join(head.labels[:20])}"
        near = nearest(unknown[0][1], head.labels)
        raise DataError(
            "labels", f"{len(unknown)} rows have one that no training row has: {told}", near, hint
        )
    return [numbers[name] for name in names]


def check_labels(head: Head, encoded: EncodedSet) -> list[Finding]:
    """The gates that fail on these training rows: classes with too few of them to be learnt."""
    counts = Counter(row.label for row in encoded.rows)
    rare = {number for number in range(len(head.labels)) if counts[number] < 2}
    if not rare:
        return []
    names = ", ".join(repr(head.labels[number]) for number in sorted(rare)[:SHOWN])
    rows = tuple(row.row for row in encoded.rows if row.label in rare)
    return [Finding("rare-class", rows, f"classes with fewer than two training rows: {names}")]


def describe_labels(head: Head, encoded: EncodedSet) -> dict[str, float]:
    """Rows by class, or the numbers' least, mean, greatest and standard deviation."""
    labels = [row.label for row in encoded.rows if row.label is not None]
    if head.task == CLASSIFY:
        counts = Counter(labels)
        return {name: counts[number] for number, name in enumerate(head.labels)}
    return {
        "least": min(labels),
        "mean": fmean(labels),
        "greatest": max(labels),
        "standard deviation": pstdev(labels),
    }
