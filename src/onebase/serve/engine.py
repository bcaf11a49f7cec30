"""The serving engine: requests in, events out, one forward a step for all that run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onebase.errors import AdapterNameError, BaseError, ConfigError, DataError, OnebaseError
from onebase.models.base import Base
from onebase.models.vocabulary import remembering
from onebase.serve.fallback import Fallback
from onebase.serve.pace import Pace
from onebase.serve.pool import AdapterPool, Pinned, Registered
from onebase.serve.proof import AUTO, choose_product
from onebase.serve.request import (
    Event,
    Limits,
    NoRoom,
    PromptTooLong,
    QueueFull,
    Request,
    Result,
    Stats,
    TokenLogprob,
)
from onebase.serve.runner import Row, Runner
from onebase.serve.sampler import Choice, Wish, sample, wish
from onebase.serve.scheduler import Chunk, Job, Scheduler
from onebase.serve.text import TextStream
from onebase.transforms.arithmetic import combine
from onebase.transforms.combining import Recipe


@dataclass(eq=False)
class _Sequence:
    """A request at work."""

    request: Request
    wanted: list[Registered]  # its adapters
    tokens: list[int]  # prompt and answer
    stream: TextStream
    wish: Wish
    most: int  # tokens of prompt and answer
    slot: int = -1
    slow: bool = False  # through the model's own forward
    pins: tuple[Pinned, ...] = ()


class Engine:
    """Serves a causal base and the adapters of a pool. One thread alone calls it.

    What the runner proves to compute goes through it; the rest, adapters with more than updates of linear layers or
    models that it does not know (`slow` says why), goes through the model's own forward. `weights` is a row of
    `weights.PRODUCTS` or "auto", the fastest that loses nothing; the one in use is `product` ("" where slow). Raises
    BaseError for another kind of base, ConfigError where the limits contradict each other or the weights cannot be.
    """

    def __init__(
        self, base: Base, pool: AdapterPool, limits: Limits | None = None, weights: str = AUTO
    ) -> None:
        if base.kind != "causal":
            raise BaseError(f"serve {base.ref}", f"it is a base of kind {base.kind}, which writes no text")
        self.base, self.pool, self.limits = base, pool, limits or Limits()
        self.context = min(self.limits.context or base.context, base.context)
        self.product, hold, self.slow = choose_product(base.model, weights)
        self._runner = None if self.slow else Runner(base.model, self.limits.slots, self.context, hold)
        self._fallback = Fallback(base.model, pool.model_lock)
        self._scheduler = Scheduler(self.limits.slots, self.limits.queue, self.limits.prefill_chunk)
        self._pace = Pace()
        self._all: dict[str, _Sequence] = {}
        self._words = remembering(base.tokenizer)
        self._cancelled: list[str] = []
        self._counts = Counter[str]()
        self._rows = len(base.model.get_input_embeddings().weight)  # pyright: ignore[reportCallIssue, reportArgumentType]
        total, kv = self.limits.kv_and_adapter_bytes, self._kv_bytes
        if total and kv >= total:
            found = (
                f"{self.limits.slots} slots of {self.context} tokens take {kv} bytes of the {total} allowed"
            )
            raise ConfigError(
                "the memory budget", found, hint="allow more, or fewer slots, or a shorter context"
            )
        if total:
            pool.budget = min(pool.budget or total, total - kv)

    @property
    def _kv_bytes(self) -> int:
        return self._runner.cache.shape.bytes(self._runner.cache.k.dtype) if self._runner else 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._all or self._cancelled)

    def stats(self) -> Stats:
        """Where the engine stands."""
        factors = self._runner.factor_bytes if self._runner else 0
        return Stats(
            self._scheduler.waiting,
            self._scheduler.running,
            self._kv_bytes,
            self.pool.bytes + factors,
            self._counts["prompt"],
            self._counts["reused"],
            self._counts["new"],
            {"": self._counts["plain"]} | self.pool.served(),
            self.pool.loads,
            self.pool.hits,
        )

    def add_request(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises QueueFull, PromptTooLong, UnknownAdapter, AdapterNameError (the id is in use) or DataError (a token that
        the base does not have).
        """
        if request.id in self._all:
            raise AdapterNameError(f"request {request.id}", "a request of that id is at work")
        names = [name for name, _ in request.mixture] or (
            [] if request.adapter is None else [request.adapter]
        )
        wanted = [self.pool.find(name) for name in names]
        length = len(request.prompt)
        if length >= self.context:
            found = f"{length} tokens, the server takes {self.context}, answer included"
            raise PromptTooLong("the prompt", found, hint="shorten it")
        added = {text: token for one in wanted for text, token in one.origin.tokens.items()}
        rows = max([self._rows, *(token + 1 for token in added.values())])
        if odd := [token for token in request.prompt if not 0 <= token < rows]:
            raise DataError(f"token {odd[0]} in the prompt", f"the base has tokens 0 to {rows - 1}")
        sequence = _Sequence(
            request,
            wanted,
            list(request.prompt),
            TextStream(self._decoder(added), request.stop),
            wish(request),
            min(length + request.max_tokens, self.context),
        )
        try:
            self._scheduler.submit(Job(request.id, request.group, length))
        except QueueFull as error:
            error.seconds = self._pace.seconds(self._scheduler.waiting)
            raise
        self._all[request.id] = sequence

    def _decoder(self, added: dict[str, int]) -> Any:
        if self.base.tokenizer is None:
            return lambda ids: ""
        words = self._words(added)
        return lambda ids: words.decode(ids, skip_special_tokens=True) if ids else ""

    def cancel(self, request: str) -> None:
        """End a request; its slot is free at once. The next step tells it. Nothing where it is over already."""
        if request in self._all:
            self._end(self._all[request], "cancelled")
            self._cancelled.append(request)

    def step(self) -> list[Event]:
        """One forward: start who can start, compute, choose tokens. Empty where there is nothing to do."""
        events = [Event(name, finish="cancelled") for name in self._cancelled]
        self._cancelled.clear()
        events += self._admit()
        chunks = self._scheduler.batch()
        fast = [chunk for chunk in chunks if not self._all[chunk.id].slow]
        if fast and self._runner:
            rows = [Row(c.slot, self._all[c.id].tokens[c.start : c.stop], c.start, c.last) for c in fast]
            events += self._take(fast, self._runner.forward(rows))
        for chunk in chunks:
            if self._all.get(chunk.id) and self._all[chunk.id].slow:
                events += self._slow_step(chunk)
        return events

    def _slow_step(self, chunk: Chunk) -> list[Event]:
        sequence = self._all[chunk.id]
        try:
            logits = self._fallback.forward(chunk.slot, sequence.tokens[chunk.start : chunk.stop])
        except (
            OnebaseError,
            RuntimeError,
            ValueError,
            IndexError,
            TypeError,
        ) as error:  # a foreign model's forward
            return [self._failed(sequence, str(error))]
        return self._take([chunk], logits[None, :][: int(chunk.last)])

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Every answer, in order, without a queue's limit. The engine must be idle."""
        assert not self.has_work
        left, events = list(requests), dict[str, list[Event]]()
        while left or self.has_work:
            while left and self._scheduler.waiting < self.limits.queue:
                self.add_request(left.pop(0))
            for event in self.step():
                events.setdefault(event.request, []).append(event)
        return [_result(request.id, events[request.id]) for request in requests]

    def fail_all(self, error: str) -> list[Event]:
        """End every request with this error, after a step that raised."""
        return [self._failed(sequence, error) for sequence in list(self._all.values())]

    def _admit(self) -> list[Event]:
        events: list[Event] = []
        while (job := self._scheduler.candidate()) is not None:
            sequence = self._all[job.id]
            try:
                slot, done = self._start(sequence)
            except NoRoom as error:
                if self._scheduler.running:
                    self._scheduler.pass_over(job)
                else:  # a mixture whose adapters never fit together
                    events.append(self._failed(sequence, str(error), refused=True))
            except (OnebaseError, OSError) as error:
                events.append(self._failed(sequence, str(error), isinstance(error, OnebaseError)))
            else:
                self._scheduler.start(job, slot, done)
                self._pace.started()
                self._counts["prompt"] += job.prompt
                self._counts["reused"] += done
        return events

    def _start(self, sequence: _Sequence) -> tuple[int, int]:
        """(the slot, the tokens that are in it already); the adapters are pinned, the slot is ready."""
        pins: list[Pinned] = []
        try:
            for one in sequence.wanted:
                pins.append(self.pool.acquire(one))  # one by one: those before a failure are released
            pinned = self._chosen(sequence.request, pins)
            free, runner = self._scheduler.free, self._runner
            slow = runner is None or (pinned is not None and bool(runner.problem(pinned.adapter)))
            if slow or runner is None:
                slot, done = free[-1], 0
                self._fallback.start(slot, pinned)
            else:
                if pinned is not None:
                    self._reserve(runner.factor_bytes_with(pinned.adapter), pinned.name)
                slot, done = runner.cache.take(free, pinned and pinned.key, sequence.request.prompt)
                runner.put(slot, pinned and pinned.adapter)
        except BaseException:
            for pin in pins:
                self.pool.release(pin)
            raise
        sequence.slot, sequence.slow, sequence.pins = slot, slow, tuple(pins)
        return slot, done

    def _reserve(self, factors: int, name: str) -> None:
        """Raise NoRoom where the slots' factors would take this many bytes and the budget does not hold them."""
        total = self.limits.kv_and_adapter_bytes
        if total and not self.pool.shrink(total - self._kv_bytes - factors):
            raise NoRoom(
                f"adapter {name!r}", f"its factors in {self.limits.slots} slots do not fit the memory budget"
            )

    def _chosen(self, request: Request, pins: Sequence[Pinned]) -> Pinned | None:
        """What the request runs with: nothing, an adapter, or the weighted sum of several."""
        if not request.mixture:
            return pins[0] if pins else None
        weights = [weight for _, weight in request.mixture]
        adapters = [pin.adapter for pin in pins]  # each was checked against this base as it was loaded
        mixed = combine(adapters, weights, Recipe(method="cat"), allow_base_mismatch=True)
        name = "+".join(
            f"{pin.name}@{pin.version}*{weight!r}" for pin, weight in zip(pins, weights, strict=True)
        )
        return Pinned(name, 0, mixed, 0)

    def _take(self, chunks: Sequence[Chunk], logits: Tensor) -> list[Event]:
        """Choose the tokens that follow the computed chunks."""
        lasts = [chunk for chunk in chunks if chunk.last]
        finite = logits.amax(dim=-1).isfinite()  # -inf is no token; NaN and inf are failures
        logits = logits if finite.all() else logits.masked_fill(~finite[:, None], 0)
        choices = sample(logits, [self._all[chunk.id].wish for chunk in lasts])
        for chunk in chunks:
            self._scheduler.computed(chunk)
        return [
            self._event(self._all[chunk.id], choice)
            if good
            else self._failed(self._all[chunk.id], "the logits are not finite")
            for chunk, choice, good in zip(lasts, choices, finite.tolist(), strict=True)
        ]

    def _event(self, sequence: _Sequence, choice: Choice) -> Event:
        request, stream = sequence.request, sequence.stream
        if choice.token in request.stop_ids:
            text = stream.finish()
            self._end(sequence, "stop")
            return Event(request.id, text, finish="stop")
        sequence.tokens.append(choice.token)
        self._counts["new"] += 1
        text, finish = stream.push(choice.token), None
        if stream.stopped:
            finish = "stop"
        elif len(sequence.tokens) >= sequence.most:
            text += stream.finish()
            finish = "stop" if stream.stopped else "length"
        if finish:
            self._end(sequence, finish)
        logprobs: tuple[TokenLogprob, ...] = () if choice.logprob is None else (choice.logprob,)
        return Event(request.id, text, (choice.token,), logprobs, finish)

    def _failed(self, sequence: _Sequence, error: str, refused: bool = False) -> Event:
        self._end(sequence, "error")
        return Event(sequence.request.id, finish="error", error=error, refused=refused)

    def _end(self, sequence: _Sequence, finish: str) -> None:
        """Take a sequence out: its slot and its adapters are free."""
        request = sequence.request
        self._scheduler.remove(request.id)
        if sequence.slot >= 0:
            if sequence.slow:
                self._fallback.stop(sequence.slot)
            elif self._runner:
                self._runner.put(sequence.slot, None)
                if finish == "error":
                    self._runner.cache.forget(sequence.slot)
            for pin in sequence.pins:
                self.pool.release(pin)
        del self._all[request.id]
        if not self._all:
            self._pace.rested()
        self._counts["plain"] += not sequence.wanted
        self.pool.count(one.name for one in sequence.wanted)


def _result(name: str, events: Sequence[Event]) -> Result:
    return Result(
        name,
        "".join(event.text for event in events),
        tuple(token for event in events for token in event.tokens),
        next(event.finish for event in events if event.finish),
        tuple(one for event in events for one in event.logprobs),
        "".join(event.error for event in events),
    )
