"""What the tests of serving share: tiny adapters in a folder, an engine for them, and answers made the plain way."""

import torch

from adapters import trained
from onebase.adapters.injection import injected
from onebase.config import LoraConfig
from onebase.models.base import wrap_base
from onebase.serve.engine import Engine
from onebase.serve.pool import AdapterPool
from onebase.serve.request import Limits, Request
from onebase.storage.format import save_adapter

RANKS = (4, 2, 8)


def adapter_folder(folder, base, count=3, **options):
    """Adapters a0, a1 ... of several ranks in a folder; gives them by name, with None for the base."""
    made = {None: None}
    for number in range(count):
        config = LoraConfig(**{"rank": RANKS[number % 3], "alpha": 8, **options})
        made[f"a{number}"] = trained(base.model, config, seed=number)
        save_adapter(made[f"a{number}"], folder / f"a{number}")
    return made


def make_engine(base, folder, **limits):
    """An engine with few small slots."""
    return Engine(
        base, AdapterPool(base, folder), Limits(**{"slots": 3, "context": 48, "prefill_chunk": 4, **limits})
    )


def prompts(count, longest=14, vocabulary=90, seed=0):
    """Random prompts of several lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [tuple(torch.randint(3, vocabulary, (length,), generator=draw).tolist()) for length in lengths]


def alone(base, adapter, prompt, count):
    """(the greedy tokens, their logits (count, vocabulary)): the whole text through the model's forward, each time."""
    ids, logits = list(prompt), []
    with torch.no_grad(), injected(base.model, adapter):
        for _ in range(count):
            logits.append(base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    return tuple(ids[len(prompt) :]), torch.stack(logits)


def drained(engine):
    """All events until nothing is left to do, by request."""
    found = {}
    while engine.has_work:
        for event in engine.step():
            found.setdefault(event.request, []).append(event)
    return found


def tokens_of(events):
    """A request's tokens."""
    return tuple(token for event in events for token in event.tokens)


__all__ = [
    "Request",
    "adapter_folder",
    "alone",
    "drained",
    "make_engine",
    "prompts",
    "tokens_of",
    "wrap_base",
]
