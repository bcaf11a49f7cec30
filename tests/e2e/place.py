"""Where the end-to-end tests work, and the flags of their short training."""

from typing import NamedTuple


class Place(NamedTuple):
    """Paths, as text: the base's folder, the rows, and the run that was trained on them."""

    base: str
    rows: str
    run: str


TRAINING = ["--dtype", "float32", "--max-steps", "3", "--batch-size", "8", "--rank", "4", "--lr", "0.05"]


def learning(task: str, base: str, rows: str, output: object) -> list[str]:
    """The command that teaches an adapter this task."""
    return ["train", "--task", task, "--base", base, "--data", rows, "--output", str(output)]
