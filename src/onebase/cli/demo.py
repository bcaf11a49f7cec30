"""`onebase demo`: the main job on data that comes with onebase, and the proof of what happened."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from onebase.adapters.injection import eject as take_off
from onebase.adapters.injection import inject, injected, use
from onebase.cli.configs import DemoConfig
from onebase.cli.console import console, say
from onebase.cli.screen import TrainingScreen, print_record
from onebase.config import build
from onebase.data.template import PromptFormat, render_prompt
from onebase.demo import read_demo
from onebase.errors import BaseMismatch
from onebase.models.base import Base, load_base
from onebase.storage.format import load_adapter
from onebase.training.record import RunRecord
from onebase.training.run import train

# One pass is enough for these rows; a small base and short rows bear a high learning rate.
SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 8,
    "lr": 2e-3,
    "holdout": 60,
    "samples": 60,
    "overwrite": True,
}
SHOWN = 5


def run(options: dict[str, Any]) -> int:
    """Train on the demo's rows, then show answers, scores, sizes and the proofs."""
    config = build(DemoConfig, options)
    console.print("Support messages -> JSON. The rows are synthetic, made by onebase.demo.make_data.\n")
    base = load_base("smollm2-135m")
    with TrainingScreen() as screen:
        result = train(base, screen, data=str(read_demo()), output=config.output, **SETTINGS)
    assert result.record is not None, "nothing asks the demo to stop"
    console.print(_answers(result.record))
    print_record(result.record)
    _prove_off(base, result.folder, result.record)
    say(f"\nreport:  {result.folder}/report.html")
    say(f"try it:  onebase chat --adapter {shlex.quote(str(result.folder))}")
    return 0


def _answers(record: RunRecord) -> Table:
    """The first held-out rows: the base's answer beside the adapter's."""
    table = Table(
        "message",
        "base",
        "adapter",
        title=f"held-out rows, {SHOWN} of {len(record.samples)}",
        show_lines=True,
    )
    for sample in record.samples[:SHOWN]:
        right = "green" if sample.matches(sample.after) else "red"
        table.add_row(
            Text(sample.prompt),
            Text(" ".join(sample.before.split())[:160], "dim"),
            Text(sample.after, right, overflow="fold"),
        )
    return table


def _prove_off(base: Base, folder: Path, record: RunRecord) -> None:
    """Load the saved adapter and switch it off: the base's logits must come back bit for bit."""
    adapter = load_adapter(folder, base)
    prompt = record.samples[0].prompt
    ids = torch.tensor([render_prompt(base.tokenizer, prompt, PromptFormat.from_dict(adapter.origin.prompt))])  # pyright: ignore[reportArgumentType]
    with torch.no_grad(), injected(base.model, None):
        plain = base.model(ids).logits
    inject(base.model, adapter, "demo")
    with torch.no_grad(), use(base.model, "demo"):
        tuned = base.model(ids).logits
    with torch.no_grad(), use(base.model, None):
        off = base.model(ids).logits
    take_off(base.model)
    if torch.equal(plain, tuned) or not torch.equal(plain, off):
        raise BaseMismatch("adapter switched off", "the base's logits did not come back bit for bit")
    console.print("base unchanged: [green]verified[/], every tensor's digest is what it was before training")
    console.print("adapter switched off: [green]verified[/], the base's logits come back bit for bit")
