"""The gate of every speed claim: on the same rows the engine's loss and gradients are PEFT's, family by family."""

import copy

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from adapters import trained
from decoders import DECODERS, decoder, gradients, some_layout
from onebase.adapters.injection import inject, trainable
from onebase.config import LoraConfig
from onebase.models.engine import Engine
from onebase.storage.format import save_adapter

LOSS, GRADIENT = 1e-5, 1e-4  # relative, in float32
# A prompt with three answers, one of which two rows continue; a prompt with two; a row alone.
NODES = [
    (0, 9, -1),
    (9, 4, 0),
    (13, 6, 0),
    (19, 3, 2),
    (22, 5, 2),
    (27, 3, 0),
    (30, 7, -1),
    (37, 4, 6),
    (41, 6, 6),
    (47, 12, -1),
]
VARIANTS = {
    "lora": {"rank": 4, "alpha": 8},
    "rslora": {"rank": 4, "alpha": 4, "rslora": True},
    "patterns": {
        "rank": 4,
        "alpha": 8,
        "rank_pattern": {r"layers\.0\..*": 2},
        "alpha_pattern": {"down_proj": 3.0},
    },
}


def peft_loss(model, rows):
    """The loop that users of PEFT write: right padding, labels of -100, the sum over the tokens."""
    width = max(len(ids) for ids, _ in rows)
    ids, mask, labels = torch.zeros(len(rows), width).long(), torch.zeros(len(rows), width).long(), []
    for number, (row, loss) in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
        labels.append(torch.full((width,), -100).index_copy_(0, loss.nonzero()[:, 0], row[loss]))
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    wanted = torch.stack(labels)[:, 1:]
    return cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_gradients_are_pefts(name, variant, tmp_path):
    model = decoder(name)
    adapter = trained(model, LoraConfig(**VARIANTS[variant]))
    save_adapter(adapter, tmp_path / "a")
    peer = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a", is_trainable=True).eval()
    packed, rows = some_layout(NODES, every_node=False)
    theirs = peft_loss(peer, rows)
    their_gradients = gradients(theirs, {n: p for n, p in peer.named_parameters() if p.requires_grad})

    inject(model, adapter)
    parameters = trainable(model, "default")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    ours = Engine(model, "default").loss(packed, checkpoint=variant == "patterns")
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=LOSS)
    found = gradients(ours, parameters)
    assert len(found) == len(their_gradients) > 0
    whole = sum(float(gradient.square().sum()) for gradient in their_gradients.values()) ** 0.5
    for key, gradient in found.items():
        path, side = key.rsplit(".", 1)
        (expected,) = [g for n, g in their_gradients.items() if f"{path}.lora_{side}." in n]
        assert float((gradient - expected).norm()) <= GRADIENT * max(float(expected.norm()), 1e-3 * whole), (
            key
        )
        assert float(expected.norm()) > 1e-4
