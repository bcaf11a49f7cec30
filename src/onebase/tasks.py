"""What rows can teach, and which options make no sense for it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from onebase.errors import ConfigError
from onebase.options import require

TaskName = Literal["causal", "classify", "regress", "embed"]
PoolingName = Literal["", "mean", "cls", "last", "max"]

CAUSAL, CLASSIFY, REGRESS, EMBED = get_args(TaskName)
POOLINGS: tuple[str, ...] = get_args(PoolingName)[1:]

_OF_TEXT = ("chat", "system", "separator", "loss_on", "teach_eos", "group_prompts", "recompute")
_OF_VECTORS = ("pooling", "similarity_scale")
# Task -> options that it does not read, or values (name=value) that it cannot use.
UNREAD: dict[str, tuple[str, ...]] = {
    CAUSAL: _OF_VECTORS,
    CLASSIFY: (*_OF_TEXT, *_OF_VECTORS),
    REGRESS: (*_OF_TEXT, *_OF_VECTORS),
    EMBED: (*_OF_TEXT, "init=eva", "init=lora_ga"),
}
WHY = {
    "init=eva": "it looks at rows one at a time, and a pair is learnt beside the others of its batch",
    "init=lora_ga": "it looks at rows one at a time, and a pair is learnt beside the others of its batch",
}


def require_task(task: str) -> None:
    """Raise ConfigError where there is no such task."""
    require("task", task, task in UNREAD, "one of " + ", ".join(UNREAD))


def require_read(task: str, *configs: Any) -> None:
    """Raise ConfigError for the first field of these dataclasses that was set and that the task would ignore."""
    for config in configs:
        for item in dataclasses.fields(config):
            value = getattr(config, item.name)
            for name in (item.name, f"{item.name}={value}"):
                if name in UNREAD[task] and value != item.default:
                    found = WHY.get(name, f"--task {task} makes no use of it")
                    raise ConfigError(f"options task={task} and {name}", found, hint="leave it out")
