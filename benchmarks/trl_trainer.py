"""TRL's SFTTrainer as its users run it: its defaults but for the adapter's shape, the batch size and where files go.

Its default of bfloat16 autocast does not start on a CPU unless one says `use_cpu`, as is done here; in a float32 run
it is off, so that the sides compute in the same precision.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from benchmarks.workload import Place
from onebase.data.template import Encoded


class Clock(TrainerCallback):
    """Seconds of each optimiser step; what comes between steps (fetching rows, saving) is not counted."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def dataset(rows: Sequence[Encoded]) -> Dataset:
    """The very tokens that the other sides see."""
    labels = [[t if on else -100 for t, on in zip(row.ids, row.loss, strict=True)] for row in rows]
    return Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": labels})


def trainer(
    place: Place, rows: Sequence[Encoded], adapter: tuple[int, float], output: str, **settings: Any
) -> tuple[SFTTrainer, Clock]:
    """A trainer of an adapter (rank, alpha) on all linear layers; `settings` are SFTConfig's, others its defaults.

    These are a batch of 8, a rate of 2e-5 that falls to 0 in a straight line, and gradient checkpointing.
    """
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    disable_progress_bar()
    rank, alpha = adapter
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock()
    here = {"use_cpu": True, "bf16": place.dtype == "bfloat16", "report_to": "none", "disable_tqdm": True}
    made = SFTTrainer(
        place.base,
        SFTConfig(output, **here, **settings),
        train_dataset=dataset(rows),
        processing_class=AutoTokenizer.from_pretrained(place.base),
        peft_config=lora,
        callbacks=[clock],
    )
    return made, clock


def step_times(
    place: Place, rows: Sequence[Encoded], batch_size: int, adapter: tuple[int, float]
) -> tuple[list[float], list[int]]:
    """(seconds, tokens that are not padding) of each step of one pass over the rows."""
    counts: list[int] = []
    with tempfile.TemporaryDirectory() as output:
        made, clock = trainer(
            place,
            rows,
            adapter,
            output,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            save_strategy="no",
        )
        collate = made.data_collator

        def counting(examples: list[dict[str, Any]]) -> dict[str, Any]:
            counts.append(sum(len(example["input_ids"]) for example in examples))
            return collate(examples)

        made.data_collator = counting
        made.train()
    return clock.seconds, counts
