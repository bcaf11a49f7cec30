"""The engine: every request's answer is the one it gets alone, whoever joins and leaves meanwhile."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoders import decoder
from onebase.adapters.injection import adapter_names
from onebase.errors import AdapterNameError, BaseError, ConfigError, DataError
from onebase.serve.engine import Engine
from onebase.serve.pool import AdapterPool
from onebase.serve.request import Limits, PromptTooLong, QueueFull, Request, UnknownAdapter
from onebase.storage.format import load_adapter, save_adapter
from onebase.transforms.arithmetic import combine
from onebase.transforms.combining import Recipe
from serving import adapter_folder, alone, drained, make_engine, prompts, tokens_of, wrap_base
from texts import text_base, tokenizer
from tiny import tiny

pytestmark = pytest.mark.slow

NAMES = (None, "a0", "a1", "a2")
LONGEST = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(base, its adapters' folder, the adapters, what each says to each of some prompts alone)."""
    base, folder = wrap_base(decoder("llama")), tmp_path_factory.mktemp("adapters")
    made, asked = adapter_folder(folder, base), prompts(6)
    said = {(name, n): alone(base, made[name], asked[n], LONGEST)[0] for name in NAMES for n in range(6)}
    return base, folder, asked, said


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),  # the adapter
            st.integers(0, 5),  # the prompt
            st.integers(1, LONGEST),  # tokens asked for
            st.integers(0, 6),  # joins so many steps after the one before
            st.none() | st.integers(0, 12),  # is cancelled so many steps after that
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whoever_joins_and_leaves_each_answer_is_the_one_alone(place, plan):
    base, folder, asked, said = place
    engine = make_engine(base, folder)
    joins, cancels, at = {}, {}, 0
    for number, (adapter, prompt, count, after, until) in enumerate(plan):
        at += after
        joins.setdefault(at, []).append(Request(str(number), asked[prompt], NAMES[adapter], max_tokens=count))
        if until is not None:
            cancels.setdefault(at + until, []).append(str(number))
    events, step = {}, 0
    while engine.has_work or step <= max([*joins, *cancels]):
        for request in joins.get(step, []):
            engine.add_request(request)
        for name in cancels.get(step, []):
            engine.cancel(name)
        for event in engine.step():
            events.setdefault(event.request, []).append(event)
        step += 1
        assert step < 500
    for number, (adapter, prompt, count, _, until) in enumerate(plan):
        own, wanted = events[str(number)], said[NAMES[adapter], prompt][:count]
        finishes = [event.finish for event in own if event.finish]
        assert len(finishes) == 1
        if finishes == ["length"]:
            assert tokens_of(own) == wanted
        else:
            assert until is not None
            assert finishes == ["cancelled"]
            assert tokens_of(own) == wanted[: len(tokens_of(own))]
    stats = engine.stats()
    assert (stats.waiting, stats.running, sum(stats.requests.values())) == (0, 0, len(plan))
    assert all(engine.pool.info(name).users == 0 for name in engine.pool.names())


def test_logprobs_are_the_models_own(place):
    base, folder, asked, _ = place
    made = adapter_folder_of(place)
    engine = make_engine(base, folder)
    requests = [Request(str(n), asked[n], NAMES[n], max_tokens=5, logprobs=4) for n in range(4)]
    for n, result in enumerate(engine.generate(requests)):
        _, logits = alone(base, made[NAMES[n]], asked[n], 5)
        values, ids = logits.log_softmax(-1).topk(4)
        assert [[token for token, _ in one.top] for one in result.logprobs] == ids.tolist()
        ours = torch.tensor([[value for _, value in one.top] for one in result.logprobs])
        torch.testing.assert_close(ours, values, atol=1e-4, rtol=1e-4)
        assert [one.token for one in result.logprobs] == list(result.tokens)


def adapter_folder_of(place):
    base, folder, _, _ = place
    return {None: None} | {name: load_adapter(folder / name, base) for name in NAMES[1:]}


