"""`onebase serve` as a process: from the command to answers, and its end by a signal."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import httpx
import pytest

from onebase.cli.main import main

SAID = re.compile(r"serving (\S+) and (\d+) adapters at (http://\S+)")
MANY = 64  # answers in one slot: no signal comes after them


@pytest.fixture
def adapters(place, tmp_path):
    """A folder with the run's adapter, and a broken one."""
    for name in ("run", "broken"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors", "onebase.json"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(f"{place.run}/{file}", tmp_path / "adapters" / name)
    (tmp_path / "adapters" / "broken" / "adapter_model.safetensors").write_bytes(b"")
    return tmp_path / "adapters"


@contextlib.contextmanager
def serving(place, adapters, *options):
    """(the process, its URL), killed at the end of the block."""
    command = [sys.executable, "-m", "onebase", "serve", "--base", place.base, "--adapters", str(adapters)]
    environment = os.environ | {"ONEBASE_API_KEY": "from outside", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--port", "0", "--slots", "1", *options],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        while not (found := SAID.search(line := process.stderr.readline())):
            lines.append(line)
            assert line, lines
        assert "'broken' is refused" in "".join(lines)
        assert found.groups()[:2] == ("base", "1")
        yield process, found[3]
    finally:
        process.kill()
        process.communicate()


def stream(url, prompts):
    body = {"model": "run", "prompt": ["What has Ada bought?"] * prompts, "max_tokens": 100, "stream": True}
    headers = {"Authorization": "Bearer from outside"}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=120)


@pytest.mark.slow
def test_sigterm_ends_it_after_the_answers_that_run(place, adapters):
    with serving(place, adapters) as (process, url):
        with stream(url, MANY) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        ends = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]]
        assert len([end for end in ends if end]) == MANY
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in errors
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


@pytest.mark.slow
def test_answers_that_take_longer_than_they_have_are_cut(place, adapters):
    with serving(place, adapters, "--drain", "1") as (process, url):
        with stream(url, 2 * MANY) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            *_, error, done = [line.removeprefix("data: ") for line in lines if line]
        assert done == "[DONE]"
        assert json.loads(error)["error"]["message"] == "the server is shutting down"
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors


def refusal(capsys, *options):
    """What the command says, without a traceback, before it exits with 2."""
    assert main(["serve", *options]) == 2
    return capsys.readouterr().err


def test_mistakes_are_said_before_the_base_is_loaded(place, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("ONEBASE_API_KEY", raising=False)
    assert "--api-key" in refusal(capsys, "--base", "no-such-base", "--host", "0.0.0.0")
    assert "option slots=0" in refusal(capsys, "--base", "no-such-base", "--slots", "0")
    assert "option port" in refusal(capsys, "--base", "no-such-base", "--port", "70000")
    assert "no-such-base" in refusal(capsys, "--base", "no-such-base", "--port", "0")
    missing = refusal(capsys, "--base", place.base, "--port", "0", "--adapters", str(tmp_path / "none"))
    assert "no such folder" in missing


def test_without_the_extra_it_says_how_to_install_it(capsys, monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else own(name))
    said = refusal(capsys, "--port", "0")
    assert "not installed: uvicorn" in said
    assert "pip install 'onebase[serve]'" in said
