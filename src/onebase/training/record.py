"""A run's facts as plain values: the lines of `metrics.jsonl`, and the record that report and card are made from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from onebase.errors import FormatError, OutputError, nearest
from onebase.files import write_text

Event = dict[str, Any]

SHOWN_SAMPLES = 8  # in report and card; a run may have scored more


def json_ready(value: Any) -> Any:
    """`value` as JSON can hold it: tuples become lists; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(json_ready(event), allow_nan=False) + "\n"


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with a `kind` ("step" or "eval") and a `step`.

    A killed process may leave half a line at the end; reading skips it and `truncate_after` removes it.
    Anything else that is not such an object is a FormatError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one line; it is in the file when this returns. Raises OutputError if it cannot be written."""
        line = _line(event)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened anew each time: no handle to close, and the line is handed over as one write.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}", error.strerror or str(error)) from error

    def read(self) -> list[Event]:
        """All whole lines, oldest first; none if there is no file yet."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        # What follows the last newline is empty, or the half line of a killed process.
        return [self._event(number, line) for number, line in enumerate(lines[:-1], 1)]

    def truncate_after(self, step: int) -> None:
        """Drop all lines beyond `step`, atomically, so that a resumed run holds no step twice."""
        if self.path.exists():
            write_text(self.path, "".join(_line(event) for event in self.read() if event["step"] <= step))

    def _event(self, number: int, line: bytes) -> Event:
        try:
            event = json.loads(line)
        except ValueError as error:
            raise FormatError(f"line {number} of {self.path}", f"is not JSON ({error})") from error
        if not isinstance(event, dict) or not isinstance(cast("Event", event).get("step"), int):
            raise FormatError(f"line {number} of {self.path}", "is not an object with a whole number `step`")
        return cast("Event", event)


@dataclass(frozen=True)
class BaseFacts:
    """The frozen base: what it is called, its fingerprint, its size, and why it ran in this dtype."""

    name: str
    fingerprint: str
    parameters: int
    stored_bytes: int
    dtype: str
    dtype_reason: str


@dataclass(frozen=True)
class AdapterFacts:
    """The adapter that the run made; `parameters` counts the trained ones, `targets` sums up where it goes."""

    path: str
    parameters: int
    file_bytes: int
    rank: int
    alpha: float
    rslora: bool
    targets: str


@dataclass(frozen=True)
class TargetRow:
    """One line of the coverage table, such as ("q_proj", 30, "0-29", "576 → 576", 16)."""

    target: str
    modules: int
    layers: str
    shape: str
    rank: int


@dataclass(frozen=True)
class Sample:
    """A held-out row: its prompt, the answer in the data, and the model's answers before and after."""

    prompt: str
    reference: str
    before: str
    after: str

    def matches(self, answer: str) -> bool:
        """Whether `answer` is the reference, spaces around it aside; never where there is no reference."""
        return bool(self.reference.strip()) and answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class Score:
    """One evaluation on the held-out rows: mean loss a target, and what the task has besides (report.MEASURES).

    The loss is in nats, or a squared error where labels are numbers; exact matches and accuracy are in [0, 1].
    """

    loss: float
    perplexity: float | None = None
    exact_match: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    pearson: float | None = None
    r2: float | None = None
    accuracy_at_1: float | None = None
    mrr_at_10: float | None = None


@dataclass(frozen=True)
class Proof:
    """The base's fingerprint before and after the run, over how many tensors, and what hashing cost."""

    before: str
    after: str
    tensors: int
    seconds: float

    @property
    def equal(self) -> bool:
        """Whether the base is unchanged; derived, so that it cannot contradict the fingerprints."""
        return self.before == self.after


@dataclass(frozen=True)
class Memory:
    """Bytes that the run was predicted to need, and the measured peak."""

    predicted_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Timing:
    """Length of the training: seconds, optimiser steps, tokens put through the model, tokens per second."""

    seconds: float
    steps: int
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report and the model card say; `from_dict(r.as_dict()) == r`, also through JSON.

    `before` and `after` are None where a run has no held-out rows; `way` says how rows were scored; `allowed` names the
    overridden gates; `finished` says why training ended; `head` has what transformers must be told to build the model
    with its head, `embedder` how texts become vectors (models.embedder).
    """

    title: str
    base: BaseFacts
    adapter: AdapterFacts
    proof: Proof
    memory: Memory
    timing: Timing
    command: str
    finished: str
    way: str
    coverage: tuple[TargetRow, ...]
    samples: tuple[Sample, ...] = ()
    before: Score | None = None
    after: Score | None = None
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    versions: dict[str, Any] = field(default_factory=dict[str, Any])
    allowed: tuple[str, ...] = ()
    head: dict[str, Any] = field(default_factory=dict[str, Any])
    embedder: dict[str, Any] = field(default_factory=dict[str, Any])

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists that `json.dumps` takes as they are."""
        return json_ready(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunRecord:
        """The inverse of `as_dict`; a missing, unknown or mistyped field is a FormatError."""
        return _decode(cls, values, "record")


def _decode(hint: Any, value: Any, where: str) -> Any:
    """`value`, read from JSON, as the type `hint` says; `where` names the place in errors."""
    if isinstance(hint, UnionType):
        (inner,) = set(get_args(hint)) - {NoneType}
        return None if value is None else _decode(inner, value, where)
    if dataclasses.is_dataclass(hint):
        return _decode_fields(cast("type", hint), value, where)
    if get_origin(hint) is tuple:
        items = _check(isinstance(value, list | tuple), value, where, "a list")
        return tuple(_decode(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    ok, wanted, convert = _PLAIN[get_origin(hint) or hint]
    return convert(_check(ok(value), value, where, wanted))


def _decode_fields(hint: type, value: Any, where: str) -> Any:
    values = cast("Mapping[str, Any]", _check(isinstance(value, Mapping), value, where, "an object"))
    hints = get_type_hints(hint)
    for name in values:
        if name not in hints:
            raise FormatError(f"{where}.{name}", "no such field", nearest(name, hints))
    required = [item.name for item in dataclasses.fields(hint) if _is_required(item)]
    if missing := [name for name in required if name not in values]:
        raise FormatError(where, f"lacks the fields {', '.join(missing)}")
    return hint(**{name: _decode(hints[name], values[name], f"{where}.{name}") for name in values})


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _check(ok: bool, value: Any, where: str, wanted: str) -> Any:
    if not ok:
        raise FormatError(where, f"is {value!r}, not {wanted}")
    return value


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _to_float(value: float | None) -> float:
    # as_dict writes null for a loss that was NaN or infinite.
    return math.nan if value is None else float(value)


_PLAIN: dict[Any, tuple[Callable[[Any], bool], str, Callable[[Any], Any]]] = {
    str: (lambda value: isinstance(value, str), "a text", str),
    bool: (lambda value: isinstance(value, bool), "true or false", bool),
    int: (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number", int),
    float: (_is_number, "a number", _to_float),
    dict: (lambda value: isinstance(value, Mapping), "an object", dict),
}
