"""What disturbs a server at work: adapters that come, go, change and are broken, and requests that are no good."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.soak.traffic import Name, Soak, Wrong, failure

CHANGING, VISITOR = "changing", "visitor"
CONTENTS = ("changing-0", "changing-1")  # of the adapter that is replaced again and again
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
POLL = 0.1


class Bad(NamedTuple):
    """A request that must be refused: the statuses that are right, and the error's code where it has one."""

    method: str
    route: str
    content: bytes
    statuses: tuple[int, ...]
    code: str | int | None = None


def bad_requests(model: str, context: int, max_body: int) -> Mapping[str, Bad]:
    """One of each kind."""
    chat, raw = "/v1/chat/completions", "/v1/completions"
    said: Callable[..., bytes] = lambda **body: json.dumps({"model": model, **body}).encode()  # noqa: E731
    load: Callable[[str], bytes] = lambda path: json.dumps({"lora_name": "x", "lora_path": path}).encode()  # noqa: E731
    long, message = [5] * context, [{"role": "user", "content": "x"}]
    return {
        "bad JSON": Bad("POST", raw, b'{"model": ', (400,)),
        "no JSON": Bad("POST", chat, b"\xff\xfe", (400,)),
        "no prompt": Bad("POST", raw, said(), (400,)),
        "an unknown model": Bad("POST", chat, said(model="?", messages=message), (404,), "model_not_found"),
        "a prompt that is too long": Bad("POST", raw, said(prompt=long), (400,), "context_length_exceeded"),
        "a body over the limit": Bad("POST", raw, b" " * (max_body + 1), (413,), "body_too_large"),
        "a bad temperature": Bad("POST", raw, said(prompt="x", temperature=-1), (400,)),
        "an unknown parameter": Bad("POST", raw, said(prompt="x", temprature=0), (400,), "unknown_parameter"),
        "a token out of range": Bad("POST", raw, said(prompt=[10**9]), (400,)),
        "an unknown route": Bad("GET", "/v1/nothing", b"", (404,)),
        "a wrong method": Bad("GET", raw, b"", (405,)),
        "a path out of the folder": Bad("POST", "/v1/load_lora_adapter", load("../base"), (400, 404)),
        "an unknown adapter unloaded": Bad("POST", "/v1/unload_lora_adapter", b'{"lora_name": "?"}', (404,)),
    }


def _cut(folder: Path) -> None:
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _garbage(folder: Path) -> None:
    (folder / CONFIG).write_text('{"peft_type": ', encoding="utf-8")


def _other_rank(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | {"r": config["r"] + 1}), encoding="utf-8")


BREAK: tuple[Callable[[Path], None], ...] = (
    _cut,
    _garbage,
    _other_rank,
    lambda folder: (folder / TENSORS).unlink(),
)


