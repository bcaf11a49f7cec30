"""`onebase serve` as a process: stopped, killed, overrun, and given adapters that are broken or that change."""

import contextlib
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from benchmarks.soak.site import Site, digests

from adapters import trained
from onebase.adapters.injection import injected
from onebase.config import LoraConfig, Sampling
from onebase.models.base import load_base
from onebase.models.generation import generate_ids
from onebase.storage.format import save_adapter
from texts import save_base
from web import WAIT, bare, events_of

pytestmark = pytest.mark.slow

NAMES = (None, "first", "second", "changing")
PROMPTS = ("What has Ada bought?", "Ben has bought the old garden bench.", "Who")
COUNT, LONG = 24, 100


class Place(NamedTuple):
    """A base's folder, an adapters folder, another adapter for `changing`, and the answers by (name, prompt, count)."""

    base: str
    folder: Path
    other: Path
    answers: dict[tuple[str | None, str, int], str]

    def site(self, **options):
        """A server of its own over a copy of the adapters."""
        folder = self.folder.with_name(f"served-{time.monotonic_ns()}")
        shutil.copytree(self.folder, folder)
        log = folder.with_suffix(".txt")
        made = Site(self.base, folder, log, context=128, dtype="float32", **{"refresh": 0.2, **options})
        made.folder = folder
        return made


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    top = tmp_path_factory.mktemp("faults")
    base = load_base(save_base(top / "base"), "float32", "cpu")
    made = {
        name: trained(base.model, LoraConfig(rank=4, alpha=8), seed=n)
        for n, name in enumerate((*NAMES[1:], "other"))
    }
    for name, adapter in made.items():
        save_adapter(adapter, top / "other" if name == "other" else top / "adapters" / name)
    answers = {
        (name, prompt, count): text
        for name, adapter in {None: None, **made}.items()
        for prompt in PROMPTS
        for count, text in texts_of(base, adapter, prompt).items()
    }
    assert len(set(answers.values())) == len(answers)  # no answer can be mistaken for another's
    return Place(str(top / "base"), top / "adapters", top / "other", answers)


def texts_of(base, adapter, prompt):
    """The greedy answers by transformers, of COUNT tokens and of LONG."""
    with injected(base.model, adapter):
        ids = base.tokenizer(prompt).input_ids
        tokens = next(generate_ids(base, [ids], Sampling(temperature=0, max_new_tokens=LONG)))
    return {n: bare(base.tokenizer.decode(tokens[:n], skip_special_tokens=True)) for n in (COUNT, LONG)}


def body(name, prompt, count=COUNT, **more):
    return {"model": name or "base", "prompt": prompt, "max_tokens": count, "temperature": 0, **more}


def ask(site, name, prompt, count=COUNT, stream=False):
    """(status, text), whole or streamed."""
    answer = httpx.post(
        f"{site.url}/v1/completions", json=body(name, prompt, count, stream=stream), timeout=WAIT
    )
    if answer.status_code != 200:
        return answer.status_code, answer.json()["error"]["message"]
    parts = events_of(answer.text) if stream else [answer.json()]
    return 200, bare("".join(part["choices"][0]["text"] for part in parts))


def load_of(site):
    """(running, waiting) requests."""
    lines = httpx.get(f"{site.url}/metrics", timeout=WAIT).text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return tuple(int(float(found[f"onebase_requests_{what}"])) for what in ("running", "waiting"))


def until(found):
    end = time.monotonic() + WAIT
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def refused(site):
    facts = httpx.get(f"{site.url}/v1/adapters", timeout=WAIT).json()
    return {one["id"]: one["reason"] for one in facts["refused"]}


def post(site, route, **fields):
    return httpx.post(f"{site.url}{route}", json=fields, timeout=WAIT).status_code


