"""What is trained, in values and bytes; a step's time and memory in a fresh process, with the sums of docs/math.md."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import measured
from benchmarks.evidence.learn import (
    Course,
    batches,
    fused_adamw,
    learner,
    lora_config,
    open_base,
    optim_config,
    own_weights,
)
from benchmarks.evidence.plan import FULL, LORA, METHODS
from benchmarks.evidence.settings import SETTINGS, Setting
from benchmarks.evidence.tasks import open_task
from onebase.adapters.targets import match
from onebase.models.base import Base
from onebase.models.scoring import packed_loss
from onebase.storage.format import save_adapter
from onebase.training.step import train_step
from onebase.training.work import Decoder, attention_flop, load_of, product_flop, read_decoder, step_products

WARM_UP = 2


def sizes(method: str, course: Course) -> dict[str, Any]:
    """Counts after one real step: trained values, bytes of gradients and of the optimiser's state, bytes on disk."""
    with learner(method, 0, course) as made:
        optimizer = fused_adamw(made.parameters, course.config)
        train_step(made.loss, made.parameters, optimizer, [course.rows[:1]], course.config.clip)
        values = list(made.parameters.values())
        gradients = sum(p.grad.nbytes for p in values if p.grad is not None)
        state = sum(t.nbytes for p in values for t in optimizer.state[p].values() if t.ndim)
        adapter = made.adapter()
        count, file = sum(p.numel() for p in values), sum(p.nbytes for p in values)
    if adapter is not None:
        with tempfile.TemporaryDirectory() as folder:
            saved = save_adapter(adapter, Path(folder) / "adapter")
            file = sum(path.stat().st_size for path in saved.iterdir())
    return {
        "trained": count,
        "total": sum(p.numel() for p in course.base.model.parameters()),
        "gradients": gradients,
        "optimizer": state,
        "file": file,
    }


def in_fresh_process(setting: Setting, side: str, data: Path) -> dict[str, Any]:
    """`one_side` in a process of its own."""
    command = [sys.executable, "-m", __name__, setting.name, *side.split(), str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def one_side(setting: Setting, side: str, dtype: str, data: Path) -> dict[str, Any]:
    """Seconds of a step (median), peak memory above what the process held with its weights, and the step's FLOP."""
    method = FULL if side == "full" else LORA
    plain = own_weights(open_base(setting, dtype))
    task = open_task(setting.main_task, setting, plain, data)
    config = optim_config(METHODS[method], 1e-5, WARM_UP + setting.timed_steps, setting.batch_size)
    course = Course(plain, lambda: open_base(setting, "float32"), task.train, task.test, config)
    steps = [batches(task.train, config, 0, step)[0] for step in range(config.max_steps)]
    seconds: list[float] = []
    with learner(method, 0, course) as made, measured() as found:
        loss = packed_loss(plain.model) if side == "packed" else made.loss  # pyright: ignore[reportArgumentType]
        optimizer = fused_adamw(made.parameters, config)
        for step in steps:
            start = time.perf_counter()
            train_step(loss, made.parameters, optimizer, [step], config.clip)
            seconds.append(time.perf_counter() - start)
    flop = [step_flop(plain, step, method) for step in steps[WARM_UP:]]
    return {
        "seconds": statistics.median(seconds[WARM_UP:]),
        "memory": found["memory"],
        "flop": statistics.median(flop),
        "tokens": sum(len(row.ids) for step in steps[WARM_UP:] for row in step) / setting.timed_steps,
        "weights": sum(p.nbytes for p in made.base.model.parameters()),
        "state_bytes": 12 * sum(p.numel() for p in made.parameters.values()),
    }


def step_flop(base: Base, rows: Any, method: str) -> int:
    """A step's floating-point operations: products and attention, counted from shapes."""
    lora = METHODS[LORA]
    decoder = read_decoder(base.model, match(base.model, lora_config(lora)))
    assert decoder is not None
    decoder = all_trained(decoder) if method == FULL else decoder
    load = load_of(rows, share=False)
    products = sum(product_flop(part) for part in step_products(decoder, load).values())
    return products + attention_flop(decoder.attention, load.pairs)


def all_trained(decoder: Decoder) -> Decoder:
    """The same shapes where every layer learns: no factors, a gradient for each weight and each input."""
    full = [one._replace(rank=0, gradient=True, full=True) for one in decoder.linears]
    head = decoder.head and decoder.head._replace(full=True)
    attention = decoder.attention._replace(trained=decoder.attention.layers)
    return Decoder(tuple(full), head, attention)


if __name__ == "__main__":
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("setting", choices=SETTINGS)
    made.add_argument("side")
    made.add_argument("dtype")
    made.add_argument("data", type=Path)
    given = made.parse_args()
    print(json.dumps(one_side(SETTINGS[given.setting], given.side, given.dtype, given.data)))
