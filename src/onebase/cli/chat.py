"""`onebase chat`: a conversation with the base and any of its adapters, in the terminal, by the serving engine."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.text import Text

from onebase.adapters.adapter import Origin
from onebase.cli.configs import ChatConfig
from onebase.cli.console import console, notes
from onebase.cli.using import DEFAULT_BASE, base_name
from onebase.config import build
from onebase.data.read import Message
from onebase.errors import AdapterNameError, DataError, OnebaseError
from onebase.models.base import Base, load_base
from onebase.options import names
from onebase.serve.engine import Engine
from onebase.serve.pool import AdapterPool
from onebase.serve.prompts import Prompts
from onebase.serve.request import Event, Limits, Request
from onebase.serve.worker import Worker

SLOTS = 2  # the conversation as two adapters have seen it: going to and fro computes nothing twice


@dataclass
class _Chat:
    """The conversation, who answers (None: the plain base), and with what."""

    config: ChatConfig
    base: Base
    prompts: Prompts
    pool: AdapterPool
    worker: Worker
    chosen: str | None = None
    messages: list[Message] = field(default_factory=list[Message])
    asked: int = 0


def run(options: dict[str, Any]) -> int:
    """Read lines until the end of input or /quit."""
    config = build(ChatConfig, options)
    chat = _open(config)
    try:
        _tell(chat)
        _note("/help shows the commands")
        while (line := _ask(chat)) is not None:
            if line.startswith("/"):
                _command(chat, line)
            elif line:
                _turn(chat, line)
    finally:
        chat.worker.shutdown(drain=False)
    return 0


def _open(config: ChatConfig) -> _Chat:
    """Base, adapters and engine; the first adapter answers."""
    using, folders = config.using, names(config.using.adapter)
    named = base_name(using.base, folders[0]) if folders else using.base or DEFAULT_BASE
    base = load_base(named, using.dtype)
    prompts = Prompts(base)
    # A base without a fingerprint is one that no adapter contradicts.
    pool = AdapterPool(replace(base, fingerprint="") if using.allow_base_mismatch else base)
    made = [_load(pool, folder) for folder in folders]
    engine = Engine(base, pool, Limits(slots=SLOTS, context=config.context))
    if engine.slow:
        _note(f"through the model's own forward, more slowly: {engine.slow}")
    return _Chat(config, base, prompts, pool, Worker(engine).start(), made[0] if made else None)


def _load(pool: AdapterPool, folder: str) -> str:
    """Load an adapter under its folder's name, with a number where that is taken; the name."""
    path = Path(folder).expanduser()
    wanted, taken = path.resolve().name, pool.names()
    name = next(n for n in (wanted, *(f"{wanted}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    pool.load(name, path)
    return name


def _note(text: str) -> None:
    notes.print(text, markup=False, highlight=False)


def _ask(chat: _Chat) -> str | None:
    prompt = Text(f"{chat.chosen or 'base'}> ", "bold") if sys.stdin.isatty() else ""
    try:
        line = console.input(prompt).strip()
    except EOFError:
        return None
    return None if line == "/quit" else line


# -- Commands.


def _command(chat: _Chat, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        _note(f"{name}: no such command")
        name = "/help"
    try:
        COMMANDS[name][1](chat, argument.strip())
    except OnebaseError as error:
        _note(str(error))


def _adapter(chat: _Chat, name: str) -> None:
    """Let an adapter answer: one that is loaded, the only one, or one in a folder."""
    known = chat.pool.names()
    if not known and not name:
        raise AdapterNameError("/adapter", "no adapter was given", hint="/adapter FOLDER loads one")
    if not name and len(known) > 1:
        raise AdapterNameError("/adapter", "there are several", tuple(known), "name one of them")
    name = name or known[0]
    if name not in known and Path(name).expanduser().is_dir():
        name = _load(chat.pool, name)
    chat.chosen = chat.pool.find(name).name
    _tell(chat)


def _base(chat: _Chat, _: str) -> None:
    chat.chosen = None
    _tell(chat)


def _reset(chat: _Chat, _: str) -> None:
    chat.messages = []
    _note("a new conversation")


def _list(chat: _Chat, _: str) -> None:
    for name in [None, *chat.pool.names()]:
        what = chat.base.name if name is None else str(chat.pool.find(name).path)
        _note(f"{'*' if name == chat.chosen else ' '} {name or 'base'}  {what}")


def _help(chat: _Chat, _: str) -> None:
    for name, (text, _do) in COMMANDS.items():
        _note(f"{name:9} {text}")


COMMANDS: dict[str, tuple[str, Callable[[_Chat, str], None]]] = {
    "/adapter": ("NAME or FOLDER: that adapter answers from here on, the conversation goes on", _adapter),
    "/base": ("the plain base answers from here on", _base),
    "/adapters": ("the adapters that are loaded", _list),
    "/reset": ("forget the conversation", _reset),
    "/help": ("these lines; Ctrl-C ends an answer, /quit the session", _help),
}


def _tell(chat: _Chat) -> None:
    """Say who answers, and where it reads but the last line."""
    who = f"the plain base {chat.base.name}" if chat.chosen is None else f"adapter {chat.chosen}"
    alone = (
        ""
        if chat.prompts.form(_origins(chat)).chat
        else "; it knows no conversations: each line is a prompt of its own"
    )
    _note(f"{who} answers{alone}")


# -- Answers.


def _turn(chat: _Chat, line: str) -> None:
    """Ask, print the answer as it comes, and remember both; neither where there is no answer."""
    asked: list[Message] = [*chat.messages, {"role": "user", "content": line}]
    try:
        answer, last = _answer(chat, _request(chat, asked))
    except DataError as error:  # too long, or nothing the template takes
        _note(f"{error}\n  that message was left out; /reset makes room")
        return
    if last.finish == "error":
        _note(f"{last.error}\n  that message was left out")
    elif answer or last.finish != "cancelled":
        chat.messages = [*asked, {"role": "assistant", "content": answer}]


def _origins(chat: _Chat) -> list[Origin]:
    return [] if chat.chosen is None else [chat.pool.find(chat.chosen).origin]


def _request(chat: _Chat, messages: list[Message]) -> Request:
    """The next turn."""
    system = [{"role": "system", "content": chat.config.system}] if chat.config.system else []
    ids = chat.prompts.chat(_origins(chat), [*system, *messages])
    chat.asked += 1
    given = chat.config.sampling
    return Request(
        id=str(chat.asked),
        prompt=tuple(ids),
        adapter=chat.chosen,
        max_tokens=given.max_new_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        seed=given.seed,
        stop_ids=frozenset(chat.base.stop_ids),
    )


def _answer(chat: _Chat, request: Request) -> tuple[str, Event]:
    """(the answer, its last event), printed as it comes; Ctrl-C ends it early. Raises what the engine refuses."""
    events: SimpleQueue[Event] = SimpleQueue()
    said = ""
    with _on_interrupt(lambda: chat.worker.cancel(request.id)):
        chat.worker.submit(request, events.put).result()
        while True:
            event = events.get()
            print(event.text, end="", flush=True)
            said += event.text
            if event.finish is not None:
                print()
                return said, event


@contextmanager
def _on_interrupt(do: Callable[[], None]) -> Generator[None]:
    """Ctrl-C does this, instead of raising KeyboardInterrupt wherever the program happens to be."""
    before = signal.signal(signal.SIGINT, lambda *_: do())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
