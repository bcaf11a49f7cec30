"""Where commands print: the console for results, the one for notes, and how a table looks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text


class _Console(Console):
    """rich's console that goes on in silence where its reader is gone: `onebase train ... | head` must not stop."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console()
notes = Console(stderr=True)


def say(text: str) -> None:
    """Print a line as it is: names of files and folders are neither markup nor wrapped."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A two-column table; user text in it is not taken as markup."""
    made = Table(title=Text(title, "italic"), show_header=False, title_justify="left")
    for name, value in rows:
        made.add_row(name, Text(value, overflow="fold"))
    return made