@contextlib.contextmanager
def traffic(site, names, clients=4):
    """Clients that ask all the time, streamed and whole; gives what they got: (started, name, prompt, status, text)."""
    got, over = [], threading.Event()

    def client(number):
        turn = number
        while not over.is_set():
            name, prompt = names[turn % len(names)], PROMPTS[turn // len(names) % len(PROMPTS)]
            start = time.monotonic()
            got.append((start, name, prompt, *ask(site, name, prompt, stream=turn % 2 == 0)))
            turn += 1

    with ThreadPoolExecutor(clients) as pool:
        tasks = [pool.submit(client, number) for number in range(clients)]
        try:
            until(lambda: len(got) >= clients)
            yield got
        finally:
            over.set()
    for task in tasks:
        task.result()


@pytest.fixture(scope="module")
def site(place):
    with place.site(slots=2, allow_runtime_loading=True) as made:
        yield made


def test_a_broken_adapter_is_refused_while_the_others_answer(place, site):
    with traffic(site, NAMES) as got:
        hidden = site.folder / ".broken"
        shutil.copytree(place.other, hidden)
        tensors = hidden / "adapter_model.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-100])
        hidden.rename(site.folder / "broken")
        until(lambda: "broken" in refused(site))
        status, said = ask(site, "broken", "x")
        assert status == 404
        assert refused(site)["broken"] in said
        seen = len(got)
        until(lambda: len(got) > seen + 8)
        shutil.rmtree(site.folder / "broken")
        until(lambda: "broken" not in refused(site))
    for _, name, prompt, status, text in got:
        assert (status, text) == (200, place.answers[name, prompt, COUNT])


def test_a_changed_adapter_answers_as_the_old_one_or_the_new_never_as_both(place, site):
    folder, old = site.folder / "changing", place.folder / "changing"
    settled = []  # (since when, up to which answer, whose answers are right)
    with traffic(site, ("changing", "first")) as got:
        for turn in range(6):
            new, whose = ((place.other, "other"), (old, "changing"))[turn % 2]
            hidden = site.folder / ".next"
            shutil.copyfile(new / "adapter_model.safetensors", hidden)
            hidden.replace(folder / "adapter_model.safetensors")
            if turn % 3:
                args = {"lora_name": "changing", "lora_path": "changing", "load_inplace": True}
                assert post(site, "/v1/load_lora_adapter", **args) == 200
            else:  # found by itself
                until(lambda whose=whose: ask(site, "changing", PROMPTS[0])[1] == right(place, whose))
            start, seen = time.monotonic(), len(got)
            until(lambda seen=seen: len(got) > seen + 16)
            settled.append((start, len(got), whose))
    for number, (start, name, prompt, status, text) in enumerate(got):
        either = {"changing", "other"} if name == "changing" else {name}
        for since, last, whose in settled if name == "changing" else []:
            if since <= start and number < last:  # begun after the change, over before the next one
                either = {whose}
        assert status == 200, text
        assert text in {place.answers[one, prompt, COUNT] for one in either}
    assert {text for _, name, _, _, text in got if name == "changing"} >= {
        right(place, "changing"),
        right(place, "other"),
    }


def right(place, name):
    return place.answers[name, PROMPTS[0], COUNT]


def test_a_request_ends_as_it_began_when_its_adapter_is_unloaded(place, site):
    text, asked = "", body("second", PROMPTS[0], LONG, stream=True)
    with (
        traffic(site, ("first", None)) as got,
        httpx.stream("POST", f"{site.url}/v1/completions", json=asked, timeout=WAIT) as answer,
    ):
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        text += json.loads(next(lines))["choices"][0]["text"]
        assert post(site, "/v1/unload_lora_adapter", lora_name="second") == 200
        assert ask(site, "second", PROMPTS[0])[0] == 404
        assert "second" not in [one["id"] for one in httpx.get(f"{site.url}/v1/models").json()["data"]]
        for line in lines:
            text += "" if line == "[DONE]" else json.loads(line)["choices"][0]["text"]
        assert post(site, "/v1/load_lora_adapter", lora_name="second", lora_path="second") == 200
        assert ask(site, "second", PROMPTS[0]) == (200, right(place, "second"))
    assert bare(text) == place.answers["second", PROMPTS[0], LONG]
    assert all((s, t) == (200, place.answers[name, prompt, COUNT]) for _, name, prompt, s, t in got)


def test_a_full_queue_says_when_to_ask_again(place):
    waits = []

    def persist(number):
        name, prompt = NAMES[number % len(NAMES)], PROMPTS[number % len(PROMPTS)]
        while True:
            answer = httpx.post(f"{site.url}/v1/completions", json=body(name, prompt, LONG), timeout=WAIT)
            if answer.status_code != 429:
                return name, prompt, answer.status_code, bare(answer.json()["choices"][0]["text"])
            assert answer.json()["error"]["type"] == "rate_limit_error"
            waits.append(int(answer.headers["retry-after"]))
            time.sleep(waits[-1])

    with place.site(slots=1, queue=1) as site, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(persist, range(16)))
    assert all(
        (status, text) == (200, place.answers[name, prompt, LONG]) for name, prompt, status, text in found
    )
    assert waits
    assert min(waits) >= 1


def test_sigterm_under_load_finishes_what_was_taken_and_exits_with_0(place):
    asked = [(NAMES[n % 4], PROMPTS[n % 3], LONG, n % 2 == 0) for n in range(24)]
    with place.site(slots=2) as site, ThreadPoolExecutor(len(asked)) as pool:
        tasks = [pool.submit(ask, site, *one) for one in asked]
        until(lambda: sum(load_of(site)) + sum(task.done() for task in tasks) == len(asked))
        assert not all(task.done() for task in tasks)
        site.ask_to_end()
        for task, (name, prompt, count, _) in zip(tasks, asked, strict=True):
            assert task.result() == (200, place.answers[name, prompt, count])
        assert site.ended(WAIT) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{site.url}/health")
        assert "Traceback" not in site.said()


def test_sigterm_waits_no_longer_than_it_was_told(place):
    def lost(number):
        with contextlib.suppress(httpx.HTTPError):
            return ask(site, None, PROMPTS[number % 3], LONG)[0]

    with place.site(slots=1, drain=1, queue=400) as site, ThreadPoolExecutor(64) as pool:
        tasks = [pool.submit(lost, number) for number in range(400)]
        until(lambda: load_of(site)[0] == 1)
        site.ask_to_end()
        assert site.ended(WAIT) == 0
        assert {task.result() for task in tasks} <= {200, 503, None}
        assert "Traceback" not in site.said()


def test_kill_9_and_a_new_start_lose_nothing(place):
    with place.site(slots=2) as site:
        files = digests(site.folder)
        with ThreadPoolExecutor(8) as pool:

            def cut(number):
                with contextlib.suppress(httpx.HTTPError):
                    return ask(site, NAMES[number % 4], PROMPTS[0], LONG)[0]

            tasks = [pool.submit(cut, number) for number in range(32)]
            until(lambda: load_of(site)[0] == 2)
            assert site.kill() == -9
        assert None in [task.result() for task in tasks]
        assert digests(site.folder) == files
        place = place._replace(folder=site.folder)
    with place.site() as site:
        for name in NAMES:
            assert ask(site, name, PROMPTS[0]) == (200, right(place, name))
