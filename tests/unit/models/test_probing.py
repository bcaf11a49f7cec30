"""What adapters do to predictions: the divergences by hand, answers side by side, and a base left as it was."""

from dataclasses import replace

import pytest
import torch

from onebase.adapters.injection import adapter_names, injected
from onebase.config import LoraConfig, Sampling
from onebase.data.template import PromptFormat
from onebase.errors import BaseError, DataError
from onebase.models.base import wrap_base
from onebase.models.generation import generate
from onebase.models.probing import answers_of, divergences, effect_of, prompt_ids
from sickness import adapter
from texts import text_base
from tiny import tiny

PROMPTS = ("What has Ada bought?", "What has Ben bought? And why?")
CHAT = PromptFormat(chat=True)


def logits(base, ids, with_adapter=None):
    with injected(base.model, with_adapter), torch.no_grad():
        return base.model(input_ids=torch.tensor([ids])).logits[0].double()


def divergence(p, q):
    p, q = p.softmax(1), q.softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def test_divergences_are_those_of_the_logits():
    base = text_base()
    adapters = {"a": adapter(), "b": adapter(config=LoraConfig(rank=2, alpha=2), size=0.4)}
    forms = {"a": CHAT, "b": PromptFormat(separator="\n")}
    rows = {name: prompt_ids(base, PROMPTS, form) for name, form in forms.items()}
    found = divergences(base, adapters, rows)
    assert set(found) == {("base", "a"), ("base", "b"), ("a", "b")}
    by_hand = {
        ("base", "a"): [(logits(base, ids), logits(base, ids, adapters["a"])) for ids in rows["a"]],
        ("base", "b"): [(logits(base, ids), logits(base, ids, adapters["b"])) for ids in rows["b"]],
        ("a", "b"): [
            (logits(base, ids, adapters["a"]), logits(base, ids, adapters["b"]))
            for ids in (*rows["a"], *rows["b"])
        ],
    }
    for pair, outputs in by_hand.items():
        nats = torch.cat([divergence(p, q) for p, q in outputs])
        changed = torch.cat([p.argmax(1) != q.argmax(1) for p, q in outputs])
        assert found[pair].tokens == len(nats)
        assert found[pair].mean == pytest.approx(float(nats.mean()), rel=1e-4)
        assert found[pair].largest == pytest.approx(float(nats.max()), rel=1e-4)
        assert found[pair].changed == pytest.approx(float(changed.double().mean()))
        assert found[pair].mean > 0.01
    assert adapter_names(base.model) == []


def test_rows_that_both_ask_for_count_once():
    base = text_base()
    rows = prompt_ids(base, PROMPTS, CHAT)
    found = divergences(base, {"a": adapter(), "b": adapter(size=0.2)}, {"a": rows, "b": rows})
    assert {effect.tokens for effect in found.values()} == {sum(map(len, rows))}


def test_an_adapter_without_effect_has_exactly_none():
    base = text_base()
    made = adapter()
    idle = replace(made, lowrank={p: low._replace(B=low.B * 0) for p, low in made.lowrank.items()})
    assert effect_of(base, idle, PROMPTS)[1:] == (0.0, 0.0, 0.0)
    assert effect_of(base, made, PROMPTS).mean > 0.01


def test_nan_is_not_hidden():
    base, made = text_base(), adapter()
    low = {p: one._replace(B=one.B * float("inf")) for p, one in made.lowrank.items()}
    effect = effect_of(base, replace(made, lowrank=low), PROMPTS)
    assert effect.mean != effect.mean
    assert effect.largest != effect.largest


def test_the_base_is_left_as_it_was_when_a_call_fails():
    base = text_base()
    with pytest.raises(IndexError):
        divergences(base, {"a": adapter()}, {"a": [[10**6]]})
    assert adapter_names(base.model) == []


def test_prompts_that_cannot_be_tried():
    base = text_base()
    with pytest.raises(DataError, match=r"prompt 2: .* tokens, and the base takes 1 to 128"):
        prompt_ids(base, ["short", "word " * 300], CHAT)
    with pytest.raises(BaseError, match="of kind encoder"):
        prompt_ids(wrap_base(tiny("bert")), PROMPTS, CHAT)
    assert prompt_ids(wrap_base(tiny("llama")), PROMPTS, CHAT) == [list(range(1, 9))]


def test_answers_are_those_of_generation():
    base, made = text_base(), adapter()
    sampling = Sampling(max_new_tokens=5)
    found = answers_of(base, {"a": made}, PROMPTS, sampling)
    assert found["a"] == generate(base, PROMPTS, made, sampling)
    assert found["base"] == generate(base, PROMPTS, None, sampling)
    assert found["a"] != found["base"]
