"""benchmarks/serve_soak.py: it runs, and its clients notice a server that answers wrongly."""

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from benchmarks.soak.answers import QUESTIONS, Truth, safe_part
from benchmarks.soak.traffic import Ledger, Name, Soak

from runs import environment
from texts import text_base

ROOT = Path(__file__).parents[2]
MINE, OTHER = tuple(range(40, 52)), tuple(range(60, 72))


@pytest.mark.slow
def test_the_quick_soak_passes_its_gates(tmp_path):
    command = [sys.executable, "-m", "benchmarks.serve_soak", "--quick"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["name"], said["gate"]) == ("serve_soak", "passed")
    assert said["ours"]["answers"] > 0
    assert said["ours"]["tokens/s"] > 0


def answered(handler, stream=False, now=("mine",)):
    """The ledger after one request to a server that answers so."""
    base = text_base()
    truths = {
        name: [Truth(tokens, ended=False)] * len(QUESTIONS)
        for name, tokens in (("mine", MINE), ("other", OTHER))
    }
    ledger, name = Ledger(), Name("m", ("mine", "other"), now)

    async def ask():
        async with httpx.AsyncClient(
            transport=httpx.MockTransport(lambda request: handler(base, request)), base_url="http://x"
        ) as http:
            await Soak(base, truths, {"m": name}, ledger, http, 5.0).checked(name, random.Random(0), stream)

    asyncio.run(ask())
    return ledger


def saying(tokens, less=0, extra=""):
    """A server that answers with these tokens, in one piece or streamed."""

    def handler(base, request):
        body = json.loads(request.content)
        count = body["max_tokens"] - less
        text = base.tokenizer.decode(list(tokens[:count])) + extra
        chat = "messages" in body
        usage, choice = {"completion_tokens": count}, {"finish_reason": "length"}
        if not body.get("stream"):
            part = {"message": {"content": text}} if chat else {"text": text}
            return httpx.Response(200, json={"choices": [{**choice, **part}], "usage": usage})
        part = {"delta": {"content": text}} if chat else {"text": text}
        events = [{"choices": [{**choice, **part}]}, {"choices": [], "usage": usage}]
        lines = [*map(json.dumps, events), "[DONE]"]
        return httpx.Response(200, text="".join(f"data: {line}\n\n" for line in lines))

    return handler


@pytest.mark.parametrize("stream", [False, True])
def test_right_answers_are_no_faults_and_others_are(stream):
    assert answered(saying(MINE), stream).faults == []
    assert answered(saying(OTHER), stream, now=("mine", "other")).faults == []
    for wrong in (saying(OTHER), saying(MINE, less=1), saying(MINE, extra="x")):
        ledger = answered(wrong, stream)
        assert (ledger.counts["wrong"], ledger.counts["checked"]) == (1, 1)
        assert "right would be" in ledger.faults[0]


def failing(status, content, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda base, request: httpx.Response(status, text=content, headers=names)


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_faults_unless_they_say_when_to_ask_again(stream):
    said = json.dumps({"error": {"message": "later", "type": "t", "param": None, "code": None}})
    assert answered(failing(429, said, retry_after="1"), stream).faults == []
    for handler, kind in (
        (failing(429, said), "status"),
        (failing(500, said), "status"),
        (failing(404, said), "status"),
        (failing(404, "Not Found"), "broken"),
        (failing(500, said.replace("later", "Traceback")), "broken"),
        (failing(200, "data: {}" if stream else "{}"), "broken"),
    ):
        ledger = answered(handler, stream)
        assert (ledger.counts[kind], len(ledger.faults)) == (1, 1)


def test_a_stream_without_its_end_is_a_fault():
    def cut(base, request):
        whole = saying(MINE)(base, request)
        return httpx.Response(200, text=whole.text.removesuffix("data: [DONE]\n\n"))

    assert answered(cut, stream=True).counts["broken"] == 1


def test_a_truth_ends_before_a_near_tie_and_at_a_stop():
    assert safe_part([5, 6, 7, 8], [True, True, False, True], [9]) == Truth((5, 6), ended=False)
    assert safe_part([5, 6, 9, 0], [True, True, True, True], [9]) == Truth((5, 6), ended=True)
    assert safe_part([5, 6, 9, 0], [True, True, False, True], [9]) == Truth((5, 6), ended=False)
    assert safe_part([5, 6], [True, True], [9]) == Truth((5, 6), ended=False)
