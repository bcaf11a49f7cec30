"""How good answers are: loss and perplexity on the answer's tokens, exact match, BLEU and chrF of what is generated.

An adapter with a head gives labels instead: accuracy and macro F1, or correlation and R². One that makes vectors finds
texts: accuracy@1 and MRR@10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import injected
from onebase.config import DataConfig, Sampling, build
from onebase.data.read import Example, read_examples
from onebase.data.template import Encoded, PromptFormat, encode
from onebase.embedding import encode_texts, retrieval, search_of, similarities, with_its_embedder
from onebase.models.base import Base
from onebase.models.generation import answers, format_of
from onebase.models.scoring import Scorer, choose, loss_tokens, scorer
from onebase.models.vocabulary import for_adapter
from onebase.prediction import baseline, encode_rows, marks, outputs_of, read_as_trained, with_its_head
from onebase.tasks import EMBED


@dataclass(frozen=True)
class Scores:
    """One model on one set of rows. `loss` is the mean over the targets: nats a loss token, or a row with a class or
    of a pair; the squared error of a row that has a number. `tokens` counts the targets.

    `exact_match` is a fraction; BLEU and chrF are sacrebleu's, from 0 to 100, with every reference that the
    data has for a prompt. The three are None where nothing was generated. The others are those of
    `prediction.Marks`, None without a head, and of `embedding.Retrieval`, None but for vectors.
    """

    loss: float
    tokens: int
    exact_match: float | None = None
    bleu: float | None = None
    chrf: float | None = None
    answers: tuple[str, ...] = ()
    accuracy: float | None = None
    macro_f1: float | None = None
    pearson: float | None = None
    r2: float | None = None
    accuracy_at_1: float | None = None
    mrr_at_10: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def mean_loss(score: Scorer, rows: Sequence[Encoded], batch_size: int) -> tuple[float, int]:
    """The mean loss of the chosen adapter over all loss tokens of the rows, and their number."""
    total = 0.0
    with torch.no_grad():
        for batch in score.batches(rows, batch_size):
            total += float(score.loss([rows[index] for index in batch]))
    count = loss_tokens(rows)
    return total / max(count, 1), count


def evaluate(
    base: Base,
    data: str | Sequence[Example],
    adapter: Adapter | None = None,
    sampling: Sampling | None = None,
    **options: Any,
) -> Scores:
    """Score the base with this adapter (None: the plain base) on a file's rows; `options` as in DataConfig.

    Without `sampling` nothing is generated: loss and perplexity only. Tokens that the adapter added are its own:
    the plain base reads their texts as it always did. An adapter with a head is scored on rows with labels; one that
    makes vectors, or with task="embed" the plain base, on pairs.
    """
    if adapter is not None and adapter.origin.has_head:
        return evaluate_labels(base, data, adapter, **options)[0]
    if options.get("task") == EMBED or (adapter is not None and adapter.origin.embeds):
        return evaluate_pairs(base, data, adapter, **options)
    base = for_adapter(base, adapter)
    config = build(DataConfig, {"holdout": 0, **options})
    examples = read_examples(data, config) if isinstance(data, str) else list(data)
    encoded = encode(base.tokenizer, examples, config, base.stop_ids, base.context)  # pyright: ignore[reportArgumentType]
    way = choose(base, "auto", adapter, encoded.rows)
    with injected(base.model, adapter, "evaluate"):
        loss, tokens = mean_loss(scorer(base, way, "evaluate"), encoded.rows, 16)
        if sampling is None:
            return Scores(loss, tokens)
        known = adapter is not None and adapter.origin.prompt
        form = format_of(base, adapter) if known else PromptFormat.of(config, examples)
        return score_answers(base, examples, form, sampling, Scores(loss, tokens))


def evaluate_labels(
    base: Base, data: str | Sequence[Example], adapter: Adapter, **options: Any
) -> tuple[Scores, Scores]:
    """An adapter with a head on rows with labels; and what a constant answer scores there (`prediction.baseline`)."""
    base, head = with_its_head(base, adapter)
    config = read_as_trained(adapter, {**options, "task": head.task})
    examples = read_examples(data, config) if isinstance(data, str) else list(data)
    rows = encode_rows(base, examples, head, config).rows
    with injected(base.model, adapter, "evaluate"):
        found = marks(head, outputs_of(base, rows, 16), rows)
    scored = [Scores(tokens=len(rows), **one._asdict()) for one in (found, baseline(head, rows))]
    return scored[0], scored[1]


def evaluate_pairs(
    base: Base, data: str | Sequence[Example], adapter: Adapter | None = None, **options: Any
) -> Scores:
    """Vectors on rows of texts that belong together: the loss in batches of 16, and how well anchors find positives.

    The plain base (None) pools as its folder states, or by `pooling`.
    """
    config = read_as_trained(adapter, {**options, "task": EMBED})
    base = with_its_embedder(base, adapter, config.pooling)
    examples = read_examples(data, config) if isinstance(data, str) else list(data)
    rows = encode_texts(base, examples, config).rows
    search = search_of(rows)
    with injected(base.model, adapter, "evaluate"):
        loss, count = mean_loss(scorer(base, choose(base, "auto", adapter), "evaluate"), rows, 16)
        found = similarities(base, search, 16)
    return Scores(loss, count, **retrieval(search, found)._asdict())


def score_answers(
    base: Base, examples: Sequence[Example], form: PromptFormat, sampling: Sampling, so_far: Scores
) -> Scores:
    """`so_far` with the scores of the answers that the chosen adapter gives, one for each distinct prompt.

    Text rows have no prompt: where there are no others, `so_far` as it is.
    """
    references = grouped_references(examples)
    if not references:
        return so_far
    firsts = [group[0][0] for group in references]
    given = answers(base, firsts, form, sampling)
    texts = [[text for _, text in group] for group in references]
    exact, bleu, chrf = text_scores(given, texts)
    return Scores(so_far.loss, so_far.tokens, exact, bleu, chrf, tuple(given))


def grouped_references(examples: Sequence[Example]) -> list[list[tuple[Example, str]]]:
    """(example, reference) grouped by prompt, in order of first appearance; text rows have none."""
    groups: dict[object, list[tuple[Example, str]]] = {}
    for example in examples:
        if example.kind == "messages" and example.messages and example.messages[-1]["role"] == "assistant":
            key: object = tuple((m["role"], m["content"]) for m in example.messages[:-1])
            groups.setdefault(key, []).append((example, example.messages[-1]["content"]))
        elif example.completion is not None:
            groups.setdefault(example.prompt, []).append((example, example.completion))
    return list(groups.values())


def text_scores(given: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float, float]:
    """(exact match in [0, 1], BLEU, chrF) of one answer for each list of references."""
    wanted = [{text.strip() for text in texts} for texts in references]
    exact = sum(a.strip() in w for a, w in zip(given, wanted, strict=True)) / len(given)
    width = max(map(len, references))
    # sacrebleu takes streams of references: the n-th of every answer, None where it has fewer
    streams = [[texts[n] if n < len(texts) else None for texts in references] for n in range(width)]
    hypotheses = list(given)
    return (
        exact,
        BLEU().corpus_score(hypotheses, streams).score,  # pyright: ignore[reportArgumentType]
        CHRF().corpus_score(hypotheses, streams).score,  # pyright: ignore[reportArgumentType]
    )
