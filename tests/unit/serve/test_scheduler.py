"""The scheduler: turns, slots, chunks, cancellation; and under any sequence of events nobody starves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.serve.request import QueueFull
from onebase.serve.scheduler import Chunk, Job, Scheduler


def started(scheduler):
    """Start whoever may; their ids in order."""
    found = []
    while (job := scheduler.candidate()) is not None:
        scheduler.start(job, scheduler.free[0])
        found.append(job.id)
    return found


def submit(scheduler, *jobs):
    for name, group, prompt in jobs:
        scheduler.submit(Job(name, group, prompt))


def test_groups_take_turns_and_each_is_first_come_first_served():
    scheduler = Scheduler(slots=10, queue=10, chunk=8)
    submit(
        scheduler,
        ("a1", "a", 2),
        ("a2", "a", 2),
        ("a3", "a", 2),
        ("b1", "b", 2),
        ("c1", "c", 2),
        ("b2", "b", 2),
    )
    assert started(scheduler) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_turn_is_kept_while_no_slot_is_free():
    scheduler = Scheduler(slots=1, queue=10, chunk=8)
    submit(scheduler, ("a1", "a", 1), ("a2", "a", 1), ("b1", "b", 1))
    assert started(scheduler) == ["a1"]
    assert scheduler.candidate() is None
    scheduler.remove("a1")
    assert started(scheduler) == ["b1"]
    scheduler.remove("b1")
    assert started(scheduler) == ["a2"]


def test_prompts_come_in_chunks_beside_the_answers():
    scheduler = Scheduler(slots=3, queue=9, chunk=4)
    submit(scheduler, ("long", "a", 7), ("short", "b", 2), ("one", "c", 1))
    assert started(scheduler) == ["long", "short", "one"]
    steps = []
    for _ in range(4):
        chunks = scheduler.batch()
        for chunk in chunks:
            scheduler.computed(chunk)
        steps.append([(c.id, c.start, c.stop, c.last) for c in chunks])
    assert steps == [
        [("long", 0, 4, False), ("one", 0, 1, True)],
        [("long", 4, 7, True), ("short", 0, 1, False), ("one", 1, 2, True)],
        [("long", 7, 8, True), ("short", 1, 2, True), ("one", 2, 3, True)],
        [("long", 8, 9, True), ("short", 2, 3, True), ("one", 3, 4, True)],
    ]


def test_tokens_that_are_there_already_are_not_computed():
    scheduler = Scheduler(slots=1, queue=1, chunk=9)
    submit(scheduler, ("a", "", 6))
    scheduler.start(scheduler.candidate(), 0, done=5)
    assert scheduler.batch() == [Chunk("a", 0, 5, 6, True)]


def test_the_queue_has_a_limit_and_a_cancelled_job_makes_room():
    scheduler = Scheduler(slots=1, queue=2, chunk=4)
    submit(scheduler, ("a", "x", 1), ("b", "x", 1))
    with pytest.raises(QueueFull, match="2 requests wait"):
        submit(scheduler, ("c", "y", 1))
    assert scheduler.remove("a")
    assert not scheduler.remove("a")
    submit(scheduler, ("c", "y", 1))
    assert started(scheduler) == ["b"]
    assert scheduler.remove("b")
    assert scheduler.free == [0]
    assert started(scheduler) == ["c"]


def test_a_group_without_room_is_overtaken_only_so_often():
    scheduler = Scheduler(slots=2, queue=99, chunk=4)
    submit(scheduler, ("big", "big", 1), *((f"s{n}", "small", 1) for n in range(9)))
    order = []
    for _ in range(6):
        while (job := scheduler.candidate()) is not None:
            if job.group == "big":
                scheduler.pass_over(job)
                continue
            scheduler.start(job, scheduler.free[0])
            order.append(job.id)
        scheduler.batch()
        scheduler.remove(order[-1])
    assert order == ["s0", "s1"]  # then all wait for `big`
    scheduler.remove("s0")
    assert scheduler.candidate().id == "big"
    scheduler.start(scheduler.candidate(), 0)
    assert scheduler.candidate().id == "s2"


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=25),
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.integers(0, 24), max_size=5),
)
def test_whatever_comes_every_job_is_computed_whole_and_in_turn(jobs, slots, chunk, cancelled):
    """Each token once and in order, no slot twice in a step, no group more than one start ahead of a waiting one."""
    scheduler = Scheduler(slots, 99, chunk)
    for number, (group, prompt, _) in enumerate(jobs):
        scheduler.submit(Job(str(number), str(group), prompt))
    computed = dict.fromkeys(map(str, range(len(jobs))), 0)
    turns, ran, gone = {}, set(), set()
    for step in range(1000):
        if step < len(cancelled) and scheduler.remove(str(cancelled[step])):
            gone.add(str(cancelled[step]))
        while (job := scheduler.candidate()) is not None:
            scheduler.start(job, scheduler.free[-1])
            ran.add(job.id)
            others = {str(jobs[int(n)][0]) for n in computed if n not in ran | gone} - {job.group}
            before = turns.get(job.group, -1)
            assert all(turns.get(group, -1) >= before for group in others)  # each had its turn since
            turns[job.group] = len(ran)
        chunks = scheduler.batch()
        assert len({c.slot for c in chunks}) == len(chunks) == len({c.id for c in chunks}) <= slots
        assert sum(c.stop - c.start for c in chunks if c.stop - c.start > 1) <= chunk
        for one in chunks:
            assert one.start == computed[one.id]
            computed[one.id] = one.stop
            scheduler.computed(one)
            _, prompt, answer = jobs[int(one.id)]
            assert one.last == (one.stop >= prompt)
            if one.stop == prompt + answer - 1:
                scheduler.remove(one.id)
        if not scheduler.running and not scheduler.waiting:
            break
    assert not scheduler.running
    assert not scheduler.waiting
    assert all(computed[n] == jobs[int(n)][1] + jobs[int(n)][2] - 1 for n in computed if n not in gone)
