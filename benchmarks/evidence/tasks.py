"""The tasks as rows: to learn from, to choose a learning rate by, to report on. No two parts share a prompt."""

from __future__ import annotations

import importlib.resources
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence.settings import Setting
from onebase.config import DataConfig
from onebase.data.labels import CLASSIFY, Head, learn_head
from onebase.data.read import Example
from onebase.data.template import Encoded, PromptFormat, encode
from onebase.embedding import encode_texts
from onebase.errors import MissingFile
from onebase.evaluation import text_scores
from onebase.models.base import Base
from onebase.prediction import encode_rows
from onebase.tasks import EMBED

Pair = tuple[str, str]  # prompt, answer
HINT = "--data names the folder with e2e/, wikisql/ and gsm8k/; --quick needs none"


class Raw(NamedTuple):
    """A task's pairs by part. The held-out parts may have several answers to a prompt."""

    train: list[Pair]
    tune: list[Pair]
    test: list[Pair]


class Task(NamedTuple):
    """How a task is read, asked and scored."""

    title: str
    read: Callable[[Path], Raw]
    separator: str  # between prompt and answer
    metric: str  # a row of METRICS
    longest_answer: int  # tokens


class Labelled(NamedTuple):
    """How texts with classes are read."""

    title: str
    read: Callable[[Path], Raw]  # pairs of a text and its class


class LabelRows(NamedTuple):
    """Such a task for one base."""

    train: list[Encoded]
    tune: list[Encoded]
    test: list[Encoded]
    head: Head


class PairRows(NamedTuple):
    """Texts that belong together, for one base."""

    train: list[Encoded]
    tune: list[Encoded]
    test: list[Encoded]


class Rows(NamedTuple):
    """A task for one base: token ids of each part, and the test prompts with all their reference answers."""

    train: list[Encoded]
    tune: list[Encoded]
    test: list[Encoded]
    asked: list[Example]
    references: list[list[str]]
    form: PromptFormat


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise MissingFile(f"rows of {path.parent.name}", f"no file {path}", hint=HINT)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parted(pairs: Sequence[Pair], held_out: int = 160) -> Raw:
    """Whole prompts, in a fixed random order: the first for test, the next for tune, the rest to learn from."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    random.Random(0).shuffle(prompts)
    place = {prompt: number for number, prompt in enumerate(prompts)}
    half = min(held_out, len(prompts) // 2) // 2

    def part(first: int, last: int) -> list[Pair]:
        chosen = [pair for pair in pairs if first <= place[pair[0]] < last]
        random.Random(0).shuffle(chosen)
        return chosen

    return Raw(part(2 * half, len(prompts)), part(half, 2 * half), part(0, half))


def e2e(folder: Path) -> Raw:
    return parted([(row["prompt"], row["completion"]) for row in lines(folder / "e2e" / "valid.jsonl")])


def wikisql(folder: Path) -> Raw:
    def pairs(part: str) -> list[Pair]:
        texts = [row["text"] for row in lines(folder / "wikisql" / f"{part}.jsonl")]
        return [(prompt, answer) for prompt, _, answer in (text.rpartition("\nA: ") for text in texts)]

    return Raw(pairs("train"), pairs("valid"), pairs("test"))


def gsm8k(folder: Path) -> Raw:
    known, asked = (
        [(row["question"], row["answer"]) for row in lines(folder / "gsm8k" / f"{part}.jsonl")]
        for part in ("train", "test")
    )
    return Raw(known[500:], known[:500], asked)


def field_of_demo(name: str) -> Callable[[Path], Raw]:
    def read(folder: Path) -> Raw:
        text = (importlib.resources.files("onebase.demo") / "support.jsonl").read_text(encoding="utf-8")
        found = [json.loads(line) for line in text.splitlines()]
        return parted([(row["prompt"], str(json.loads(row["completion"])[name])) for row in found])

    return read


TASKS: dict[str, Task] = {
    "e2e": Task("E2E", e2e, "\n", "bleu", 60),
    "wikisql": Task("WikiSQL", wikisql, "\nA: ", "exact", 60),
    "gsm8k": Task("GSM8K", gsm8k, "\n", "number", 110),
    **{name: Task(f"demo: {name}", field_of_demo(name), "\n", "exact", 8) for name in ("intent", "product")},
}


def rating(folder: Path) -> Raw:
    """E2E the other way round: which customer rating a sentence speaks of. Some sentences leave it out."""
    raw = e2e(folder)
    found = re.compile(r"customer rating : ([^|]+)")

    def classes(pairs: Sequence[Pair]) -> list[Pair]:
        told = [(text, found.search(prompt)) for prompt, text in pairs]
        return [(text, match.group(1).strip()) for text, match in told if match]

    return Raw(*map(classes, raw))


def asks(folder: Path) -> Raw:
    return field_of_demo("intent")(folder)


LABELLED = {
    "rating": Labelled("E2E, customer rating", rating),
    "asks": Labelled("demo: intent as a class", asks),
}


def open_labelled(name: str, setting: Setting, base: Base, folder: Path) -> LabelRows:
    """A task's texts with their classes, for an encoder. Raises MissingFile where the folder has not got them."""
    seen: set[str] = set()
    parts: list[list[Example]] = []
    raw, test = LABELLED[name].read(folder), setting.test_rows
    for pairs, count in zip(raw, (setting.pool, 2 * test, 4 * test), strict=True):
        fresh = [(text, label) for text, label in pairs if text not in seen][:count]
        seen |= {text for text, _ in pairs}  # the same words may stand for another prompt
        parts.append(
            [Example(number, text=text, label=label) for number, (text, label) in enumerate(fresh, 1)]
        )
    head = learn_head(CLASSIFY, parts[0])
    config = DataConfig(data=name, holdout=0, task=CLASSIFY)
    return LabelRows(*(encode_rows(base, part, head, config).rows for part in parts), head)


