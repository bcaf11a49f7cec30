"""`onebase chat`: a conversation with the base or an adapter, in the terminal."""

from __future__ import annotations

import sys
from typing import Any

from onebase.adapters.adapter import Adapter
from onebase.adapters.injection import injected
from onebase.cli.configs import ChatConfig
from onebase.cli.console import console, notes
from onebase.cli.using import open_pair
from onebase.config import Sampling, build
from onebase.data.template import PromptFormat, render_messages, render_prompt
from onebase.errors import DataError
from onebase.models.base import Base
from onebase.models.generation import decode, format_of, generate_ids
from onebase.models.vocabulary import for_adapter

HELP = "/base and /adapter switch, /reset forgets the conversation, /quit ends it"


def run(options: dict[str, Any]) -> int:
    """Read lines until the end of input or /quit."""
    config = build(ChatConfig, options)
    plain, adapter = open_pair(config.using)
    adapted = for_adapter(plain, adapter)
    form = format_of(plain, adapter)
    if config.system:
        form = PromptFormat(form.chat, config.system, form.separator)
    notes.print(
        f"{'adapter ' + config.using.adapter if adapter else 'base ' + plain.name}; {HELP}", markup=False
    )
    messages: list[dict[str, str]] = []
    chosen = adapter
    while (line := _ask()) is not None:
        if line == "/reset":
            messages = []
        elif line == "/base" or (line == "/adapter" and adapter is not None):
            chosen = adapter if line == "/adapter" else None
            notes.print(f"the {'plain base' if chosen is None else 'adapter'} answers from here on")
        elif line.startswith("/"):
            notes.print(HELP if adapter else f"no adapter was given; {HELP}", markup=False)
        elif line:
            base = plain if chosen is None else adapted
            messages = _turn(base, chosen, [*messages, {"role": "user", "content": line}], form, config)
    return 0


def _turn(
    base: Base,
    adapter: Adapter | None,
    messages: list[dict[str, str]],
    form: PromptFormat,
    config: ChatConfig,
) -> list[dict[str, str]]:
    """The conversation with the answer; as it was before the last message where there is no room for one."""
    try:
        with injected(base.model, adapter, "chat"):
            answer = _answer(base, messages, form, config.sampling)
    except DataError as error:
        notes.print(f"{error}\n  that message was left out; /reset makes room", markup=False)
        return messages[:-1]
    return [*messages, {"role": "assistant", "content": answer}]


def _ask() -> str | None:
    try:
        line = console.input("[bold]> [/]" if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if line == "/quit" else line


def _answer(base: Base, messages: list[dict[str, str]], form: PromptFormat, sampling: Sampling) -> str:
    """The next answer, printed as it comes. Without a chat format each line is a prompt of its own."""
    tokenizer: Any = base.tokenizer
    ids = (
        render_messages(tokenizer, messages, form)
        if form.chat
        else render_prompt(tokenizer, messages[-1]["content"], form)
    )
    (answer,) = generate_ids(base, [ids], sampling, lambda text: print(text, end="", flush=True))
    print()
    return decode(base, [answer])[0]