def test_seeds_repeat_whatever_else_runs(place):
    base, folder, asked, _ = place
    warm = {"temperature": 1.0, "max_tokens": 8}
    one = Request("one", asked[0], "a1", seed=5, **warm)
    others = [Request(f"o{n}", asked[n], NAMES[n % 4], **warm) for n in range(5)]
    lonely = make_engine(base, folder).generate([one])[0]
    crowded = make_engine(base, folder).generate([*others[:2], one, *others[2:]])[2]
    assert lonely == crowded
    again = make_engine(base, folder).generate([Request("two", asked[0], "a1", seed=6, **warm)])[0]
    assert again.tokens != lonely.tokens


@pytest.mark.parametrize("same", [True, False])
def test_a_known_prefix_is_not_computed_again(place, same):
    base, folder, _, _ = place
    made, prompt = adapter_folder_of(place), prompts(1, seed=4, longest=30)[0] + (5, 6, 7, 8)
    engine = make_engine(base, folder)
    engine.generate([Request("first", prompt, "a0", max_tokens=3)])
    asked = [(*prompt, 9, 11), prompt, prompt[:3]]
    adapter = "a0" if same else "a1"
    results = engine.generate([Request(str(n), one, adapter, max_tokens=6) for n, one in enumerate(asked)])
    for one, result in zip(asked, results, strict=True):
        assert result.tokens == alone(base, made[adapter], one, 6)[0]
    shared = len(prompt) + (len(prompt) - 1) + 2
    if same:
        assert engine.stats().reused_tokens == shared
    else:
        assert engine.stats().reused_tokens < shared  # of the first of these three alone


def test_files_that_changed_unseen_answer_with_keys_of_their_own(place, tmp_path):
    base, folder, asked, _ = place
    adapters = [load_adapter(folder / name, base) for name in ("a0", "a1")]
    wanted = [alone(base, one, asked[0], LONGEST)[0] for one in adapters]
    assert wanted[0] != wanted[1]
    save_adapter(adapters[0], tmp_path / "one")
    engine = make_engine(base, tmp_path, slots=1)
    requests = [Request(str(n), asked[0], "one", max_tokens=LONGEST) for n in range(2)]
    assert engine.generate(requests[:1])[0].tokens == wanted[0]
    assert engine.pool.shrink(0)  # another adapter needed the room
    save_adapter(adapters[1], tmp_path / "one", overwrite=True)
    assert engine.generate(requests[1:])[0].tokens == wanted[1]
    assert engine.stats().reused_tokens == 0


def test_a_mixture_is_the_weighted_sum(place):
    base, folder, asked, _ = place
    made = adapter_folder_of(place)
    mixed = combine([made["a0"], made["a2"]], [0.7, -0.4], Recipe(method="cat"))
    request = Request("m", asked[1], mixture=(("a0", 0.7), ("a2", -0.4)), max_tokens=8)
    other = Request("o", asked[1], "a0", max_tokens=8)
    results = make_engine(base, folder).generate([request, other])
    assert results[0].tokens == alone(base, mixed, asked[1], 8)[0] != results[1].tokens


def test_stop_tokens_and_the_context_end_answers(place):
    base, folder, asked, said = place
    wanted = said["a0", 2]
    engine = make_engine(base, folder)
    stop = wanted[3]
    at = wanted.index(stop)
    stopped, cut = engine.generate(
        [
            Request("s", asked[2], "a0", stop_ids=frozenset({stop})),
            Request("c", tuple(range(3, 47)), "a0"),  # 44 of 48 positions
        ]
    )
    assert (stopped.finish, stopped.tokens) == ("stop", wanted[:at])
    assert (cut.finish, len(cut.tokens)) == ("length", 4)


