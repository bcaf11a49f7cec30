"""Who may ask, how much, and what becomes of an answer that nobody waits for."""

import contextlib
import gc
import socket
import threading

import httpx
import openai
import pytest

from onebase.errors import ConfigError
from onebase.serve.request import Limits
from onebase.web.server import Server, bound, open_service, serve
from onebase.web.settings import Settings, is_loopback
from web import WAIT, events_of, running

LONG = {"model": "plain", "prompt": "Ada", "max_tokens": 120, "temperature": 0}
SHORT = LONG | {"max_tokens": 2}


def raw(site, head, body=b""):
    """What the server says to these bytes."""
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), WAIT) as wire:
        wire.sendall(head.replace(b"\n", b"\r\n") + b"\r\n\r\n" + body)
        wire.settimeout(WAIT)
        return wire.recv(65536)


@pytest.fixture(scope="module")
def tight(talkers):
    """One slot, one that waits, small bodies, a key that is not ASCII."""
    base, folder, _ = talkers
    with running(base, folder, {"slots": 1, "queue": 1}, api_key="schlüssel", max_body=2000) as site:
        yield site


@pytest.fixture(scope="module")
def client(tight):
    with tight.client(headers={"Authorization": "Bearer schlüssel".encode()}) as one:
        yield one


def test_without_the_key_only_the_page_and_the_health_are_open(tight):
    with tight.client() as client:
        for path in ("/v1/models", "/v1/adapters", "/metrics", "/openapi.json", "/nothing"):
            for given in ({}, {"Authorization": "Bearer schlussel"}, {"Authorization": "schlüssel".encode()}):
                answer = client.get(path, headers=given)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
                assert answer.json()["error"]["type"] == "authentication_error"
        assert client.post("/v1/completions", json=SHORT).status_code == 401
        assert [client.get(path).status_code for path in ("/", "/health")] == [200, 200]


def test_with_it_all_is_open(client):
    assert client.get("/v1/models").status_code == 200
    assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_a_client_with_a_wrong_key_gets_its_own_exception(site, talkers):
    base, folder, _ = talkers
    with running(base, folder, api_key="right") as locked:
        for key, wanted in {"right": None, "wrong": openai.AuthenticationError}.items():
            with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0) as client:
                if wanted is None:
                    assert client.models.list().data
                else:
                    with pytest.raises(wanted):
                        client.models.list()


OWN = ("127.0.0.1", "127.9.9.9", "localhost", "[::1]", "::1")
OTHERS = ("", "0.0.0.0", "::", "192.168.1.5", "evil.example")


@pytest.mark.parametrize(("host", "own"), [*((h, True) for h in OWN), *((h, False) for h in OTHERS)])
def test_a_key_is_needed_where_other_machines_reach(host, own):
    assert is_loopback(host) is own
    if host and own:
        Settings(host=host)
    elif host:
        with pytest.raises(ConfigError, match="--api-key"):
            Settings(host=host)
        assert "geheim" not in repr(Settings(host=host, api_key="geheim"))


def test_without_a_key_a_foreign_host_name_gets_nothing(site):
    """A page at evil.example whose name leads to 127.0.0.1 sends its own name as Host."""
    for host, status in {
        "evil.example": 403,
        "evil.example:8000": 403,
        "localhost": 200,
        "[::1]:80": 200,
    }.items():
        assert httpx.get(f"{site.url}/v1/models", headers={"Host": host}).status_code == status
    assert raw(site, b"GET /v1/models HTTP/1.0").startswith(b"HTTP/1.1 403")


def test_bodies_over_the_limit_are_refused_by_what_they_say_and_by_what_they_are(tight, client):
    body = {**SHORT, "user": "x" * 3000}
    answer = client.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    sent = []

    def endless():
        for _ in range(1000):
            sent.append(1)
            yield b" " * 1000

    try:
        answer = client.post("/v1/completions", content=endless())
        assert answer.status_code == 413
    except httpx.WriteError:  # the server hung up before all was written
        pass
    head = b"POST /v1/completions HTTP/1.1\nHost: localhost\nAuthorization: Bearer schl\xc3\xbcssel\nContent-Length: "
    assert raw(tight, head + b"9" * 18).startswith(b"HTTP/1.1 413")  # before a byte of it has come
    assert client.post("/v1/completions", json={**SHORT, "user": "x" * 1000}).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(talkers):
    base, folder, _ = talkers
    with running(base, folder, body_seconds=0.2) as site:
        head = b"POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: 9"
        assert raw(site, head, b"{").startswith(b"HTTP/1.1 408")


