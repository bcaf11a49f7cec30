"""What a client is told that comes when the queue is full."""

import pytest

from decoders import decoder
from onebase.models.base import wrap_base
from onebase.serve import engine
from onebase.serve.engine import Engine
from onebase.serve.pace import LAST, Pace
from onebase.serve.pool import AdapterPool
from onebase.serve.request import Limits, QueueFull, Request
from onebase.web.problems import problem_of


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def paced(*gaps):
    """A pace, and its clock, after starts with these seconds after each."""
    clock = Clock()
    pace = Pace(clock)
    for gap in gaps:
        pace.started()
        clock.now += gap
    return pace, clock


@pytest.mark.parametrize(
    ("gaps", "waiting", "wanted"),
    [
        ((), 50, 1.0),  # nothing started yet
        ((0.5, 0.5, 0.5, 0.5), 8, 4.0),
        ((0.0, 0.0, 0.0, 2.0), 8, 4.0),  # four at once, two seconds ago
        ((0.01,) * 10, 20, 1.0),  # no less than a second
        ((3.0,) * 10, 256, 60.0),  # no more than a minute
        ((9.0,) * 5 + (0.25,) * LAST, 8, 2.0),  # the last ones alone
    ],
)
def test_the_wait_is_what_waits_over_the_recent_pace(gaps, waiting, wanted):
    assert paced(*gaps)[0].seconds(waiting) == pytest.approx(wanted)


def test_it_grows_while_all_stands_still_and_a_rest_does_not_count():
    pace, clock = paced(0.5, 0.5)
    clock.now += 9
    assert pace.seconds(2) == pytest.approx(10)
    pace.rested()
    clock.now += 1000
    pace.started()
    clock.now += 2
    assert pace.seconds(3) == pytest.approx(6)


def test_a_full_queue_says_when_to_come_again(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(engine, "Pace", lambda: Pace(clock))
    base = wrap_base(decoder("llama"))
    one = Engine(base, AdapterPool(base), Limits(slots=1, queue=3, context=32))
    for name in "abcd":
        one.add_request(Request(name, (3, 5), max_tokens=4))
        one.step()  # a starts, the others wait
        clock.now += 1.5
    with pytest.raises(QueueFull) as full:
        one.add_request(Request("e", (3, 5)))
    assert full.value.seconds == pytest.approx(3 * 6)  # one start in six seconds, three that wait
    assert problem_of(full.value).headers == {"Retry-After": "18"}
    while one.has_work:
        one.step()
    for name in "abcd":
        one.add_request(Request(name, (3, 5), max_tokens=4))
        one.step() if name == "a" else None
    with pytest.raises(QueueFull) as full:
        one.add_request(Request("e", (3, 5)))
    assert full.value.seconds == 1
