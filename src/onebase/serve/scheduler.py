"""Who runs next, in plain Python: turns between adapters, slots, prompts in chunks beside running answers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from onebase.serve.request import QueueFull


class Job(NamedTuple):
    """A request as the scheduler sees it. `group`: its adapter; groups take turns."""

    id: str
    group: str
    prompt: int  # tokens


class Chunk(NamedTuple):
    """Tokens [start, stop) of a sequence, to be computed in this step; `last`: a token follows from them."""

    id: str
    slot: int
    start: int
    stop: int
    last: bool


@dataclass
class _Running:
    slot: int
    length: int  # tokens that are known
    done: int  # tokens that were computed


class Scheduler:
    """Waiting and running sequences.

    Inside a group the first come are the first served. Groups take turns; one whose adapter has no room now is passed
    over, but after `slots` others went ahead of it nobody else starts until it can: so no group starves.
    """

    def __init__(self, slots: int, queue: int, chunk: int) -> None:
        self._slots, self._queue, self._chunk = slots, queue, chunk
        self._waiting: dict[str, deque[Job]] = {}  # the groups in the order of their turns
        self._running: dict[str, _Running] = {}  # in the order in which they started
        self._passed: set[str] = set()  # groups without room in this step
        self._overtaken: dict[str, int] = {}  # by how many starts, since a group was first passed over

    @property
    def waiting(self) -> int:
        """The number of jobs that wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """The number of jobs that run."""
        return len(self._running)

    @property
    def free(self) -> list[int]:
        """The slots that nobody has, ascending."""
        taken = {one.slot for one in self._running.values()}
        return [slot for slot in range(self._slots) if slot not in taken]

    def submit(self, job: Job) -> None:
        """Let a job wait. Raises QueueFull."""
        if self.waiting >= self._queue:
            raise QueueFull(
                f"request {job.id}", f"{self.waiting} requests wait already", hint="ask again later"
            )
        self._waiting.setdefault(job.group, deque()).append(job)

    def candidate(self) -> Job | None:
        """The job whose turn it is, None where no slot is free or nobody may start."""
        if len(self._running) >= self._slots:
            return None
        for group, jobs in self._waiting.items():
            if group not in self._passed:
                return jobs[0]
            if self._overtaken[group] >= self._slots:
                return None
        return None

    def pass_over(self, job: Job) -> None:
        """The candidate's adapter has no room in this step."""
        self._passed.add(job.group)
        self._overtaken.setdefault(job.group, 0)

    def start(self, job: Job, slot: int, done: int = 0) -> None:
        """The candidate runs from now on, in a free slot; `done` of its tokens need not be computed."""
        assert slot in self.free
        assert done < job.prompt
        self._take(job)
        if job.group in self._waiting:  # its next job waits for the group's next turn
            self._waiting[job.group] = self._waiting.pop(job.group)
        self._overtaken.pop(job.group, None)
        for group in self._overtaken:
            self._overtaken[group] += 1
        self._running[job.id] = _Running(slot, job.prompt, done)

    def _take(self, job: Job) -> None:
        jobs = self._waiting[job.group]
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.group]
            self._overtaken.pop(job.group, None)
            self._passed.discard(job.group)

    def batch(self) -> list[Chunk]:
        """What to compute now: the next token of every answer, and prompt tokens up to the chunk's size.

        Ends the step in which groups were passed over.
        """
        self._passed.clear()
        left, chunks = self._chunk, list[Chunk]()
        for name, one in self._running.items():
            pending = one.length - one.done
            count = pending if pending == 1 else min(pending, left)
            if pending > 1:
                left -= count
            if count:
                stop = one.done + count
                chunks.append(Chunk(name, one.slot, one.done, stop, stop == one.length))
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """A chunk was computed; if it is the last, its sequence has one more token."""
        one = self._running[chunk.id]
        one.done, one.length = chunk.stop, one.length + chunk.last

    def remove(self, name: str) -> bool:
        """Forget a job, whether it waits or runs; its slot is free at once. False where there is none."""
        if self._running.pop(name, None) is not None:
            return True
        job = next((job for jobs in self._waiting.values() for job in jobs if job.id == name), None)
        if job is not None:
            self._take(job)
        return job is not None
