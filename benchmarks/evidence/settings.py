"""How large the experiments are: the real setting, whose rows are committed, and one that only proves they run."""

from __future__ import annotations

from dataclasses import dataclass, replace

KNOWN = 16  # rows that a scarce run has learnt, by which it is looked at
TUNING_SEED = 100  # the seed of all runs that choose a learning rate; no reported run has it


@dataclass(frozen=True)
class Setting:
    """One size of everything. Rows made under another value of a field that they depend on do not count."""

    name: str
    base: str
    dtype: str
    tasks: tuple[str, ...]
    steps: int  # optimiser steps of a run: the same for every method
    batch_size: int
    pool: int  # rows that a run draws its batches from
    tune_rows: int  # held out, a learning rate is chosen by them
    test_rows: int  # held out, reported; of distinct prompts
    answers: int  # test rows that are answered in full
    longest: int  # rows with more tokens are left out, everywhere
    seeds: tuple[int, ...]
    ranks: tuple[int, ...]  # whose sizes are counted
    learned_ranks: tuple[int, ...]  # that are trained
    scarce: tuple[int, ...]  # how many rows there are to learn from
    scarce_steps: int
    long_steps: int  # of the longer runs
    long_test_rows: int  # held out, reported of them; as many as there are, where there are fewer
    long_answers: int
    usual_epochs: int  # of runs as `onebase train` does them where it is told nothing but the rows
    usual_batch: int
    label_task: str  # classes, on an encoder
    label_base: str
    label_steps: int
    label_batch: int
    pair_task: str  # texts that say the same, on an encoder
    pair_base: str
    pair_steps: int
    pair_batch: int
    looks: tuple[int, ...]  # steps after which a scarce run is looked at
    timed_steps: int  # of a step's time
    timed_runs: int  # fresh processes for each way

    @property
    def main_task(self) -> str:
        """The task of the experiments that take one."""
        return self.tasks[0]

    @property
    def wide(self) -> Setting:
        """The same with the held-out rows of the longer runs."""
        return replace(self, test_rows=self.long_test_rows, answers=self.long_answers)


REAL = Setting(
    name="real",
    base="smollm2-135m",
    dtype="bfloat16",
    tasks=("e2e", "wikisql", "gsm8k"),
    steps=20,
    batch_size=8,
    pool=1024,
    tune_rows=32,
    test_rows=48,
    answers=24,
    longest=128,
    seeds=(0, 1, 2),
    ranks=(1, 2, 4, 8, 16, 32, 64),
    learned_ranks=(1, 4, 64),
    scarce=(16, 64, 256, 1024),
    scarce_steps=32,
    long_steps=80,
    long_test_rows=200,
    long_answers=100,
    usual_epochs=3,
    usual_batch=16,
    label_task="rating",
    label_base="minilm",
    label_steps=60,
    label_batch=16,
    pair_task="paraphrase",
    pair_base="minilm",
    pair_steps=60,
    pair_batch=16,
    looks=(0, 4, 8, 16, 24, 32),
    timed_steps=6,
    timed_runs=3,
)
QUICK = Setting(
    name="quick",
    base="tiny",
    dtype="float32",
    tasks=("intent", "product"),
    steps=4,
    batch_size=4,
    pool=64,
    tune_rows=8,
    test_rows=8,
    answers=2,
    longest=256,
    seeds=(0,),
    ranks=(1, 16),
    learned_ranks=(1,),
    scarce=(8, 32),
    scarce_steps=3,
    long_steps=6,
    long_test_rows=12,
    long_answers=3,
    usual_epochs=1,
    usual_batch=16,
    label_task="asks",
    label_base="tiny",
    label_steps=4,
    label_batch=4,
    pair_task="alike",
    pair_base="tiny",
    pair_steps=4,
    pair_batch=4,
    looks=(0, 3),
    timed_steps=2,
    timed_runs=1,
)
SETTINGS = {setting.name: setting for setting in (REAL, QUICK)}
