"""`onebase inspect`: what an adapter folder holds, and where it came from. Needs no base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from onebase.adapters.adapter import Adapter
from onebase.cli.configs import InspectConfig
from onebase.cli.console import console, table
from onebase.config import build, flatten
from onebase.data.labels import Head
from onebase.errors import ConfigError
from onebase.storage.adapter_files import TENSORS
from onebase.storage.format import read_adapter
from onebase.tasks import EMBED
from onebase.training.report import count, plain, size
from onebase.transforms.arithmetic import norms

VARIANTS = {"rslora": "rsLoRA", "dora": "DoRA", "lora_bias": "with bias"}
SHOWN = 2000  # modules in the table; a screen of more takes longer to draw than the file to read
TRAINING = ("steps", "tokens", "rows", "loss")


def run(options: dict[str, Any]) -> int:
    """Print the adapter's config, base, tensors and norms."""
    config = build(InspectConfig, options)
    if not config.adapter:
        raise ConfigError(
            "option adapter", "is empty", hint="name an adapter folder: onebase inspect runs/first"
        )
    adapter = read_adapter(config.adapter)
    facts = describe(adapter, Path(config.adapter))
    if config.json:
        print(json.dumps(facts, indent=2))
        return 0
    _print(facts)
    return 0


def describe(adapter: Adapter, folder: Path) -> dict[str, Any]:
    """The adapter as plain values; `norm` is the Frobenius norm of scale·B·A, 0 where the update does nothing."""
    sizes = norms(adapter)
    modules = [
        {
            "module": path,
            "kind": low.kind,
            "in": low.A.shape[1],
            "out": low.B.shape[0],
            "rank": low.rank,
            "scale": low.scale,
            "norm": sizes[path],
        }
        for path, low in adapter.lowrank.items()
    ]
    full = [
        {"module": p, "tensors": {n: list(t.shape) for n, t in s.items()}} for p, s in adapter.full.items()
    ]
    return {
        "folder": str(folder),
        "bytes": (folder / TENSORS).stat().st_size,
        "parameters": adapter.parameters,
        "config": flatten(adapter.config),
        "base": {"name": adapter.origin.base, "fingerprint": adapter.origin.fingerprint},
        "prompt": dict(adapter.origin.prompt),
        "head": dict(adapter.origin.head),
        "training": dict(adapter.origin.training),
        "modules": modules,
        "trained in full": full,
        "token rows": {path: list(tokens.ids) for path, tokens in adapter.tokens.items()},
        "new tokens": dict(adapter.origin.tokens),
    }


def _token_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Which token rows are the adapter's own, if any are."""
    own = [f"{len(ids)} token rows of {path}" for path, ids in facts["token rows"].items()]
    new = ", ".join(f"{text} ({token})" for text, token in facts["new tokens"].items())
    return [("token rows", "; ".join([*own, *([f"new tokens: {new}"] if new else [])]))] if own else []


def _print(facts: dict[str, Any]) -> None:
    config, training = facts["config"], facts["training"]
    rows = [
        ("base", facts["base"]["name"] or "not recorded"),
        (
            "base fingerprint",
            facts["base"]["fingerprint"] or "not recorded: whether a base is the right one cannot be told",
        ),
        ("size", f"{count(facts['parameters'])} parameters, {size(facts['bytes'])}"),
        ("rank, alpha", f"{config['rank']}, {config['alpha']:g}"),
        ("variant", ", ".join(["LoRA", *(text for name, text in VARIANTS.items() if config[name])])),
        ("start", config["init"]),
        ("prompt format", json.dumps(facts["prompt"]) if facts["prompt"] else "not recorded"),
        ("trained in full", ", ".join(item["module"] for item in facts["trained in full"]) or "nothing"),
    ]
    if facts["head"].get("task") == EMBED:
        rows.append(("vectors", plain({name: v for name, v in facts["head"].items() if name != "task"})))
    elif facts["head"]:
        rows.append(("head", plain(Head.from_dict(facts["head"]).labels or facts["head"]["task"])))
    rows += _token_rows(facts)
    rows += [(f"training: {name}", str(training[name])) for name in TRAINING if name in training]
    idle = [item["module"] for item in facts["modules"] if item["norm"] == 0.0]
    rows.append(
        (
            "without effect",
            f"{len(idle)} of {len(facts['modules'])} modules: B·A is 0" if idle else "no module",
        )
    )
    console.print(table(f"adapter {facts['folder']}", rows))
    modules = Table(
        "module", "in → out", "rank", "scale", "norm of s·B·A", title="updates", title_justify="left"
    )
    for item in facts["modules"][:SHOWN]:
        shape = f"{item['in']} → {item['out']}"
        modules.add_row(
            Text(item["module"], overflow="fold"),
            shape,
            str(item["rank"]),
            f"{item['scale']:g}",
            f"{item['norm']:.4g}",
        )
    console.print(modules)
    if (more := len(facts["modules"]) - SHOWN) > 0:
        console.print(f"... and {more:,} more: --json lists all")
