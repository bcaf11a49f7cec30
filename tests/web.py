"""What the tests of HTTP share: a tiny base that reads text, adapters that speak differently, a server in a thread."""

import contextlib
import json
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import httpx
import torch

from adapters import trained
from onebase.config import LoraConfig
from onebase.serve import engine
from onebase.serve.request import Limits
from onebase.storage.format import save_adapter
from onebase.web.server import Server, bound, open_service
from onebase.web.settings import Settings
from serving import alone
from texts import text_base

WAIT = 60
FORMATS = {  # as training records them; None: none
    "chatty": {"chat": True, "system": "Be brief.", "separator": ""},
    "plain": {"chat": False, "system": "", "separator": " ->"},
    "foreign": None,
}
TRAINING = {"steps": 7, "tokens": 90, "rows": 5, "loss": 1.5, "settings": {"data": "somewhere/rows.jsonl"}}


def speaking_folder(folder, base, names=tuple(FORMATS)):
    """An adapter of each prompt format in a folder; gives them by name, with None for the base."""
    made: dict[str | None, Any] = {None: None}
    for number, name in enumerate(names):
        adapter = trained(base.model, LoraConfig(rank=2 + number, alpha=8), seed=number)
        form = FORMATS.get(name)
        training = TRAINING if form else {}
        adapter = replace(adapter, origin=replace(adapter.origin, prompt=form or {}, training=training))
        save_adapter(adapter, folder / name)
        made[name] = adapter
    return made


@dataclass
class Site:
    """A running server."""

    url: str
    service: Any
    server: Server

    def client(self, **options):
        """A client that speaks HTTP and no more."""
        return httpx.Client(base_url=self.url, timeout=WAIT, **options)

    def stats(self):
        """The engine's."""
        return self.service.worker.stats().result(WAIT)

    def wait_until(self, found):
        """Ask the engine until `found(stats)`."""
        end = time.monotonic() + WAIT
        while not found(stats := self.stats()):
            assert time.monotonic() < end, stats
            time.sleep(0.01)


@contextlib.contextmanager
def running(base, folder, limits=None, **settings):
    """A server on a free port, until the end of the block."""
    options = Settings(port=0, **settings)
    sizes = {"slots": 3, "context": 128, "prefill_chunk": 16, "queue": 32, **(limits or {})}
    with bound(options) as listener:
        service = open_service(base, folder, Limits(**sizes), options)
        server = Server(service)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            end = time.monotonic() + WAIT
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < end
                time.sleep(0.01)
            yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server)
        finally:
            server.stop()
            thread.join(WAIT)
            assert not thread.is_alive()


def greedy(base, adapter, ids, count):
    """(tokens, text, why it ended) of the likeliest answer, made by the model's own forward."""
    tokens = list(alone(base, adapter, ids, count)[0])
    ends = [n for n, token in enumerate(tokens) if token in base.stop_ids]
    tokens = tokens[: ends[0]] if ends else tokens
    text = bare(base.tokenizer.decode(tokens, skip_special_tokens=True))
    return tokens, text, "stop" if ends else "length"


def bare(text):
    """Without what may be half a character at its end: a random model's answers end anywhere."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def say_only(monkeypatch, tokens):
    """Every request is answered by these tokens, whatever the model says."""
    script, sample = iter(tokens), engine.sample

    def scripted(logits, wishes):
        forced = torch.full_like(logits, -30.0)
        forced[torch.arange(len(logits)), [next(script) for _ in wishes]] = 30.0
        return sample(forced, wishes)

    monkeypatch.setattr(engine, "sample", scripted)


def events_of(text):
    """The JSON of a stream's events; the last must be [DONE]."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


__all__ = ["Settings", "bare", "events_of", "greedy", "running", "say_only", "speaking_folder", "text_base"]
