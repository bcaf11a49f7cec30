"""What a body may hold: refused by name, never ignored; no input makes the server fail."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from web import events_of, running, say_only

COMPLETION = {"model": "tiny", "prompt": "Ada", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def client(site):
    with site.client() as one:
        yield one


def post(client, body, route="completions"):
    return client.post(f"/v1/{route}", json=body)


def refused(answer, param, status=400):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert "Traceback" not in error["message"]
    return error["message"]


WRONG = {
    "temperature": [-0.1, "warm", True, [1]],
    "top_p": [0, 1.1],
    "top_k": [-2, 1.5],
    "max_tokens": [0, -1, "9", 2.5],
    "stop": ["", ["a"] * 300, [""], 5],
    "seed": ["x", 1.5],
    "logprobs": [-1, 21],
    "stream": ["yes"],
    "mixture": [{}, {"chatty": "a"}, ["chatty"], dict.fromkeys(map(str, range(9)), 1.0)],
    "prompt": [5, [], [[]], ["a", 5], [[1], "a"], {"a": 1}, [True], [-1], [10**6], [10**30], ["a"] * 129],
    "model": [None, 5],
    "n": [2, True, "1"],
    "best_of": [2],
    "echo": [True],
    "logit_bias": [{"5": 1.0}],
    "frequency_penalty": [0.1],
    "tools": [[{"type": "function"}]],
    "response_format": [{"type": "json_object"}],
    "min_p": [0.1],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_or_unsupported_value_is_refused_by_its_name(client, name):
    for value in WRONG[name]:
        answer = post(client, COMPLETION | {name: value})
        message = refused(
            answer, None if name == "prompt" and answer.json()["error"]["param"] is None else name
        )
        assert name in message or "prompt" in message


def test_an_unknown_parameter_is_refused_with_the_nearest_known(client):
    assert "nearest valid: temperature" in refused(post(client, COMPLETION | {"temprature": 1}), "temprature")


def test_null_and_values_that_ask_for_nothing_are_taken(client):
    nothing = {
        "n": 1,
        "best_of": None,
        "echo": False,
        "logit_bias": {},
        "tools": None,
        "user": "me",
        "suffix": None,
    }
    plain = post(client, COMPLETION | {"temperature": 0}).json()["choices"]
    assert post(client, COMPLETION | {"temperature": 0, "stop": None, **nothing}).json()["choices"] == plain


def test_what_needs_another_parameter_says_so(client):
    refused(post(client, COMPLETION | {"stream_options": {"include_usage": True}}), "stream_options")
    refused(post(client, CHAT | {"top_logprobs": 2}, "chat/completions"), "top_logprobs")
    refused(post(client, COMPLETION | {"model": "plain", "mixture": {"chatty": 1.0}}), "mixture")
    refused(post(client, COMPLETION | {"mixture": {"chatti": 1.0}}), "mixture", 404)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hi",
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "robot", "content": "a"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "a", "tool_call_id": "1"}],
    ],
)
def test_messages_that_are_not_understood_are_refused(client, messages):
    refused(post(client, CHAT | {"messages": messages}, "chat/completions"), "messages")


def test_adapters_that_were_spoken_to_differently_share_no_chat(client):
    body = CHAT | {"mixture": {"chatty": 1.0, "plain": 1.0}}
    assert "different prompt formats" in refused(post(client, body, "chat/completions"), None)
    assert "different prompt formats" in refused(
        post(client, COMPLETION | {"mixture": body["mixture"]}), None
    )


def test_what_only_the_engine_can_refuse_is_the_requests_fault_too(client):
    body = COMPLETION | {"mixture": {"chatty": 1e308, "foreign": -1e308}}
    assert "finite" in refused(post(client, body), None)
    (event,) = events_of(post(client, body | {"stream": True}).text)
    assert "finite" in event["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"5",
        b"\xff\xfe",
        b'"\\ud800"',
        b"[" * 100_000,
        b'{"a":' * 20_000,
        b"9" * 9000,
    ],
    ids=range(10),
)
def test_what_is_no_json_object_is_refused(client, body):
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    refused(answer, None)


def test_half_characters_and_numbers_that_are_none_do_no_harm(client):
    raw = {
        b'{"model":"tiny","prompt":"\\ud800"}': 400,
        b'{"model":"\\ud800","prompt":"a"}': 400,
        b'{"model":"tiny","prompt":"a","\\ud800":1}': 400,
        b'{"model":"tiny","prompt":"a","temperature":NaN}': 400,
        b'{"model":"tiny","prompt":"a","temperature":1e999}': 400,
        b'{"model":"tiny","prompt":"a","mixture":{"chatty":Infinity}}': 400,
        b'{"model":"tiny","prompt":"a\\u0000b","max_tokens":1}': 200,
        b'{"model":"' + b"x" * 5000 + b'","prompt":"a"}': 404,
        b'{"model":"../talkers/plain","prompt":"a"}': 404,
        b'{"model":"a\\u0000","prompt":"a"}': 404,
        b'{"model":"","prompt":"a"}': 404,
    }
    for body, status in raw.items():
        answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, "error" in answer.json()) == (status, status != 200), body


def test_a_page_elsewhere_cannot_send_json_as_plain_text(client):
    """A browser asks before it sends application/json to another origin, and gets no leave here."""
    body = json.dumps(COMPLETION)
    refused(client.post("/v1/completions", content=body, headers={"Content-Type": "text/plain"}), None)
    asked = client.options(
        "/v1/completions", headers={"Origin": "http://evil", "Access-Control-Request-Method": "POST"}
    )
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers


def test_unknown_routes_and_methods_are_errors_of_the_same_shape(client):
    refused(client.get("/v2/models"), None, 404)
    refused(client.put("/v1/models"), None, 405)
    assert client.get("/docs").status_code == 404  # it would load scripts from elsewhere


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "stop",
    "logprobs",
    "stream",
    "mixture",
    "top_p",
    "seed",
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["completions", "chat/completions"]), st.dictionaries(st.sampled_from(FIELDS), anything)
)
def test_no_body_makes_the_server_fail(client, route, fields):
    body = json.dumps((COMPLETION if route == "completions" else CHAT) | fields)
    answer = client.post(f"/v1/{route}", content=body.encode(), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text


def test_characters_that_many_tokens_spell_come_whole(talkers, monkeypatch):
    base, folder, _ = talkers
    text = "Grüße, 日本語 🎉 <script>alert('ſ')</script>\u2028\n\nEnde"
    ids = base.tokenizer(text)["input_ids"]
    assert len(ids) > 50  # several for a character
    with running(base, folder) as site, site.client() as client:
        say_only(monkeypatch, [*ids, base.stop_ids[0]])
        body = CHAT | {"stream": True, "max_tokens": 100, "logprobs": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            raw = answer.read()
    choices = [event["choices"][0] for event in events_of(raw.decode("ascii"))]
    said = [choice["delta"].get("content", "") for choice in choices]
    assert "".join(said) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in said)
    shown = [one for c in choices if c["logprobs"] for one in c["logprobs"]["content"]]
    assert bytes(byte for one in shown for byte in one["bytes"]) == text.encode()


def test_schemathesis_finds_no_failure(talkers):
    base, folder, _ = talkers
    with running(base, folder, limits={"context": 24}, allow_runtime_loading=True) as site:
        schema = schemathesis.openapi.from_url(f"{site.url}/openapi.json")

        @settings(max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(st.data())
        def run(data):
            for operation in schema.get_all_operations():
                case = data.draw(operation.ok().as_strategy())
                answer = case.call(timeout=60)
                assert answer.status_code < 500, (case.as_curl_command(), answer.text)

        run()