@dataclass
class Churn:
    """One disturbance after another, while the clients ask."""

    soak: Soak
    folder: Path  # the adapters folder
    store: Path  # whole adapters to copy from: the contents by name
    bad: Mapping[str, Bad]
    draw: random.Random
    made: int = 0

    async def run(self, until: asyncio.Event, pause: float) -> None:
        """Each kind in turn, a pause after each; no kind begins after `until`."""
        kinds: list[Callable[[], Coroutine[Any, Any, None]]] = [
            self.arrival,
            self.replacement,
            self.visit,
            self.breakage,
            self.refusals,
            self.looks,
        ]
        while not until.is_set():
            for kind in kinds:
                if until.is_set():
                    return
                try:
                    async with asyncio.timeout(self.soak.deadline):
                        await kind()
                except (TimeoutError, httpx.HTTPError, Wrong, OSError, AssertionError) as error:
                    self.soak.ledger.fault("churn", f"{kind.__name__}: {type(error).__name__}: {error}")
                self.soak.ledger.counts[kind.__name__] += 1
                await asyncio.sleep(self.draw.uniform(0.5, 1.5) * pause)

    def _appear(self, contents: str, name: str) -> None:
        """A folder as a whole: copied under a hidden name, then renamed."""
        hidden = self.folder / f".{name}"
        shutil.copytree(self.store / contents, hidden)
        hidden.rename(self.folder / name)

    def _vanish(self, name: str) -> None:
        hidden = self.folder / f".{name}"
        (self.folder / name).rename(hidden)
        shutil.rmtree(hidden)

    async def arrival(self) -> None:
        """A new folder is served at once; then it goes."""
        self.made += 1
        contents = self.draw.choice(sorted(path.name for path in self.store.iterdir()))
        name = Name(f"new-{self.made}", (contents,), (contents,))
        self._appear(contents, name.name)
        seeds = [random.Random(self.draw.random()) for _ in range(3)]
        await asyncio.gather(*(self.soak.checked(name, one, bool(n % 2)) for n, one in enumerate(seeds)))
        self._vanish(name.name)

    async def replacement(self) -> None:
        """Other contents under the same name: answers are the old ones or the new, then the new ones only."""
        name = self.soak.names[CHANGING]
        new = next(one for one in CONTENTS if (one,) != name.now)
        name.become(CONTENTS, 200)
        hidden = self.folder / f".{CHANGING}"
        shutil.copyfile(self.store / new / TENSORS, hidden)
        hidden.replace(self.folder / CHANGING / TENSORS)
        await self._load(CHANGING, load_inplace=True)
        name.become((new,), 200)

    async def visit(self) -> None:
        """An adapter is unloaded under traffic: 404 until it is loaded again."""
        name = self.soak.names[VISITOR]
        name.become(name.every, 200, 404)
        answer = await self.soak.http.post("/v1/unload_lora_adapter", json={"lora_name": VISITOR})
        assert answer.status_code == 200, answer.text
        name.become(name.every, 404)
        await asyncio.sleep(self.draw.uniform(0.2, 2.0))
        name.become(name.every, 200, 404)
        await self._load(VISITOR)
        name.become(name.every, 200)

    async def _load(self, name: str, **more: bool) -> None:
        body = {"lora_name": name, "lora_path": name, **more}
        answer = await self.soak.http.post("/v1/load_lora_adapter", json=body)
        assert answer.status_code == 200, answer.text

    async def breakage(self) -> None:
        """A broken folder is refused with a reason, and asking for it is answered 404 with the reason."""
        self.made += 1
        name = f"broken-{self.made}"
        hidden = self.folder / f".{name}"
        shutil.copytree(self.store / "a0", hidden)
        self.draw.choice(BREAK)(hidden)
        hidden.rename(self.folder / name)
        await self._until(lambda refused: name in refused)
        body = {"model": name, "prompt": "x", "max_tokens": 1}
        answer = await self.soak.http.post("/v1/completions", json=body)
        reply = failure(answer.status_code, answer.text, answer.headers)
        assert reply.status == 404, reply
        assert "refused" in reply.error, reply
        self._vanish(name)
        await self._until(lambda refused: name not in refused)

    async def _until(self, found: Callable[[Mapping[str, str]], bool]) -> None:
        while True:
            answer = await self.soak.http.get("/v1/adapters")
            if found({one["id"]: one["reason"] for one in answer.json()["refused"]}):
                return
            await asyncio.sleep(POLL)

    async def refusals(self) -> None:
        """Every bad request gets its status."""
        for what, bad in self.bad.items():
            headers = {"Content-Type": "application/json"}
            answer = await self.soak.http.request(bad.method, bad.route, content=bad.content, headers=headers)
            reply = failure(answer.status_code, answer.text, answer.headers)
            code = answer.json()["error"]["code"]
            if reply.status not in bad.statuses or (bad.code is not None and code != bad.code):
                self.soak.ledger.fault("refusal", f"{what}: {reply.status} {code}, not {bad.statuses}")
            self.soak.ledger.counts["refused rightly"] += reply.status in bad.statuses

    async def looks(self) -> None:
        """Lists, health, metrics and page answer while all is busy."""
        for route in ("/health", "/v1/models", "/v1/adapters", "/metrics", "/"):
            start = time.monotonic()
            answer = await self.soak.http.get(route)
            if answer.status_code != 200:
                self.soak.ledger.fault("look", f"{route}: {answer.status_code} {answer.text[:300]}")
            self.soak.ledger.slowest = max(self.soak.ledger.slowest, time.monotonic() - start)
