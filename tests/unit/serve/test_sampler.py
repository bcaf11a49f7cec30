"""Tokens from logits: the cuts, the draws, and that a request's draws are its own."""

import math
import random

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from onebase.errors import ConfigError
from onebase.serve.request import Request
from onebase.serve.sampler import Wish, sample, wish


def request(**options):
    return Request("r", (1,), **options)


def logits(rows=1, size=20, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def test_temperature_0_takes_the_likeliest():
    table = logits(4)
    assert [c.token for c in sample(table, [wish(request())] * 4)] == table.argmax(-1).tolist()


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.6}, {"top_p": 1e-9}, {"top_k": 99}]
)
def test_draws_follow_the_distribution_that_transformers_cuts(options):
    """Every chance in [0, 1) on a fine grid: how often a token comes is its probability."""

    class Grid(random.Random):
        at = 0

        def random(self):
            self.at += 1
            return (self.at - 0.5) / 4000

    row, temperature = logits(seed=3), 1.7
    scores = row / temperature
    if options.get("top_k"):
        scores = TopKLogitsWarper(min(options["top_k"], 20))(None, scores)
    if options.get("top_p"):
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    one = Wish(request(temperature=temperature, **options), Grid())
    counts = torch.zeros(20)
    for _ in range(4000):
        counts[sample(row, [one])[0].token] += 1
    assert (counts / 4000 - scores.softmax(-1)[0]).abs().max() < 1e-3
    assert not counts[scores[0] == -torch.inf].any()


def test_draws_depend_on_the_seed_and_not_on_the_neighbours():
    table = logits(3)
    asked = request(temperature=1.0, seed=7)
    one, other = wish(asked), wish(asked)
    noisy = [wish(request(temperature=0.5)), wish(request(temperature=2.0, top_k=3))]
    first = [sample(table[:1], [one])[0].token for _ in range(30)]
    second = [sample(table, [other, *noisy])[0].token for _ in range(30)]
    assert first == second
    assert len(set(first)) > 1
    assert first != [sample(table[:1], [wish(request(temperature=1.0, seed=8))])[0].token for _ in range(30)]


def test_a_temperature_near_0_is_the_likeliest_and_no_overflow():
    table = logits() * 1e4
    assert sample(table, [wish(request(temperature=1e-30))])[0].token == int(table.argmax())


def test_logprobs_are_of_the_logits_as_they_are():
    row = logits()
    choice = sample(row, [wish(request(temperature=2.0, top_k=2, seed=1, logprobs=3))])[0]
    logs = row[0].log_softmax(-1)
    assert choice.logprob.token == choice.token
    assert math.isclose(choice.logprob.logprob, float(logs[choice.token]), rel_tol=1e-6)
    assert choice.logprob.top == tuple((int(n), float(logs[n])) for n in logs.argsort(descending=True)[:3])
    assert sample(row, [wish(request(logprobs=0))])[0].logprob.top == ()
    assert sample(row, [wish(request())])[0].logprob is None


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": ()},
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"logprobs": 21},
        {"stop": ("",)},
        {"mixture": (("a", math.inf),)},
        {"mixture": (("a", 1.0),), "adapter": "b"},
    ],
)
def test_a_request_out_of_range_is_refused(options):
    with pytest.raises(ConfigError):
        Request(**{"id": "r", "prompt": (1,), **options})
