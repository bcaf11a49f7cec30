"""The command line: a table of commands, one parser made from the options of each, and errors without traceback."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from onebase import config
from onebase.cli import configs
from onebase.cli.parser import parse
from onebase.errors import ConfigError, OnebaseError, nearest


class Command(NamedTuple):
    """One command: its options, the module that runs it, what it is for, an example, its positional option."""

    options: type
    module: str
    help: str
    example: str
    positional: str = ""


COMMANDS: dict[str, Command] = {
    "train": Command(
        config.TrainConfig,
        "train",
        "train an adapter on your rows; the base stays as it is",
        "onebase train --data rows.jsonl --output runs/first --rank 8",
    ),
    "sweep": Command(
        configs.SweepConfig,
        "sweep",
        "train a grid of adapters at once on one base: several values, with commas, for rank, lr, seed and others",
        "onebase sweep --data rows.jsonl --output runs/sweep --rank 4,8,16 --lr 1e-4,5e-4",
    ),
    "preview": Command(
        configs.PreviewConfig,
        "preview",
        "show what the model will see: tokens, which of them carry loss, and the checks",
        "onebase preview --data rows.jsonl --chat",
    ),
    "generate": Command(
        configs.GenerateConfig,
        "generate",
        "answer one prompt or a file of prompts, with an adapter or without",
        "onebase generate --adapter runs/first --prompt 'My kettle broke'",
    ),
    "predict": Command(
        configs.PredictConfig,
        "predict",
        "say which label an adapter with a head gives to a text or a file of them, and how sure it is",
        "onebase predict --adapter runs/stars --prompt 'It broke after a day'",
    ),
    "embed": Command(
        configs.EmbedConfig,
        "embed",
        "write the vector of each text, by an adapter that was trained for it or by the plain base",
        "onebase embed --adapter runs/near --input texts.jsonl --output vectors.npy",
    ),
    "chat": Command(
        configs.ChatConfig,
        "chat",
        "talk to the base or to an adapter",
        "onebase chat --adapter runs/first",
    ),
    "serve": Command(
        configs.ServeConfig,
        "serve",
        "answer HTTP requests as OpenAI's API does, each by the adapter that it names, and show a page to try them",
        "onebase serve --base smollm2-135m --adapters runs",
    ),
    "eval": Command(
        configs.EvalConfig,
        "evaluate",
        "score base and adapter on rows: loss, perplexity, exact match, BLEU, chrF; labels: accuracy, F1, R²; or pairs",
        "onebase eval --adapter runs/first --data test.jsonl",
    ),
    "combine": Command(
        configs.CombineConfig,
        "combine",
        "make one adapter of several: weighted sums, TIES, DARE, pruning, negation, compression",
        "onebase combine runs/a,runs/b --weights=0.5,0.5 --method svd --rank 16 --output runs/both",
        positional="adapters",
    ),
    "extract": Command(
        configs.ExtractConfig,
        "extract",
        "make the adapter that turns a base into a model tuned from it: the best low rank of each difference",
        "onebase extract --base smollm2-135m --tuned my-model --rank 16 --output runs/extracted",
    ),
    "merge": Command(
        configs.MergeConfig,
        "merge",
        "write base and adapter as one plain model, and compare the two",
        "onebase merge --adapter runs/first --output merged",
    ),
    "export": Command(
        configs.ExportConfig,
        "export",
        "write an adapter for other engines: PEFT, vLLM, llama.cpp, Ollama, or merged; and compare it with its source",
        "onebase export runs/first --to gguf --output first.gguf",
        positional="adapter",
    ),
    "inspect": Command(
        configs.InspectConfig,
        "inspect",
        "show what an adapter folder holds and where it came from",
        "onebase inspect runs/first",
        positional="adapter",
    ),
    "doctor": Command(
        configs.DoctorConfig,
        "doctor",
        "say why an adapter has no effect, or a bad one; exits with 1 where it is sick",
        "onebase doctor runs/first --base smollm2-135m",
        positional="adapter",
    ),
    "compare": Command(
        configs.CompareConfig,
        "compare",
        "show how two adapters differ, layer by layer and in what they do to prompts",
        "onebase compare runs/a runs/b --prompts prompts.txt",
        positional="adapters",
    ),
    "bench": Command(
        configs.BenchConfig,
        "bench",
        "how fast this machine trains: its matrix products, onebase, and PEFT if it is installed",
        "onebase bench --base smollm2-135m",
    ),
    "demo": Command(
        configs.DemoConfig,
        "demo",
        "train an adapter on data that comes with onebase, and prove what happened",
        "onebase demo",
    ),
}

SPINS = "1000"  # what GNU's OpenMP itself takes where there are more threads than cores
USAGE = "usage: onebase COMMAND [options]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 1 (sick adapter), 2 (user's mistake), 3 (diverged run), 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Before tokenizers is imported: rows are encoded on all cores, without a warning at each process that is started.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    settle_threads()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("onebase").setLevel(logging.INFO)
    return guarded(lambda: _dispatch(arguments))


def settle_threads() -> None:
    """Let torch's threads sleep after some microseconds of waiting for each other; before torch is imported.

    GNU's OpenMP lets them spin 300,000 times, milliseconds at each product in which the one that is waited for has no
    core while another program is at work (docs/performance.md, "On a busy machine"). What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def guarded(run: Callable[[], int]) -> int:
    """Turn errors that a user can cause into one message and an exit code."""
    try:
        code = run()
        sys.stdout.flush()  # a pipe that broke shows here, not while the interpreter shuts down
        return code
    except OnebaseError as error:
        print(f"onebase: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("onebase: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: `onebase inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"onebase {importlib.metadata.version('onebase')}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name}", "no such command", nearest(name, COMMANDS), USAGE)
    command = COMMANDS[name]
    options = parse(name, command, arguments[1:])
    if options is None:  # --help or --print_config has printed what was asked
        return 0
    run: Callable[[Any], int] = load(f"onebase.cli.{command.module}").run
    return run(options)


def load(name: str) -> ModuleType:
    """A module by its name; while it is loaded Python's cycle collector rests, and leaves what came with it alone.

    torch and transformers define a million objects that stay until the process ends. To go through them took a
    quarter of the time of their import, and then 0.2 s of each full collection in a run.
    """
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "onebase: one frozen base model, many LoRA adapters.",
            "",
            USAGE,
            "",
            *lines,
            "",
            "Every option of a command: onebase COMMAND --help. Options may also stand in a YAML file: --config FILE.",
            "Start here: onebase demo",
        ]
    )
