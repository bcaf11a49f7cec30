"""Optional loggers, chosen by name: TensorBoard, Weights & Biases, Trackio. `metrics.jsonl` needs none of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from onebase.errors import ConfigError, nearest

# How users of these tools know the two kinds of lines in metrics.jsonl.
PREFIXES = {"step": "train/", "eval": "eval/"}


class Run(NamedTuple):
    """What a logger is told at its start; `first_step` is above 1 in a resumed run."""

    folder: Path
    settings: Mapping[str, Any]
    first_step: int


class Logger(NamedTuple):
    """An open logger: two functions."""

    log: Callable[[dict[str, float], int], object]
    close: Callable[[], object]


def _tensorboard(module: ModuleType, run: Run) -> Logger:
    """Event files in `<run folder>/tensorboard`."""
    folder = str(run.folder / "tensorboard")
    # purge_step hides what an interrupted run had logged beyond its last checkpoint.
    writer = module.SummaryWriter(folder, purge_step=run.first_step if run.first_step > 1 else None)
    writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in run.settings.items()))

    def log(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Logger(log, writer.close)


def _tracker(module: ModuleType, run: Run) -> Logger:
    """wandb and trackio share init, log and finish. A resumed run shows up as a second run of the same name."""
    project = os.environ.get(f"{module.__name__.upper()}_PROJECT", "onebase")
    started = module.init(project=project, name=run.folder.resolve().name, config=dict(run.settings))
    return Logger(lambda metrics, step: started.log(metrics, step=step), started.finish)


# name -> (module that offers it, how to open it)
LOGGERS: dict[str, tuple[str, Callable[[ModuleType, Run], Logger]]] = {
    "tensorboard": ("torch.utils.tensorboard", _tensorboard),
    "wandb": ("wandb", _tracker),
    "trackio": ("trackio", _tracker),
}


class Loggers:
    """All chosen loggers as one. Also a context manager, which closes them."""

    def __init__(self, loggers: Sequence[Logger], stack: ExitStack) -> None:
        self._loggers, self._stack = tuple(loggers), stack

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log the numbers among `metrics`, which may be a line of metrics.jsonl: its kind gives the prefix."""
        prefix = PREFIXES.get(metrics.get("kind", ""), "")
        numbers = {
            prefix + name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        for logger in self._loggers:
            logger.log(numbers, step)

    def close(self) -> None:
        """Close every logger, even if closing one of them fails. Closing twice does nothing."""
        self._stack.close()

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_loggers(
    names: Sequence[str], run_folder: str | Path, settings: Mapping[str, Any], first_step: int = 1
) -> Loggers:
    """Open the loggers called `names` (any of LOGGERS, possibly none) for the run in `run_folder`.

    Raises ConfigError for an unknown name or a package that is not installed, before any logger is opened.
    """
    modules = require_loggers(names)
    run = Run(Path(run_folder), settings, first_step)
    with ExitStack() as stack:
        loggers: list[Logger] = []
        for name, module in modules.items():
            loggers.append(LOGGERS[name][1](module, run))
            stack.callback(loggers[-1].close)
        return Loggers(loggers, stack.pop_all())


def require_loggers(names: Sequence[str]) -> dict[str, ModuleType]:
    """The loggers' modules. Raises ConfigError for an unknown name or a package that is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"option log={name}", "no logger of that name", nearest(name, LOGGERS))
    return {name: _import(name) for name in dict.fromkeys(names)}


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(LOGGERS[name][0])
    except ImportError as error:
        raise ConfigError(
            f"option log={name}",
            f"the package is not installed ({error})",
            hint=f"Install it: pip install 'onebase[{name}]'",
        ) from error
