"""After the last step: the best adapter, its proof against the base, answers before and after, and the reports."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import injected, with_kinds
from onebase.adapters.layers import base_modules
from onebase.adapters.targets import CoverageRow
from onebase.adapters.tokens import start_rows
from onebase.config import Sampling, TrainConfig, flatten
from onebase.data.labels import Head, reference
from onebase.data.pairs import split_row, texts_of
from onebase.data.read import Example
from onebase.data.template import Encoded, render_prompt
from onebase.device import machine, peak_memory
from onebase.embedding import retrieval, search_of, similarities
from onebase.errors import BaseMismatch
from onebase.evaluation import Scores, grouped_references, mean_loss, text_scores
from onebase.files import write_text
from onebase.models.base import Base
from onebase.models.fingerprint import combined
from onebase.models.generation import answers
from onebase.models.scoring import choose, scorer
from onebase.prediction import baseline, marks, outputs_of, predictions
from onebase.storage.adapter_files import TENSORS
from onebase.storage.format import read_adapter, write_adapter
from onebase.training import checkpoint
from onebase.training.card import model_card
from onebase.training.curves import draw_curves, save_png
from onebase.training.distributed import Hashed, World, base_digests, spread
from onebase.training.loop import Finished
from onebase.training.plan import Plan
from onebase.training.prepare import Prepared
from onebase.training.record import (
    AdapterFacts,
    BaseFacts,
    Memory,
    MetricsFile,
    Proof,
    RunRecord,
    Sample,
    Score,
    TargetRow,
    Timing,
    json_ready,
)
from onebase.training.report import write_report

LIBRARIES = ("onebase", "torch", "transformers", "safetensors", "datasets")
# What a report on pairs says of their negatives.
PAIRS = {
    "negatives": "the other texts of the batch, but for those that its rows pair with the anchor",
    "searched": "all positives and negatives of the held-out rows",
}
REASONS = {
    "completed": "all steps were done",
    "early": "the held-out loss stopped improving",
}


@dataclass(frozen=True)
class Outcome:
    """What the loop leaves to be finished."""

    config: TrainConfig
    ready: Prepared
    plan: Plan
    ended: Finished
    hashed: Hashed  # the base's tensors before the first step
    world: World = World()


def finish(base: Base, folder: Path, outcome: Outcome) -> tuple[Adapter, RunRecord]:
    """Write the adapter and its reports into the run folder. Raises BaseMismatch if the base has changed.

    Of several processes each proves its own base and scores its share, and the first alone answers and writes.
    """
    world = outcome.world
    proof = _prove(base, outcome)
    world.wait()  # for the last checkpoint
    adapter, reason = _chosen(base, folder, outcome)
    if world.leads:
        write_adapter(adapter, folder)
    world.wait()
    before, after, samples = _compare(base, adapter, outcome)
    record = RunRecord(
        title=folder.name,
        base=BaseFacts(
            base.name, base.fingerprint, base.parameters, base.stored_bytes, base.dtype, base.dtype_reason
        ),
        adapter=_adapter_facts(folder, adapter, outcome),
        proof=proof,
        memory=Memory(outcome.plan.memory, peak_memory(base.device)),
        timing=_timing(outcome),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        finished=reason,
        way=outcome.ready.way.shown,
        coverage=tuple(_target_row(row) for row in outcome.plan.coverage),
        samples=samples,
        before=before,
        after=after,
        settings=_settings(outcome),
        data=_data_facts(outcome),
        machine=machine(),
        versions={
            "python": platform.python_version(),
            **{n: importlib.metadata.version(n) for n in LIBRARIES},
        },
        allowed=outcome.ready.allowed,
        head=_peft_head(base),
        embedder=base.embedder.as_dict() if base.embedder else {},
    )
    if world.leads:
        _write_reports(folder, record)
    return adapter, record


def _prove(base: Base, outcome: Outcome) -> Proof:
    started = time.perf_counter()
    before, after = outcome.hashed.digests, base_digests(base.model)
    changed = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
    if changed:
        raise BaseMismatch(
            "base unchanged", f"{len(changed)} of its tensors differ after training: {changed[:5]}"
        )
    seconds = outcome.hashed.seconds + time.perf_counter() - started
    return Proof(combined(before), combined(after), len(after), seconds)


def _chosen(base: Base, folder: Path, outcome: Outcome) -> tuple[Adapter, str]:
    """The adapter of the best evaluation, else the last one; and why training ended, in words."""
    progress, reason = outcome.ended.progress, REASONS[outcome.ended.reason]
    best = progress.best_step if progress.best_step > 0 else progress.step
    if progress.best_step == 0:
        plain = "the untrained head" if base.head else "the plain base"
        first = "the adapter that it started from" if outcome.ready.start else plain
        reason += f"; no evaluation was better than {first}, so the last step's adapter is kept"
    elif best != progress.step:
        reason += f"; the adapter is that of step {best}, the best evaluation"
    adapter = with_kinds(base.model, read_adapter(checkpoint.folder_of(folder, best)))
    facts = {
        "steps": best,
        "tokens": progress.tokens,
        "rows": outcome.plan.rows,
        "loss": progress.best_loss if progress.best_step > 0 else None,
        "settings": _settings(outcome),
    } | ({"start": dict(outcome.ready.start.facts)} if outcome.ready.start else {})
    return replace(adapter, origin=replace(adapter.origin, training=json_ready(facts))), reason


def _compare(
    base: Base, adapter: Adapter, outcome: Outcome
) -> tuple[Score | None, Score | None, tuple[Sample, ...]]:
    """Loss and answers on held-out rows, the plain base's (or a constant answer's) and the adapter's."""
    if not outcome.ready.data.valid_rows.rows:
        return None, None, ()
    if base.head is not None:
        return _compare_labels(base, base.head, adapter, outcome)
    if base.embedder is not None:
        return _compare_pairs(base, adapter, outcome)
    # A pass through a sharded base needs all processes.
    answering = outcome.world.leads or outcome.config.shard_base
    count = outcome.config.samples if answering else 0
    groups = grouped_references(outcome.ready.data.valid)[:count]
    base = outcome.ready.words.base
    before, plain = _score(base, _only_new_tokens(base, adapter), groups, outcome)
    after, tuned = _score(base, adapter, groups, outcome)
    tokenizer: Any = base.tokenizer
    texts = [
        str(tokenizer.decode(render_prompt(tokenizer, group[0][0], outcome.ready.data.form)))
        for group in groups
    ]
    samples = [
        Sample(_shown(group[0][0], text), group[0][1], old, new)
        for group, text, old, new in zip(groups, texts, plain, tuned, strict=True)
    ]
    return before, after, tuple(samples)


