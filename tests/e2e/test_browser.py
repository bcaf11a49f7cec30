"""The page of `onebase serve` in a real Chromium, against a real server: what people see is what the API says."""

import json
import time
import urllib.request

import pytest

from browser import Page, find_chromium, serving
from onebase.serve.engine import Engine
from serving import adapter_folder
from texts import text_base

EVIL = "<img src=x onerror='window.pwned = 1'>"
QUESTION = "What has Ada bought?"
IDLE = (
    "document.querySelectorAll('[aria-busy=true]').length === 0 && !document.querySelector('#send').disabled"
)

pytestmark = pytest.mark.skipif(not find_chromium(), reason="no Chromium is installed")


@pytest.fixture(scope="module")
def base():
    return text_base()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with Page(find_chromium(), tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def folder(base, tmp_path):
    """Three adapters, one with markup for a name, and a broken one, also with markup."""
    adapter_folder(tmp_path, base)
    (tmp_path / "a2").rename(tmp_path / EVIL)
    (tmp_path / f"{EVIL}broken").mkdir()
    (tmp_path / f"{EVIL}broken" / "adapter_config.json").write_text('{"peft_type": "<b>odd</b>"}')
    return tmp_path


def asked(url, model, tokens):
    """What the API answers."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": tokens,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def opened(page, url):
    """The page, once it lists the adapters."""
    page.open(url)
    page.wait("document.querySelector('#model-left').options.length > 0")


def put(page, id, text):
    """Type a text into a field that is emptied before."""
    page.run(f"document.querySelector('#{id}').select()")
    page.type(text)


def choose(page, side, name):
    """Choose who answers, as a person does: the value, and the event that tells of it."""
    select = f"document.querySelector('#model-{side}')"
    page.run(f"{select}.value = {json.dumps(name)}; {select}.dispatchEvent(new Event('change'))")


def ask(page, tokens):
    """Type the question and press Enter."""
    put(page, "tokens", str(tokens))
    put(page, "message", QUESTION)
    page.press("Enter")


def text(page, id):
    return page.run(f"document.querySelector('#{id}').textContent")


@pytest.fixture
def slow(monkeypatch):
    """An engine that takes its time, as one with a real base does: answers last until they can be looked at."""
    step = Engine.step

    def slow_step(self):
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow_step)


@pytest.mark.usefixtures("slow")
def test_both_sides_show_what_the_api_answers(page, base, folder):
    with serving(base, folder) as url:
        opened(page, url)
        assert (
            page.run("document.querySelector('#model-left').selectedOptions[0].textContent") == "tiny (base)"
        )
        for left, right in (("tiny", "a0"), ("a1", EVIL)):
            choose(page, "left", left)
            choose(page, "right", right)
            ask(page, 24)
            page.wait("document.querySelector('#numbers-left').textContent !== 'waiting'")
            page.wait(IDLE)
            wanted = [asked(url, name, 24) for name in (left, right)]
            assert [text(page, f"answer-{side}") for side in ("left", "right")] == wanted
            assert wanted[0] != wanted[1]
            for side in ("left", "right"):
                assert "first token" in text(page, f"numbers-{side}")
                assert "tokens/s" in text(page, f"numbers-{side}")
        assert page.complaints() == []
        assert {address for address in page.requested() if not address.startswith((url, "data:"))} == set()


def test_markup_in_names_reasons_and_answers_is_text(page, base, folder):
    with serving(base, folder) as url:
        opened(page, url)
        names = page.run("[...document.querySelectorAll('#adapters h3')].map((one) => one.textContent)")
        assert names == [EVIL, "a0", "a1"]
        assert EVIL in text(page, "model-right")
        assert text(page, "refused").startswith(f"{EVIL}broken")
        event = {"choices": [{"delta": {"content": EVIL + "<script>window.pwned = 2</script>"}}]}
        stream = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
        page.run(f"window.fetch = async () => new Response({json.dumps(stream)}); 0")
        ask(page, 9)
        page.wait("document.querySelector('#answer-right').textContent")
        assert text(page, "answer-left") == event["choices"][0]["delta"]["content"]
        assert page.run("document.querySelectorAll('main img, main script, main b').length") == 0
        assert page.run("window.pwned === undefined")
        assert page.complaints() == []


def test_the_policy_runs_nothing_but_the_page_itself(page, base, folder):
    with serving(base, folder) as url:
        opened(page, url)
        page.run(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'pwned = 1'}))"
        )
        page.run("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='window.pwned = 2'>`)")
        page.run("fetch('http://example.com/').catch(() => 0)")
        page.wait("document.images.length === 1 && document.images[0].complete")
        assert page.run("window.pwned === undefined")
        assert all("Content Security Policy" in one for one in page.complaints())
        assert len(page.complaints()) >= 3


@pytest.mark.usefixtures("slow")
def test_stop_ends_both_answers(page, base, folder):
    with serving(base, folder) as url:
        whole = asked(url, "a0", 90)
        opened(page, url)
        choose(page, "left", "a0")
        choose(page, "right", "a0")
        ask(page, 90)
        page.wait("document.querySelector('#answer-left').textContent.length > 2")
        page.run("document.querySelector('#stop').click()")
        page.wait(IDLE)
        cut = text(page, "answer-left")
        assert whole.startswith(cut)
        assert len(cut) < len(whole)
        assert text(page, "numbers-right").endswith("stopped")
        assert page.complaints() == []


def test_adapters_are_loaded_and_unloaded_from_the_page(page, base, folder):
    with serving(base, folder, allow_runtime_loading=True) as url:
        opened(page, url)
        page.run(
            "[...document.querySelectorAll('button')].find((one) => one.dataset.key === 'unload a0').click()"
        )
        page.wait("document.querySelector('#notice').textContent.includes('removed')")
        page.wait("document.querySelectorAll('#adapters h3').length === 2")
        assert page.run("document.querySelector('#folders').options[0].value") == "a0"
        put(page, "folder", "a0")
        put(page, "name", "again")
        page.press("Enter")
        page.wait("document.querySelector('#notice').textContent.includes('added')")
        page.wait("document.querySelectorAll('#adapters h3').length === 3")
        assert "again" in text(page, "model-left")
        put(page, "folder", "nowhere")
        page.press("Enter")
        page.wait("document.querySelector('#notice.bad')?.textContent.includes('nowhere')")


def test_the_key_is_asked_for_and_kept_in_memory(page, base, folder):
    with serving(base, folder, api_key="secret") as url:
        page.open(url)
        page.wait("!document.querySelector('#locked').hidden")
        put(page, "key", "wrong")
        page.press("Enter")
        page.wait("document.querySelector('#trouble').textContent.includes('not this server')")
        put(page, "key", "secret")
        page.press("Enter")
        page.wait("document.querySelectorAll('#adapters h3').length === 3")
        assert page.run(
            "document.querySelector('#locked').hidden && document.querySelector('#trouble').hidden"
        )
        ask(page, 5)
        page.wait(IDLE)
        assert text(page, "answer-left")
        assert page.run("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        opened_again = page.requested()
        assert all("secret" not in address for address in opened_again)
