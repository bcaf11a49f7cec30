"""The Ray Serve application with two replicas on this machine: the same answers, wherever they are made."""

import json
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from onebase.models.base import load_base
from onebase.serve.prompts import Prompts
from onebase.web.ray_app import application
from serving import Request, adapter_folder, make_engine
from texts import save_base

serve = pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'onebase[ray]'")

QUESTION = [{"role": "user", "content": "What has Ada bought?"}]
TOKENS = 12
MODELS = ("base", "a0", "a1", "a2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def base(folder):
    return load_base(save_base(folder / "base"), "float32")


@pytest.fixture(scope="module")
def url(base, folder):
    """Where the application listens."""
    (folder / "adapters").mkdir()
    adapter_folder(folder / "adapters", base)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"base": str(folder / "base"), "adapters": str(folder / "adapters"), "dtype": "float32"}
    serve.run(application({**options, "replicas": "2", "slots": "2", "context": "128"}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def post(url, body, path="/v1/chat/completions"):
    """(status, text)."""
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def chat(model, **more):
    return {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": TOKENS, **more}


@pytest.fixture(scope="module")
def alone(base, folder, url):
    """Each model's answer from an engine in this process."""
    engine = make_engine(base, folder / "adapters", context=128)
    ids = tuple(Prompts(base).chat([], QUESTION))
    stops = frozenset(base.stop_ids)
    requests = [
        Request(model, ids, None if model == "base" else model, max_tokens=TOKENS, stop_ids=stops)
        for model in MODELS
    ]
    return {result.request: result.text for result in engine.generate(requests)}


def test_two_replicas_answer_as_one_engine_does(url, alone):
    with ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(lambda model: (model, *post(url, chat(model))), MODELS * 6))
    assert {status for _, status, _ in replies} == {200}
    said = [(model, json.loads(text)["choices"][0]["message"]["content"]) for model, _, text in replies]
    assert said == [(model, alone[model]) for model, _ in said]
    assert len(set(alone.values())) == len(MODELS)
    deployments = next(iter(serve.status().applications.values())).deployments
    assert {name: sum(one.replica_states.values()) for name, one in deployments.items()} == {
        "Engine": 2,
        "Door": 1,
    }


def test_an_answer_streams_through(url, alone):
    status, text = post(url, chat("a1", stream=True))
    assert status == 200
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(pieces) == alone["a1"]
    assert len(pieces) > 3


def test_errors_and_lists_are_the_servers_own(url):
    status, text = post(url, chat("a9"))
    assert (status, json.loads(text)["error"]["code"]) == (404, "model_not_found")
    assert post(url, {"model": 3})[0] == 400
    assert post(url, {"lora_name": "x", "lora_path": "x"}, "/v1/load_lora_adapter")[0] == 403
    with urllib.request.urlopen(f"{url}/v1/models") as reply:
        assert [model["id"] for model in json.load(reply)["data"]] == list(MODELS)