def _compare_labels(
    base: Base, head: Head, adapter: Adapter, outcome: Outcome
) -> tuple[Score, Score, tuple[Sample, ...]]:
    """How good the adapter's labels are, beside those of who says the same of every row."""
    data, rows = outcome.ready.data, outcome.ready.data.valid_rows.rows
    with injected(base.model, adapter, "finish"):
        outputs = outputs_of(base, rows, outcome.config.optim.batch_size)
    texts = {example.row: example for example in data.valid}
    shown = list(zip(rows, predictions(head, outputs), strict=True))[: outcome.config.samples]
    samples = [
        Sample(_pair(texts[row.row]), reference(texts[row.row]), _said(head.constant), _said(given.label))
        for row, given in shown
    ]
    before, after = (Score(**one._asdict()) for one in (baseline(head, rows), marks(head, outputs, rows)))
    return before, after, tuple(samples)


def _compare_pairs(base: Base, adapter: Adapter, outcome: Outcome) -> tuple[Score, Score, tuple[Sample, ...]]:
    """How well anchors find their positives by the plain base and with the adapter, and what the first ones find."""
    data, size = outcome.ready.data, outcome.config.optim.batch_size
    rows, search = data.valid_rows.rows, search_of(data.valid_rows.rows)
    scores: list[Score] = []
    nearest: list[list[int]] = []
    for one in (None, adapter):
        with injected(base.model, one, "finish"):
            loss = mean_loss(scorer(base, outcome.ready.way, "finish"), rows, size)[0]
            found = similarities(base, search, size)
        scores.append(Score(loss, **retrieval(search, found)._asdict()))
        nearest.append(found.argmax(1).tolist())
    examples = {example.row: example for example in data.valid}
    texts = {ids: text for row in rows for ids, text in zip(*_told(row, examples[row.row]), strict=True)}
    samples = [
        Sample(
            texts[anchor],
            texts[search.candidates[right.index(True)]],
            *(texts[search.candidates[n]] for n in found),
        )
        for anchor, right, *found in zip(search.anchors, search.right.tolist(), *nearest, strict=True)
    ]
    return scores[0], scores[1], tuple(samples[: outcome.config.samples])