def paraphrase(folder: Path) -> Raw:
    """E2E's sentences by what they say. As many prompts are held out as half of them, since each gives one row."""
    return parted([(row["prompt"], row["completion"]) for row in lines(folder / "e2e" / "valid.jsonl")], 320)


def alike(folder: Path) -> Raw:
    """The demo's messages by what they are about."""
    text = (importlib.resources.files("onebase.demo") / "support.jsonl").read_text(encoding="utf-8")
    found = [
        (json.loads(line)["prompt"], json.loads(json.loads(line)["completion"])) for line in text.splitlines()
    ]
    return parted([(f"{told['intent']} {told['product']}", prompt) for prompt, told in found])


PAIRED = {"paraphrase": paraphrase, "alike": alike}


def open_pairs(name: str, setting: Setting, base: Base, folder: Path) -> PairRows:
    """Of each prompt the first text with each of the others; of a held-out prompt with the second alone."""
    config = DataConfig(data=name, holdout=0, task=EMBED)

    def rows(pairs: Sequence[Pair], each: int) -> list[Encoded]:
        texts: dict[str, list[str]] = {}
        for prompt, text in pairs:
            texts.setdefault(prompt, []).append(text)
        told = [
            (first, other) for first, *rest in map(dict.fromkeys, texts.values()) for other in rest[:each]
        ]
        random.Random(0).shuffle(told)
        examples = [Example(n, anchor=a, positive=p) for n, (a, p) in enumerate(told[: setting.pool], 1)]
        return encode_texts(base, examples, config).rows

    train, tune, test = PAIRED[name](folder)
    return PairRows(rows(train, setting.pool), rows(tune, 1), rows(test, 1))


def number(text: str) -> str | None:
    """What stands behind ####, the form of GSM8K's answers; None where nothing does."""
    found = re.search(r"####\s*(-?[\d,.]+)", text)
    return found.group(1).replace(",", "").rstrip(".") if found else None


def same_number(given: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    right = [
        number(one) is not None and number(one) == number(r[0])
        for one, r in zip(given, references, strict=True)
    ]
    return 100 * sum(right) / len(right)


METRICS: dict[str, tuple[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]]] = {
    "bleu": ("BLEU", lambda given, references: text_scores(given, references)[1]),
    "exact": ("exact match, %", lambda given, references: 100 * text_scores(given, references)[0]),
    "number": ("right number, %", same_number),
}


def open_task(name: str, setting: Setting, base: Base, folder: Path) -> Rows:
    """A task's rows. Raises MissingFile where the folder has not got them."""
    task = TASKS[name]
    raw = task.read(folder)
    config = DataConfig(data=name, holdout=0, separator=task.separator)
    tune, test = firsts(raw.tune), firsts(raw.test)

    def ids(pairs: Sequence[Pair], count: int) -> tuple[list[Encoded], list[Example]]:
        some = [
            Example(number, prompt, answer) for number, (prompt, answer) in enumerate(pairs[: 8 * count], 1)
        ]
        rows = encode(base.tokenizer, some, config, base.stop_ids, base.context).rows  # pyright: ignore[reportArgumentType]
        kept = [(row, one) for row, one in zip(rows, some, strict=True) if len(row.ids) <= setting.longest]
        return [row for row, _ in kept[:count]], [one for _, one in kept[:count]]

    test_rows, asked = ids(test, setting.test_rows)
    asked = asked[: setting.answers]
    references = [[answer for prompt, answer in raw.test if prompt == one.prompt] for one in asked]
    train = ids(raw.train, setting.pool)[0]
    return Rows(
        train, ids(tune, setting.tune_rows)[0], test_rows, asked, references, PromptFormat.of(config, asked)
    )


def firsts(pairs: Iterable[Pair]) -> list[Pair]:
    """One answer for each prompt."""
    return list(dict(reversed(list(pairs))).items())[::-1]
