"""The engine's thread: requests from many threads and loops, cancellation, failures, and an orderly end."""

import asyncio
import threading

import pytest

from decoders import decoder
from onebase.serve.request import QueueFull, Request, UnknownAdapter
from onebase.serve.worker import ShuttingDown, Worker
from serving import adapter_folder, alone, make_engine, prompts, tokens_of, wrap_base


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base, folder = wrap_base(decoder("llama")), tmp_path_factory.mktemp("adapters")
    return base, folder, adapter_folder(folder, base, 2)


@pytest.fixture
def worker(place):
    one = Worker(make_engine(*place[:2])).start()
    yield one
    assert one.shutdown(drain=False, timeout=60)


def test_requests_from_many_threads_get_their_own_events(worker, place):
    base, _, made = place
    asked, found, over = prompts(8), {}, [threading.Event() for _ in range(8)]

    def ask(number):
        def listen(event):
            found.setdefault(number, []).append(event)
            if event.finish:
                over[number].set()

        name = [*made][number % 3]
        worker.submit(Request(str(number), asked[number], name, max_tokens=5), listen).result(60)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(one.wait(60) for one in over)
    for number in range(8):
        wanted = alone(base, made[[*made][number % 3]], asked[number], 5)[0]
        assert tokens_of(found[number]) == wanted
    assert worker.stats().result(60).running == 0


def test_a_loop_reads_events_and_what_it_leaves_is_cancelled(worker, place):
    base, _, made = place

    async def main():
        events = [event async for event in worker.events(Request("whole", (3, 4), "a0", max_tokens=4))]
        leaving = worker.events(Request("left", (3, 4), "a0", max_tokens=40))
        async for _ in leaving:
            break
        await leaving.aclose()
        with pytest.raises(UnknownAdapter):
            await anext(worker.events(Request("r", (3, 4), "nobody")))
        return events

    events = asyncio.run(main())
    assert tokens_of(events) == alone(base, made["a0"], (3, 4), 4)[0]
    assert worker.stats().result(60).running == 0


def test_a_full_queue_reaches_who_asked(place):
    engine = make_engine(*place[:2], queue=1)
    worker = Worker(engine)
    futures = [worker.submit(Request(str(n), (3, 4), max_tokens=2), lambda event: None) for n in range(3)]
    worker.start()
    errors = [future.exception(60) for future in futures]
    assert sum(isinstance(error, QueueFull) for error in errors) >= 1
    assert worker.shutdown(timeout=60)


def test_shutdown_drains_and_then_takes_nothing(place):
    base, folder, made = place
    worker, found = Worker(make_engine(base, folder)).start(), []
    worker.submit(Request("r", (3, 4), "a1", max_tokens=20), found.append).result(60)
    assert worker.shutdown(timeout=60)
    assert tokens_of(found) == alone(base, made["a1"], (3, 4), 20)[0]
    with pytest.raises(ShuttingDown):
        worker.submit(Request("s", (3,)), found.append)


def test_a_step_that_fails_ends_its_requests_and_not_the_service(worker, monkeypatch, caplog):
    own, over = worker.engine.step, threading.Event()

    def step():
        monkeypatch.setattr(worker.engine, "step", own)
        raise RuntimeError("out of luck")

    found = []

    def listen(event):
        found.append(event)
        if event.finish:
            over.set()

    monkeypatch.setattr(worker.engine, "step", step)
    worker.submit(Request("r", (3, 4), "a0"), listen).result(60)
    assert over.wait(60)
    assert (found[-1].finish, found[-1].error) == ("error", "RuntimeError: out of luck")
    over.clear()
    worker.submit(Request("r", (3, 4), "a0", max_tokens=2), listen).result(60)
    assert over.wait(60)
    assert found[-1].finish == "length"
    assert "a step of the engine failed" in caplog.text


def test_a_listener_that_fails_loses_its_own_request_alone(worker, caplog):
    over = threading.Event()

    def bad(event):
        raise RuntimeError("its loop is closed")

    worker.submit(Request("bad", (3, 4), max_tokens=40), bad).result(60)
    worker.submit(Request("good", (3, 4), max_tokens=8), lambda e: over.set() if e.finish else None).result(
        60
    )
    assert over.wait(60)
    assert "a listener of request bad failed" in caplog.text