def _told(row: Encoded, example: Example) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    return [tuple(part.ids) for part in split_row(row)], texts_of(example)


def _pair(example: Example) -> str:
    return "\n".join(text for text in (example.text, example.text_pair) if text is not None)


def _said(label: str | float) -> str:
    return label if isinstance(label, str) else f"{label:.4g}"


def _peft_head(base: Base) -> dict[str, Any]:
    """What transformers must be told to build the model: outputs, their names, the padding that a decoder skips."""
    if base.head is None:
        return {}
    names = {str(number): name for number, name in enumerate(base.head.labels)}
    return (
        {"num_labels": base.head.outputs}
        | ({"id2label": names} if names else {})
        | {"pad_token_id": base.pad_id}
    )


def _settings(outcome: Outcome) -> dict[str, Any]:
    """The run's options; a resumed run is the run that it resumed."""
    return flatten(replace(outcome.config, resume=False, overwrite=False))


def _score(
    base: Base, adapter: Adapter | None, groups: list[list[tuple[Example, str]]], outcome: Outcome
) -> tuple[Score, list[str]]:
    data, config = outcome.ready.data, outcome.config
    with injected(base.model, adapter, "finish"):
        proven = adapter is not None or config.shard_base
        way = outcome.ready.way if proven else choose(base, "auto", None)
        held_out = data.valid_rows.rows
        score = spread(scorer(base, way, "finish"), outcome.world)
        part, tokens = mean_loss(score, held_out, config.optim.batch_size)
        loss = outcome.world.total(part)
        if not groups:
            return Score(loss, Scores(loss, tokens).perplexity), []
        longest = max(len(row.ids) for row in data.valid_rows.rows)
        room = Sampling(max_new_tokens=min(256, max(32, longest)))
        given = answers(base, [group[0][0] for group in groups], data.form, room)
    exact = text_scores(given, [[text for _, text in group] for group in groups])[0]
    return Score(loss, Scores(loss, tokens).perplexity, exact), given


def _only_new_tokens(base: Base, adapter: Adapter) -> Adapter | None:
    """What the plain base lacks to read the rows: its tokens' rows as they started; None where none are new."""
    new, modules = adapter.origin.tokens, dict(base_modules(base.model))
    if not new:
        return None
    starts = {path: start_rows(modules[path], own.ids, new.values()) for path, own in adapter.tokens.items()}
    return replace(adapter, lowrank={}, full={}, tokens=starts)


def _shown(example: Example, rendered: str) -> str:
    """The prompt as the user wrote it; a chat as it was rendered."""
    return example.prompt if example.prompt is not None else rendered


def _adapter_facts(folder: Path, adapter: Adapter, outcome: Outcome) -> AdapterFacts:
    config = outcome.config.lora
    targets = config.target_modules
    return AdapterFacts(
        path=str(folder),
        parameters=outcome.plan.trainable,
        file_bytes=(folder / TENSORS).stat().st_size,
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        targets=targets if isinstance(targets, str) else ",".join(targets),
    )


def _target_row(row: CoverageRow) -> TargetRow:
    return TargetRow(row.target, row.modules, row.layers, f"{row.shape[0]} → {row.shape[1]}", row.rank)


def _timing(outcome: Outcome) -> Timing:
    progress = outcome.ended.progress
    rate = progress.tokens / progress.seconds if progress.seconds else 0.0
    return Timing(progress.seconds, progress.step, progress.tokens, rate)


def _data_facts(outcome: Outcome) -> dict[str, Any]:
    data = outcome.ready.data
    facts = {n: v for n, v in dataclasses.asdict(data.summary).items() if n not in ("labels", "pairs") or v}
    findings = [finding["gate"] for finding in facts.pop("findings")]
    return {
        "source": outcome.config.data.data,
        **facts,
        **(PAIRS if data.summary.kind == "pairs" else {}),
        "held-out rows": len(data.valid_rows.rows),
        "findings": findings,
    }


def _write_reports(folder: Path, record: RunRecord) -> None:
    metrics = MetricsFile(folder / "metrics.jsonl").read()
    steps, evals = ([m for m in metrics if m["kind"] == kind] for kind in ("step", "eval"))
    save_png(draw_curves(steps, evals), folder / "curves.png")
    write_report(record, metrics, folder / "report.html")
    write_text(folder / "README.md", model_card(record))
    write_text(folder / "run.json", json.dumps(record.as_dict(), indent=2) + "\n")
