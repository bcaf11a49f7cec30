"""What each kind of run gives: numbers by name, ready for a row."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import footprint
from benchmarks.evidence.learn import (
    Course,
    Fitted,
    Learner,
    batches,
    fit,
    learner,
    open_base,
    optim_config,
    own_weights,
    require_same_start,
)
from benchmarks.evidence.plan import KINDS, LONG, LORA, METHODS, Job, Method, best_rate
from benchmarks.evidence.quantise import quantise, stored_bytes
from benchmarks.evidence.rows import Rows
from benchmarks.evidence.settings import KNOWN, Setting
from benchmarks.evidence.tasks import (
    METRICS,
    TASKS,
    LabelRows,
    PairRows,
    open_labelled,
    open_pairs,
    open_task,
)
from benchmarks.evidence.tasks import Rows as TaskRows
from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import eject, eval_mode, inject, injected, use
from onebase.config import Sampling
from onebase.data.template import Encoded
from onebase.embedding import retrieval, search_of, similarities
from onebase.errors import Diverged
from onebase.evaluation import mean_loss
from onebase.models.base import Base
from onebase.models.embedder import stated
from onebase.models.generation import answers
from onebase.models.scoring import Way, choose, scorer
from onebase.prediction import baseline, marks, outputs_of
from onebase.storage.format import load_adapter, save_adapter

NAME = "evidence-score"
Found = dict[str, Any]


class Bench:
    """What the runs of a setting share: the plain base, the tasks' rows, a folder for adapters."""

    def __init__(self, setting: Setting, rows: Rows, data: Path, work: Path) -> None:
        self.setting, self.rows, self.data, self.work = setting, rows, data, work
        self.base = open_base(setting)
        self._tasks: dict[str, TaskRows] = {}
        self._labelled: LabelRows | None = None
        self._paired: tuple[Base, PairRows] | None = None
        self._ways: dict[tuple[str, bool], Way] = {}

    @cached_property
    def wide(self) -> Bench:
        """The same base, and the held-out rows of the longer runs."""
        made = copy.copy(self)
        made.setting, made._tasks = self.setting.wide, {}
        return made

    def task(self, name: str) -> TaskRows:
        if name not in self._tasks:
            self._tasks[name] = open_task(name, self.setting, self.base, self.data)
        return self._tasks[name]

    @property
    def labelled(self) -> LabelRows:
        if self._labelled is None:
            base = open_base(self.setting, "float32", self.setting.label_base)
            self._labelled = open_labelled(self.setting.label_task, self.setting, base, self.data)
        return self._labelled

    @property
    def paired(self) -> tuple[Base, PairRows]:
        """The maker of vectors and the rows of its task."""
        if self._paired is None:
            base = open_base(self.setting, "float32", self.setting.pair_base)
            base = base.with_embedder(stated(base.folder))
            self._paired = base, open_pairs(self.setting.pair_task, self.setting, base, self.data)
        return self._paired

    def base_of(self, method: Method) -> Base:
        """The base that an adapter of this method sits on: the shared one, another dtype's, or a rounded one."""
        if not method.bits:
            return open_base(self.setting, method.dtype) if method.dtype else self.base
        base = own_weights(open_base(self.setting))
        quantise(base.model, method.bits, method.block)
        return base

    def way(self, base: Base, adapter: Adapter | None) -> Way:
        """How rows are scored, proven once for each dtype, with an adapter and without."""
        kind = (base.dtype, adapter is None)
        if kind not in self._ways:
            rows = self.task(self.setting.main_task).test
            self._ways[kind] = choose(base, "auto", adapter, rows[:4])
        return self._ways[kind]

    def losses(
        self, base: Base, adapter: Adapter | None, tasks: Sequence[str], part: str
    ) -> dict[str, float]:
        """The mean loss on a part of each task's rows."""
        with injected(base.model, adapter, NAME):
            score = scorer(base, self.way(base, adapter), NAME)
            return {name: mean_loss(score, getattr(self.task(name), part), 16)[0] for name in tasks}

    def metric(self, base: Base, adapter: Adapter | None, name: str) -> float:
        """The task's own measure of whole answers."""
        with injected(base.model, adapter, NAME):
            return self.metric_here(base, name)

    def metric_here(self, base: Base, name: str) -> float:
        """The same, by whatever adapter is chosen on the model."""
        rows, task = self.task(name), TASKS[name]
        sampling = Sampling(max_new_tokens=task.longest_answer, batch_size=self.setting.answers)
        return METRICS[task.metric][1](answers(base, rows.asked, rows.form, sampling), rows.references)

    def course(self, job: Job) -> Course:
        """The base, rows and options of a job that trains."""
        setting, method = self.setting, METHODS[job.method]
        if job.kind.startswith("label"):
            rows, base = self.labelled, open_base(setting, "float32", setting.label_base)
            config = optim_config(method, job.lr, setting.label_steps, setting.label_batch)
            headed = base.with_head(rows.head, job.seed)
            return Course(headed, lambda: copied(headed), rows.train, rows.test, config)
        if job.kind.startswith("pair"):
            base, rows = self.paired
            config = optim_config(method, job.lr, setting.pair_steps, setting.pair_batch)
            return Course(base, lambda: copied(base), rows.train, rows.test, config)
        task = self.task(job.task)
        rows = task.train[: job.rows or setting.pool]
        config = optim_config(method, job.lr, *self.length(job.kind, len(rows)))
        return Course(self.base_of(method), lambda: open_base(setting, "float32"), rows, task.test, config)

    def length(self, kind: str, rows: int) -> tuple[int, int]:
        """Steps, and rows of a batch, of a run on a task with answers."""
        setting = self.setting
        if kind == "usual":
            return setting.usual_epochs * -(-rows // setting.usual_batch), setting.usual_batch
        more = {"scarce": setting.scarce_steps, LONG.tune: setting.long_steps, LONG.final: setting.long_steps}
        return more.get(kind, setting.steps), setting.batch_size


def copied(base: Base) -> Base:
    """The same head on the same weights, none of them shared."""
    return replace(base, model=copy.deepcopy(base.model))


def trained(
    bench: Bench, job: Job, look: Callable[[Learner, int], None] = lambda made, step: None
) -> tuple[Base, Adapter | None, Found]:
    """Train as the job says; what came of it, with the numbers of the training itself."""
    course, started = bench.course(job), time.perf_counter()
    with learner(job.method, job.seed, course) as made:
        done: Fitted = fit(made, course.rows, course.config, job.seed, lambda step: look(made, step))
        adapter = made.adapter()
        parameters = sum(p.numel() for p in made.parameters.values())
    base, dtype = course.base, course.base.dtype
    first = [row for batch in batches(course.rows, course.config, job.seed, 0) for row in batch]
    found: Found = {
        "train": done.losses,
        "tokens": done.tokens,
        "trained": parameters,
        "total": sum(p.numel() for p in base.model.parameters()),
        "first_off": require_same_start(done.losses, base, first),
        "way": made.way.name,
        "seconds": round(time.perf_counter() - started, 1),
        **made.proof,
    }
    if adapter is None:  # as it would be used, and as its last step computed: in the setting's dtype
        changed = made.base.model.to(getattr(torch, dtype)).requires_grad_(False)
        return replace(made.base, model=changed, dtype=dtype), None, found
    return base, adapter, found


def run_base(bench: Bench, job: Job) -> Found:
    tasks = bench.setting.tasks
    return {
        "test": bench.losses(bench.base, None, tasks, "test"),
        "metric": {name: bench.metric(bench.base, None, name) for name in tasks},
        "rows": {name: [len(r) for r in bench.task(name)[:4]] for name in tasks},
        "parameters": bench.base.parameters,
        "stored_bytes": bench.base.stored_bytes,
        "fingerprint": bench.base.fingerprint,
    }


def run_tune(bench: Bench, job: Job) -> Found:
    """A rate on the tuning rows; on the test rows too, for what is not run again."""
    try:
        base, adapter, found = trained(bench, job)
    except Diverged as error:
        return {"tune": None, "test": None, "diverged": error.found}
    return {
        "tune": bench.losses(base, adapter, [job.task], "tune")[job.task],
        "test": bench.losses(base, adapter, [job.task], "test")[job.task],
        **found,
    }


def run_final(bench: Bench, job: Job) -> Found:
    """The test rows of all tasks, and the own task's answers."""
    method = METHODS[job.method]
    found: Found = {}
    if method.bits:
        rounded = bench.base_of(method)
        found["base_test"] = bench.losses(rounded, None, [job.task], "test")
        found["stored_bytes"] = stored_bytes(rounded.model, method.bits, method.block)
    base, adapter, own = trained(bench, job)
    if adapter is not None and (job.kind, job.method) == (LONG.final, LORA):
        save_adapter(adapter, _folder(bench, job), overwrite=True)
    return {
        "test": bench.losses(base, adapter, bench.setting.tasks, "test"),
        "metric": bench.metric(base, adapter, job.task),
        **found,
        **own,
    }


def _folder(bench: Bench, job: Job) -> Path:
    return bench.work / "adapters" / f"{job.task}-{job.seed}"


def run_scarce(bench: Bench, job: Job) -> Found:
    """Loss on rows that were learnt and on held-out ones along the way."""
    task, looks = bench.task(job.task), bench.setting.looks
    known = task.train[: job.rows][:KNOWN]
    curve: list[dict[str, float]] = []

    def look(made: Learner, step: int) -> None:
        if step in looks:
            with torch.no_grad():
                point = {"train": made.loss_of(known), "test": made.loss_of(task.test)}
            curve.append({"step": step, **point})

    return {"curve": curve, **trained(bench, job, look)[2]}


def run_swap(bench: Bench, job: Job) -> Found:
    """All tasks' adapters on one base: each task by its own, by the others' and by none; rows mixed and alone."""
    names = bench.setting.tasks
    adapters = {name: _adapter_of(bench, name) for name in names}
    base, model = bench.base, bench.base.model
    metric: dict[str, dict[str, float]] = {}
    for name, adapter in adapters.items():
        inject(model, adapter, name)
    try:
        with eval_mode(model):
            for name in names:
                metric[name] = {}
                for chosen in (*names, None):
                    with use(model, chosen):
                        metric[name][chosen or "none"] = bench.metric_here(base, name)
            off = _mixed(bench, (*names, None))
    finally:
        eject(model, list(names))
    bytes_each = sum(t.nbytes for t in adapters[names[0]].tensors().values())
    return {"metric": metric, "mixed_off": off, "adapter_bytes": bytes_each}


def _adapter_of(bench: Bench, name: str) -> Adapter:
    """The task's first final adapter: its file, or where that is gone the same training again."""
    rate = best_rate(bench.rows, name, LORA, LONG)
    assert rate is not None
    job = Job(LONG.final, name, LORA, rate, bench.setting.seeds[0])
    if _folder(bench, job).exists():
        return load_adapter(_folder(bench, job), bench.base)
    adapter = trained(bench, job)[1]
    assert adapter is not None
    save_adapter(adapter, _folder(bench, job))
    return adapter


def _mixed(bench: Bench, chosen: Sequence[str | None]) -> float:
    """The largest difference of a logit between one batch in which each row has its own adapter, and rows alone.

    Relative to the largest logit. The rows are one prompt, cut to one length, so that the batch needs no padding.
    """
    model: Any = bench.base.model
    ids = torch.tensor([bench.task(bench.setting.main_task).test[0].ids])
    with torch.no_grad():
        with use(model, list(chosen)):
            together = model(input_ids=ids.expand(len(chosen), -1)).logits
        alone = []
        for name in chosen:
            with use(model, name):
                alone.append(model(input_ids=ids).logits)
    apart = torch.cat(alone)
    return float((together - apart).abs().max() / apart.abs().max())


def run_labels(bench: Bench, job: Job) -> Found:
    """Classes for texts: loss, accuracy and F1 on the tuning rows of a trial, on the test rows of a reported run."""
    part = "tune" if job.kind == "label-tune" else "test"
    rows, head = getattr(bench.labelled, part), bench.labelled.head
    if not job.method:
        return {"test": baseline(head, rows)._asdict(), "labels": list(head.labels), "rows": len(rows)}
    try:
        base, adapter, found = trained(bench, job)
    except Diverged as error:
        return {"tune": None, "diverged": error.found}
    with injected(base.model, adapter, NAME):
        scored = marks(head, outputs_of(base, rows, 16), rows)
    return {part: scored.loss if part == "tune" else scored._asdict(), **found}


def run_pairs(bench: Bench, job: Job) -> Found:
    """Vectors: the loss on the tuning rows of a trial; what anchors find among the test rows of a reported run."""
    plain, rows = bench.paired
    if not job.method:
        return {"test": found_by(plain, None, rows.test), "rows": [len(part) for part in rows]}
    try:
        base, adapter, found = trained(bench, job)
    except Diverged as error:
        return {"tune": None, "diverged": error.found}
    if job.kind == "pair-tune":
        return {"tune": found_by(base, adapter, rows.tune)["loss"], **found}
    return {"test": found_by(base, adapter, rows.test), **found}


def found_by(base: Base, adapter: Adapter | None, rows: Sequence[Encoded]) -> dict[str, float]:
    """Loss, accuracy@1 and MRR@10 of the vectors."""
    search = search_of(rows)
    with injected(base.model, adapter, NAME):
        loss = mean_loss(scorer(base, choose(base, "auto", adapter), NAME), rows, 16)[0]
        return {"loss": loss, **retrieval(search, similarities(base, search, 16))._asdict()}


def run_sizes(bench: Bench, job: Job) -> Found:
    return footprint.sizes(job.method, bench.course(job._replace(task=bench.setting.main_task, lr=1e-4)))


def run_step(bench: Bench, job: Job) -> Found:
    return footprint.in_fresh_process(bench.setting, job.method, bench.data)


RUN: Mapping[str, Callable[[Bench, Job], Found]] = {
    "base": run_base,
    "long-base": run_base,
    "sizes": run_sizes,
    "tune": run_tune,
    "long": run_tune,
    "usual": run_tune,
    "label-base": run_labels,
    "label-tune": run_labels,
    "label-final": run_labels,
    "pair-base": run_pairs,
    "pair-tune": run_pairs,
    "pair-final": run_pairs,
    "final": run_final,
    "long-final": run_final,
    "scarce": run_scarce,
    "swap": run_swap,
    "step": run_step,
}


def run(bench: Bench, job: Job) -> Found:
    """The job's numbers."""
    wide = "long_test_rows" in KINDS[job.kind].fields
    try:
        return RUN[job.kind](bench.wide if wide else bench, job)
    finally:
        gc.collect()