def test_a_full_queue_says_when_to_come_back_and_leaving_frees_slot_and_queue(tight, client, monkeypatch):
    """One runs, one waits, the third is refused; when the clients leave, both are gone from the engine."""
    step, go = tight.service.engine.step, threading.Event()
    monkeypatch.setattr(tight.service.engine, "step", lambda: step() if go.wait(0.02) else [])
    with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as first:
        assert first.status_code == 200
        go.set()  # one step, or a few: the first has its slot
        tight.wait_until(lambda stats: stats.running == 1)
        go.clear()
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as second:
            assert second.status_code == 200
            tight.wait_until(lambda stats: stats.waiting == 1)
            third = client.post("/v1/completions", json=LONG)
            assert (third.status_code, third.headers["retry-after"]) == (429, "1")
            assert third.json()["error"]["type"] == "rate_limit_error"
            several = client.post("/v1/completions", json=LONG | {"prompt": ["a", "b", "c"]})
            assert several.status_code == 429
    go.set()
    tight.wait_until(lambda stats: stats.running == stats.waiting == 0)
    assert client.post("/v1/completions", json=SHORT).status_code == 200
    assert 'onebase_requests_total{finish="cancelled",model="plain"} 2.0' in client.get("/metrics").text


def test_a_client_that_waits_for_a_whole_answer_and_leaves_cancels_it(tight, client, monkeypatch):
    step, go = tight.service.engine.step, threading.Event()
    monkeypatch.setattr(tight.service.engine, "step", lambda: step() if go.wait(0.02) else [])
    before = tight.stats().new_tokens

    def ask():
        headers = {"Authorization": "Bearer schlüssel".encode()}
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{tight.url}/v1/completions", json=LONG, headers=headers, timeout=0.5)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    tight.wait_until(lambda stats: stats.waiting == 1)
    asking.join(WAIT)
    tight.wait_until(lambda stats: stats.waiting == 0)
    go.set()
    tight.wait_until(lambda stats: stats.running == 0)
    assert tight.stats().new_tokens == before


def test_a_failing_step_is_an_error_object_and_the_next_request_is_answered(site, monkeypatch, caplog):
    step = site.service.engine.step

    def fail():
        monkeypatch.setattr(site.service.engine, "step", step)
        raise RuntimeError("out of luck")

    with site.client() as client:
        for stream in (False, True):
            monkeypatch.setattr(site.service.engine, "step", fail)
            answer = client.post("/v1/completions", json=SHORT | {"stream": stream})
            body = events_of(answer.text)[-1] if stream else answer.json()
            assert answer.status_code == (200 if stream else 500)
            assert body["error"]["message"] == "RuntimeError: out of luck"
        assert client.post("/v1/completions", json=SHORT).status_code == 200
    assert "a step of the engine failed" in caplog.text


def test_who_comes_while_it_shuts_down_is_told_so(talkers):
    base, folder, _ = talkers
    with running(base, folder) as site, site.client() as client:
        site.service.open = False
        for answer in (client.get("/health"), client.post("/v1/completions", json=SHORT)):
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "service_unavailable_error")


def test_a_port_that_is_taken_and_a_name_that_is_none_are_said(site):
    port = int(site.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port}"):
        bound(Settings(port=port))
    with pytest.raises(ConfigError, match="listen at"):
        bound(Settings(host="no.such.name.invalid", api_key="k"))


def test_loading_without_a_folder_is_refused_at_the_start(talkers):
    with pytest.raises(ConfigError, match="no adapters folder"):
        open_service(talkers[0], None, Limits(context=32), Settings(allow_runtime_loading=True))


def test_a_server_takes_what_is_there_at_its_start_out_of_the_collectors_sight(
    talkers, tmp_path, monkeypatch
):
    frozen = []
    monkeypatch.setattr(Server, "run", lambda self, sockets: frozen.append(gc.get_freeze_count()))
    with bound(Settings(port=0)) as listener:
        service = open_service(talkers[0], tmp_path, Limits(slots=1, context=16), Settings(port=0))
        try:
            serve(service, listener)
        finally:
            gc.unfreeze()
            service.worker.shutdown()
    assert frozen[0] > 100_000
