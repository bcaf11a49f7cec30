"""Two adapters on one base at once, switched for a call or for each row: `python examples/swap_adapters.py [BASE]`."""

import sys
import tempfile
from pathlib import Path

import torch

import onebase

REVIEWS = Path(__file__).with_name("reviews.jsonl")

base = onebase.load_base(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", dtype="float32")
model = base.model
ids = base.tokenizer("Is this review positive or negative? It rattles.", return_tensors="pt").input_ids

# Two adapters that differ in their seed and rank. Training leaves the base as it was.
options = {"data": str(REVIEWS), "holdout": 0, "max_steps": 4, "batch_size": 4, "lr": 5e-3, "samples": 0}
with tempfile.TemporaryDirectory() as place:
    first = onebase.train(base, output=f"{place}/first", rank=4, seed=1, **options).adapter
    second = onebase.train(base, output=f"{place}/second", rank=8, seed=2, **options).adapter


@torch.no_grad()
def logits(ids: torch.Tensor) -> torch.Tensor:
    """Logits of each row's last token: (rows, vocabulary)."""
    return model(ids).logits[:, -1]


plain = logits(ids)
onebase.inject(model, first, "first")
onebase.inject(model, second, "second")

with onebase.use(model, "first"):
    by_first = logits(ids)
with onebase.use(model, "second"):
    by_second = logits(ids)
with onebase.use(model, None):  # the plain base
    assert torch.equal(logits(ids), plain)

# One batch, each row with its own adapter: the rows get what they get alone.
with onebase.use(model, ["first", "second", None]):
    mixed = logits(ids.repeat(3, 1))
for row, alone in zip(mixed, (by_first, by_second, plain), strict=True):
    torch.testing.assert_close(row, alone[0], rtol=1e-4, atol=1e-4)

onebase.eject(model)
assert torch.equal(logits(ids), plain)
print(f"first moves the logits by up to {(by_first - plain).abs().max():.3f}")
print(f"second moves the logits by up to {(by_second - plain).abs().max():.3f}")
print("a mixed batch gives each row what its adapter gives alone; after eject, the base is the same bits")
