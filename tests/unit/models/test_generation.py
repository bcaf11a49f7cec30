"""Answers: a batch gives each prompt what transformers' own `generate` gives it alone."""

import pytest
import torch

from adapters import trained
from onebase.adapters.adapter import Origin
from onebase.adapters.injection import injected
from onebase.config import LoraConfig, Sampling
from onebase.data.read import Example
from onebase.data.template import PromptFormat
from onebase.errors import BaseError, DataError
from onebase.models.base import wrap_base
from onebase.models.generation import answers, format_of, generate, generate_ids
from texts import text_base, text_model, tokenizer
from tiny import tiny

PROMPTS = [[5, 9, 33], list(range(20, 31)), [7], [60, 61, 62, 63, 64, 65], [8, 8]]
GREEDY = Sampling(max_new_tokens=7, batch_size=16)


def alone(model, prompt, new_tokens=7, stops=()):
    """Greedy generation of one prompt, written out: the likeliest next token, again and again."""
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def base():
    return text_base()


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_a_batch_answers_as_each_prompt_alone(arch, batch_size):
    base = wrap_base(tiny(arch))
    sampling = Sampling(max_new_tokens=7, batch_size=batch_size)
    found = list(generate_ids(base, PROMPTS, sampling))
    assert found == [alone(base.model, prompt, 7, base.stop_ids) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in found}) > 2
    theirs = base.model.generate(
        torch.tensor([PROMPTS[1]]), max_new_tokens=7, do_sample=False, pad_token_id=0
    )
    assert found[1] == [
        token for token in theirs[0, len(PROMPTS[1]) :].tolist() if token not in base.stop_ids
    ]


def test_an_adapter_changes_the_answers_and_goes_again(base):
    adapter = trained(base.model, LoraConfig(rank=4, alpha=8))
    texts = ["What has Ada bought?", "Hi"]
    plain = generate(base, texts, None, GREEDY)
    tuned = generate(base, texts, adapter, GREEDY)
    assert tuned != plain
    form = PromptFormat(chat=True)
    with injected(base.model, adapter):
        messages = [[{"role": "user", "content": text}] for text in texts]
        ids = [
            tokenizer().apply_chat_template(m, add_generation_prompt=True, return_dict=False)
            for m in messages
        ]
        by_hand = [
            tokenizer().decode(alone(base.model, p, 7, base.stop_ids), skip_special_tokens=True) for p in ids
        ]
    assert tuned == by_hand
    assert generate(base, texts, None, GREEDY) == plain
    assert generate(base, texts[0], adapter, GREEDY, form) == tuned[:1]


def test_the_prompt_is_rendered_as_in_training(base):
    """Stored format first, then the chat template, then the bare text."""
    chat, plain = PromptFormat(chat=True, system="Be brief."), PromptFormat(separator=" => ")
    adapter = trained(base.model, LoraConfig(rank=2))
    for form in (chat, plain):
        stored = type(adapter)(adapter.config, adapter.lowrank, {}, Origin(prompt=form.as_dict()))
        assert format_of(base, stored) == form
    assert format_of(base, None) == format_of(base, adapter) == PromptFormat(chat=True)
    assert format_of(wrap_base(tiny("llama")), None) == PromptFormat()
    rows = [Example(1, prompt="A", completion="?"), Example(2, prompt="BB", completion="?")]
    ids = [tokenizer()(f"{row.prompt} => ")["input_ids"] for row in rows]
    expected = [
        tokenizer().decode(alone(base.model, p, 7, base.stop_ids), skip_special_tokens=True) for p in ids
    ]
    assert answers(base, rows, plain, GREEDY) == expected


def test_stop_ids_are_cut_off(base):
    """The token that the model likes best at some place is made a stop token: the answer ends before it."""
    model = tiny("llama")
    free = alone(model, PROMPTS[1])
    stop = free[3]
    model.generation_config.eos_token_id = [stop]
    stopped = wrap_base(model)
    assert stop in stopped.stop_ids
    found = list(generate_ids(stopped, PROMPTS, GREEDY))
    assert found[1] == free[: free.index(stop)]
    assert not any(stop in answer for answer in found)


def test_a_prompt_that_fills_the_context_is_an_error(base):
    assert base.context == 128
    with pytest.raises(DataError, match=r"prompt 2: 128 tokens, and the base takes 128, answer included"):
        list(generate_ids(base, [[5], [5] * 128], GREEDY))
    (last,) = generate_ids(base, [[5] * 127], GREEDY)
    assert len(last) <= 1


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_long_prompt_takes_no_room_from_the_others(arch):
    """Near the end of the context a long prompt leaves few tokens; a short one in the same call has them all."""
    sizes = {"llama": {"max_position_embeddings": 20}, "gpt2": {"n_positions": 20}}[arch]
    model = tiny(arch)
    for name, value in sizes.items():
        setattr(model.config, name, value)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    base = wrap_base(model)
    assert base.context == 20
    prompts = [[5, 6], list(range(30, 47)), [9, 9, 9], list(range(40, 55))]
    found = list(generate_ids(base, prompts, GREEDY))
    assert [len(answer) for answer in found] == [7, 3, 7, 5]
    assert found == [alone(model, p, n) for p, n in zip(prompts, [7, 3, 7, 5], strict=True)]


def test_sampling_is_seeded_and_leaves_the_random_state_alone(base):
    def sample(**options):
        return list(generate_ids(base, PROMPTS, Sampling(max_new_tokens=8, temperature=1.5, **options)))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample(seed=3) == first
    assert sample(seed=4) != first
    assert first != list(generate_ids(base, PROMPTS, Sampling(max_new_tokens=8)))
    greedy = list(generate_ids(base, PROMPTS, Sampling(max_new_tokens=8)))
    assert sample(top_k=1) == greedy  # the likeliest alone is left
    assert sample(top_p=1e-6) == greedy


def test_greedy_is_greedy_whatever_the_model_suggests():
    """Many models ship a generation_config.json that asks for sampling."""
    model = text_model()
    expected = list(generate_ids(wrap_base(model, tokenizer()), PROMPTS, GREEDY))
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=40, top_p=0.9, max_length=4)
    assert list(generate_ids(wrap_base(model, tokenizer()), PROMPTS, GREEDY)) == expected


def test_text_comes_as_it_is_made(base):
    parts = []
    prompt = tokenizer()("What has Ada bought?")["input_ids"]
    (ids,) = generate_ids(base, [prompt], Sampling(max_new_tokens=20), parts.append)
    assert "".join(parts) == tokenizer().decode(ids, skip_special_tokens=True)
    assert len(parts) > 1


def test_a_base_without_text_is_an_error():
    with pytest.raises(BaseError, match="generate with in-memory"):
        generate(wrap_base(tiny("llama")), "Hi")
    with pytest.raises(BaseError, match="kind encoder"):
        generate(wrap_base(tiny("bert"), tokenizer=None), "Hi")


def test_the_heads_product_needs_no_copies_of_the_head(base):
    """A slice with gaps between its rows would make torch copy the weight for each row of a batch."""
    shapes = []

    def watch(module, inputs, output):
        shapes.append((tuple(inputs[0].shape), inputs[0].is_contiguous()))

    hook = base.model.lm_head.register_forward_hook(watch)
    try:
        list(generate_ids(base, PROMPTS, Sampling(max_new_tokens=2)))
    finally:
        hook.remove()
    assert shapes == [((len(PROMPTS), 1, 32), True)] * 2
