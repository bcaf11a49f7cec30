"""What an adapter's head says of texts, and how good that is: accuracy and macro F1, or correlation and R²."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import injected
from onebase.config import DataConfig, build
from onebase.data.labels import CLASSIFY, Head, encode_labelled
from onebase.data.pack import by_length
from onebase.data.read import Example
from onebase.data.template import Encoded, EncodedSet
from onebase.errors import BaseError
from onebase.models.base import Base
from onebase.models.loss import head_outputs, label_loss

# How training cut texts decides what the head knows; taken from there unless given.
LIKE_TRAINING = ("max_length", "overlong")


class Prediction(NamedTuple):
    """A class with the probabilities of all, in the head's order; or a number, with none."""

    label: str | float
    probabilities: Mapping[str, float]


class Marks(NamedTuple):
    """How good predictions are. Fractions, and None where something is not defined (no such task, no spread).

    `macro_f1` is the mean over the classes that occur among labels or predictions, 0 for one that is never right, as in
    scikit-learn. `r2` is 1 - MSE / variance of the labels.
    """

    loss: float
    accuracy: float | None = None
    macro_f1: float | None = None
    pearson: float | None = None
    r2: float | None = None


def predict(
    base: Base, texts: Sequence[str | tuple[str, str]], adapter: Adapter, batch_size: int = 16, **options: Any
) -> list[Prediction]:
    """What the adapter's head says of each text, or pair of texts. `options` as in DataConfig (max_length, overlong).

    Raises BaseError for an adapter without a head, DataError for a text that is empty or, as in training, too long.
    """
    pairs = [(text, None) if isinstance(text, str) else text for text in texts]
    examples = [Example(row, text=one, text_pair=two) for row, (one, two) in enumerate(pairs, 1)]
    return predict_rows(base, examples, adapter, batch_size, **options)


def predict_rows(
    base: Base, examples: Sequence[Example], adapter: Adapter, batch_size: int = 16, **options: Any
) -> list[Prediction]:
    """`predict` for rows; labels that they have are not looked at."""
    base, head = with_its_head(base, adapter)
    rows = encode_rows(base, examples, None, read_as_trained(adapter, options)).rows
    with injected(base.model, adapter, "predict"):
        return predictions(head, outputs_of(base, rows, batch_size))


def with_its_head(base: Base, adapter: Adapter | None) -> tuple[Base, Head]:
    """The base with the adapter's head, and what it says. Raises BaseError for an adapter without one."""
    base = base.for_adapter(adapter)
    if base.head is None:
        hint = (
            "train one with --task classify or regress; for text there is onebase generate, for vectors embed"
        )
        raise BaseError("a label for a text", "the adapter has no head that gives one", hint=hint)
    return base, base.head


def read_as_trained(adapter: Adapter | None, options: Mapping[str, Any]) -> DataConfig:
    """The options about rows, those that decide how a text is cut as in the adapter's training, if there is one."""
    settings = adapter.origin.training.get("settings", {}) if adapter else {}
    own = {name: settings[name] for name in LIKE_TRAINING if name in settings}
    return build(DataConfig, {"holdout": 0, **own, **options})


def encode_rows(base: Base, examples: Sequence[Example], head: Head | None, config: DataConfig) -> EncodedSet:
    """The rows' tokens, with their labels if there is a head to give them to. Raises BaseError without a tokenizer."""
    return encode_labelled(reading(base), examples, head, config, base.context)


def reading(base: Base) -> Any:
    """The base's tokenizer. Raises BaseError where it has none."""
    if base.tokenizer is None:
        raise BaseError(f"read texts with {base.ref}", "it has no tokenizer files")
    return base.tokenizer


def outputs_of(base: Base, rows: Sequence[Encoded], batch_size: int) -> Tensor:
    """What the chosen adapter's head gives for each row, (rows, outputs) in float32, on the CPU."""
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for batch in by_length(rows, batch_size):
            made = head_outputs(base.model, [rows[index] for index in batch], base.pad_id).cpu()
            found |= dict(zip(batch, made, strict=True))
    return torch.stack([found[index] for index in range(len(rows))])


def predictions(head: Head, outputs: Tensor) -> list[Prediction]:
    """The likeliest class of each row (the first of equals), or its number."""
    if head.task != CLASSIFY:
        return [Prediction(float(value), {}) for value in outputs[:, 0]]
    chances = outputs.double().softmax(-1).tolist()
    return [
        Prediction(head.labels[row.index(max(row))], dict(zip(head.labels, row, strict=True)))
        for row in chances
    ]


def marks(head: Head, outputs: Tensor, rows: Sequence[Encoded]) -> Marks:
    """How good a head's outputs (rows, n) for rows with labels are."""
    labels = torch.tensor([row.label for row in rows], dtype=torch.float64)
    loss = float(label_loss(head, outputs.double(), rows)) / len(rows)
    if head.task != CLASSIFY:
        return Marks(loss, pearson=_pearson(outputs[:, 0].double(), labels), r2=_r2(loss, labels))
    chosen = outputs.argmax(-1)
    return Marks(
        loss, float((chosen == labels).double().mean()), _macro_f1(chosen.tolist(), labels.long().tolist())
    )


def baseline(head: Head, rows: Sequence[Encoded]) -> Marks:
    """How good it is to say the same of every row: the class of most training rows, or the mean of their numbers.

    The loss is that of giving every class the share of the training rows that it had.
    """
    if head.task != CLASSIFY:
        return marks(head, torch.full((len(rows), 1), head.mean, dtype=torch.float64), rows)
    counts = torch.tensor(head.counts or [1] * len(head.labels), dtype=torch.float64)
    return marks(head, (counts / counts.sum()).log().expand(len(rows), -1), rows)


def _macro_f1(chosen: Sequence[int], labels: Sequence[int]) -> float:
    scores: list[float] = []
    for number in sorted({*chosen, *labels}):
        hits = sum(a == b == number for a, b in zip(chosen, labels, strict=True))
        # 2·precision·recall / (precision + recall)
        scores.append(2 * hits / (list(chosen).count(number) + list(labels).count(number)))
    return sum(scores) / len(scores)


def _pearson(given: Tensor, labels: Tensor) -> float | None:
    one, two = given - given.mean(), labels - labels.mean()
    spread = float(one.norm() * two.norm())
    constant = bool((given == given[0]).all()) or bool((labels == labels[0]).all())
    return None if constant or not math.isfinite(spread) else float(one @ two) / spread


def _r2(loss: float, labels: Tensor) -> float | None:
    variance = float(labels.var(correction=0))
    return 1.0 - loss / variance if variance > 0 else None
