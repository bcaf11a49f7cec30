"""The official openai client, unchanged, against a server: answers are those of each adapter alone."""

import openai
import pytest

from onebase.data.template import PromptFormat, render_messages, render_prompt
from onebase.transforms.arithmetic import combine
from onebase.transforms.combining import Recipe
from web import FORMATS, bare, greedy

ASKED = [{"role": "user", "content": "What has Ada bought?"}]
NAMES = [None, "chatty", "plain", "foreign"]


@pytest.fixture(scope="module")
def client(site):
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="any", max_retries=0) as one:
        yield one


def chat_ids(base, name, messages=ASKED):
    form = FORMATS.get(name)
    if form and not form["chat"]:
        return render_prompt(base.tokenizer, messages[-1]["content"], PromptFormat(**form))
    return render_messages(base.tokenizer, messages, PromptFormat(**(form or {"chat": True})))


def test_the_models_are_the_base_and_its_adapters(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny", "chatty", "foreign", "plain"]
    assert [model.parent for model in models] == [None, "tiny", "tiny", "tiny"]
    assert client.models.retrieve("plain").id == "plain"
    with pytest.raises(openai.NotFoundError, match="'nobody' does not exist"):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("name", NAMES)
def test_a_chat_is_rendered_as_the_adapter_was_trained_and_answered_by_it_alone(client, talkers, name):
    base, _, made = talkers
    tokens, text, finish = greedy(base, made[name], chat_ids(base, name), 12)
    said = client.chat.completions.create(
        model=name or "tiny",
        messages=ASKED,
        temperature=0,
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=2,
    )
    (choice,) = said.choices
    assert (choice.message.role, bare(choice.message.content), choice.finish_reason) == (
        "assistant",
        text,
        finish,
    )
    assert said.usage.prompt_tokens == len(chat_ids(base, name))
    assert said.usage.completion_tokens == len(tokens)
    shown = choice.logprobs.content
    assert len(shown) == len(tokens)
    assert bytes(byte for one in shown for byte in one.bytes).decode("utf-8", "replace").startswith(text)
    assert all(one.top_logprobs[0].logprob == one.logprob >= one.top_logprobs[1].logprob for one in shown)


@pytest.mark.parametrize("name", NAMES)
def test_raw_text_and_its_ids_are_continued_alike_in_a_stream_and_whole(client, talkers, name):
    base, _, made = talkers
    ids = base.tokenizer("Ada has bought")["input_ids"]
    tokens, text, finish = greedy(base, made[name], ids, 10)
    options = {"model": name or "tiny", "temperature": 0, "max_tokens": 10}
    whole = client.completions.create(prompt="Ada has bought", **options)
    assert (bare(whole.choices[0].text), whole.choices[0].finish_reason) == (text, finish)
    assert whole.usage.total_tokens == len(ids) + len(tokens)
    stream = client.completions.create(prompt=ids, stream=True, logprobs=1, **options)
    parts = [chunk.choices[0] for chunk in stream]
    assert "".join(part.text for part in parts) == whole.choices[0].text
    assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [finish]
    words = [word for part in parts for word in part.logprobs.tokens]
    offsets = [offset for part in parts for offset in part.logprobs.text_offset]
    assert len(words) == len(tokens)
    assert offsets == [sum(map(len, words[:n])) for n in range(len(words))]


def test_several_prompts_give_several_choices_in_their_order(client, talkers):
    base, _, made = talkers
    prompts = ["Ada", "Ben has", "What"]
    wanted = [greedy(base, made["foreign"], base.tokenizer(p)["input_ids"], 6)[1] for p in prompts]
    options = {"model": "foreign", "prompt": prompts, "temperature": 0, "max_tokens": 6}
    assert [bare(choice.text) for choice in client.completions.create(**options).choices] == wanted
    said = ["", "", ""]
    for chunk in client.completions.create(stream=True, **options):
        said[chunk.choices[0].index] += chunk.choices[0].text
    assert [*map(bare, said)] == wanted


def test_a_chat_stream_says_who_speaks_then_what_then_why_it_ends_and_its_usage(client, talkers):
    base, _, made = talkers
    ids = chat_ids(base, "chatty")
    tokens, text, finish = greedy(base, made["chatty"], ids, 9)
    options = {"model": "chatty", "messages": ASKED, "temperature": 0, "max_tokens": 9}
    chunks = list(
        client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert bare("".join(c.choices[0].delta.content or "" for c in chunks[:-1])) == text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [finish]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(ids),
        "completion_tokens": len(tokens),
        "total_tokens": len(ids) + len(tokens),
    }
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_mixture_answers_as_the_weighted_sum_of_its_adapters(client, talkers):
    base, _, made = talkers
    mixed = combine([made["chatty"], made["foreign"]], [0.7, -0.4], Recipe(method="cat"))
    ids = base.tokenizer("Ada has")["input_ids"]
    given = client.completions.create(
        model="tiny",
        prompt="Ada has",
        temperature=0,
        max_tokens=10,
        extra_body={"mixture": {"chatty": 0.7, "foreign": -0.4}},
    )
    assert bare(given.choices[0].text) == greedy(base, mixed, ids, 10)[1]


def test_stop_texts_end_an_answer_and_are_left_out(client, talkers):
    base, _, made = talkers
    text = greedy(base, made["foreign"], base.tokenizer("What")["input_ids"], 12)[1]
    stop = text[5:7]
    given = client.completions.create(
        model="foreign", prompt="What", temperature=0, max_tokens=12, stop=["never so", stop]
    )
    assert (given.choices[0].text, given.choices[0].finish_reason) == (text[: text.index(stop)], "stop")


def test_a_seed_repeats_an_answer_and_the_default_temperature_is_one(client):
    def say(**options):
        given = client.completions.create(model="plain", prompt="Ada", max_tokens=20, **options)
        return given.choices[0].text

    assert say(seed=7) == say(seed=7, temperature=1.0, top_p=1.0)
    assert len({say(seed=seed) for seed in range(4)}) > 1
    assert say(seed=3, extra_body={"top_k": 1}) == say(temperature=0)


def test_text_parts_are_one_text_and_a_system_message_takes_the_recorded_ones_place(client, talkers):
    base, _, made = talkers
    own = [{"role": "system", "content": "Speak."}, *ASKED]
    parts = [{"type": "text", "text": "What has "}, {"type": "text", "text": "Ada bought?"}]
    given = client.chat.completions.create(
        model="chatty", messages=[own[0], {"role": "user", "content": parts}], temperature=0, max_tokens=8
    )
    wanted = greedy(base, made["chatty"], chat_ids(base, "chatty", own), 8)[1]
    assert bare(given.choices[0].message.content) == wanted


def test_errors_are_the_clients_own_exceptions(client):
    options = {"model": "tiny", "messages": ASKED}
    with pytest.raises(openai.NotFoundError, match="nearest valid: chatty") as error:
        client.chat.completions.create(**options | {"model": "chaty"})
    assert (error.value.status_code, error.value.param, error.value.code) == (404, "model", "model_not_found")
    for wrong in ({"n": 2}, {"logit_bias": {"5": 1}}, {"presence_penalty": 0.5}, {"temperature": -1}):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**options, **wrong)
        assert error.value.param == next(iter(wrong))
        assert next(iter(wrong)) in error.value.message
    with pytest.raises(openai.BadRequestError, match="answer included") as error:
        client.completions.create(model="tiny", prompt="word " * 200)
    assert error.value.code == "context_length_exceeded"
    assert client.chat.completions.create(**options, n=1, user="me", max_tokens=1, presence_penalty=0).choices
