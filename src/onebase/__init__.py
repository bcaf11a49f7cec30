"""onebase: one frozen base model, many LoRA adapters.

    import onebase

    base = onebase.load_base("smollm2-135m")
    run = onebase.train(base, data="rows.jsonl", output="runs/first", chat=True)
    print(onebase.generate(base, "My kettle broke", adapter=run.adapter))

Names load their module when first used, so that `import onebase` and `onebase --help` are quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onebase.adapters.adapter import Adapter
    from onebase.adapters.injection import eject, extract, inject, use
    from onebase.config import LoraConfig
    from onebase.evaluation import evaluate
    from onebase.models.base import load_base
    from onebase.models.generation import generate
    from onebase.storage.format import load_adapter, save_adapter
    from onebase.training.run import train

__all__ = [
    "Adapter",
    "LoraConfig",
    "eject",
    "evaluate",
    "extract",
    "generate",
    "inject",
    "load_adapter",
    "load_base",
    "save_adapter",
    "train",
    "use",
]

_HOMES = {
    "Adapter": "adapters.adapter",
    "LoraConfig": "config",
    "eject": "adapters.injection",
    "evaluate": "evaluation",
    "extract": "adapters.injection",
    "generate": "models.generation",
    "inject": "adapters.injection",
    "load_adapter": "storage.format",
    "load_base": "models.base",
    "save_adapter": "storage.format",
    "train": "training.run",
    "use": "adapters.injection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onebase' has no attribute {name!r}")
    return getattr(importlib.import_module(f"onebase.{_HOMES[name]}"), name)