def test_texts_stream_as_the_tokenizer_has_them(tmp_path):
    base = text_base()
    adapter_folder(tmp_path, base, 1)
    engine = make_engine(base, tmp_path)
    prompt = tuple(tokenizer()("What has Ada bought?")["input_ids"])
    whole = engine.generate([Request("r", prompt, "a0", max_tokens=20)])[0]
    decoded = tokenizer().decode(whole.tokens, skip_special_tokens=True)
    assert whole.text == decoded.rstrip("\N{REPLACEMENT CHARACTER}")
    stop = whole.text[4:7]
    first = engine.generate([Request("r", prompt, "a0", max_tokens=20, stop=(stop,))])[0]
    assert (first.text, first.finish) == (whole.text[: whole.text.index(stop)], "stop")
    assert len(first.tokens) < 20


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request("r", (3,), "a9"), UnknownAdapter),
        (Request("r", (3,), mixture=(("a0", 1.0), ("zz", 1.0))), UnknownAdapter),
        (Request("r", tuple(range(3, 51))), PromptTooLong),
        (Request("r", (97,)), DataError),
        (Request("r", (-1,)), DataError),
        (Request("taken", (3,)), AdapterNameError),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(place, request_, error):
    engine = make_engine(*place[:2])
    engine.add_request(Request("taken", (5,), max_tokens=1))
    with pytest.raises(error):
        engine.add_request(request_)
    assert tokens_of(drained(engine)["taken"])


def test_a_full_queue_says_so_and_goes_on(place):
    engine = make_engine(*place[:2], slots=1, queue=2)
    for n in range(2):
        engine.add_request(Request(str(n), (5, 6), max_tokens=2))
    with pytest.raises(QueueFull):
        engine.add_request(Request("late", (5, 6), max_tokens=2))
    assert {name: events[-1].finish for name, events in drained(engine).items()} == {
        "0": "length",
        "1": "length",
    }


def test_a_cancelled_request_frees_its_slot_at_once(place):
    base, folder, asked, said = place
    engine = make_engine(base, folder, slots=1)
    engine.add_request(Request("first", asked[0], "a0"))
    engine.add_request(Request("second", asked[1], "a1", max_tokens=4))
    for _ in range(6):
        engine.step()
    engine.cancel("first")
    engine.cancel("nobody")
    events = engine.step()
    assert [(e.request, e.finish) for e in events if e.finish] == [("first", "cancelled")]
    assert engine.stats().running == 1
    assert tokens_of([*events[1:], *drained(engine)["second"]]) == said["a1", 1][:4]


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_model_that_the_runner_does_not_know_is_served_the_slow_way(name, tmp_path):
    base = wrap_base(tiny(name))
    made = adapter_folder(tmp_path, base, 2, target_modules=["c_attn" if name == "gpt2" else "q_proj"])
    engine, asked = make_engine(base, tmp_path), prompts(6)
    assert "not a model that it knows" in engine.slow
    requests = [Request(str(n), asked[n], [*made][n % 3], max_tokens=6) for n in range(6)]
    for n, result in enumerate(engine.generate(requests)):
        assert result.tokens == alone(base, made[[*made][n % 3]], asked[n], 6)[0]
    assert adapter_names(base.model) == []


def test_other_bases_and_budgets_that_hold_nothing_are_refused(place):
    with pytest.raises(BaseError, match="encoder"):
        Engine(wrap_base(tiny("bert")), AdapterPool(wrap_base(tiny("bert"))))
    base, folder, _, _ = place
    with pytest.raises(ConfigError, match="slots"):
        Engine(base, AdapterPool(base, folder), Limits(context=48, kv_and_adapter_bytes=1000))


def test_a_model_that_computes_something_else_is_not_served_the_fast_way(tmp_path):
    """The proof finds what the reading cannot see: a changed forward."""
    base = wrap_base(decoder("llama"))
    body = base.model.model
    own = type(body.norm)

    class Other(own):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 1.01

    Other.__module__ = own.__module__
    body.norm.__class__ = Other
    engine = Engine(base, AdapterPool(base), Limits(slots=2, context=32))
    assert "differ" in engine.slow
    assert engine.generate([Request("r", (3, 4), max_tokens=4)])[0].tokens == alone(base, None, (3, 4), 4)[0]
