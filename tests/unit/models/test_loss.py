"""The loss of a batch against the plain definition: log-softmax of every token, one row at a time."""

import pytest
import torch
from torch import nn

from onebase.data.pack import pack, pad
from onebase.data.template import Encoded
from onebase.models.loss import loss_sum
from onebase.models.packing import packed_attention
from tiny import tiny

ROWS = [
    Encoded(1, [5, 9, 33, 4, 60, 2], [False, False, False, True, True, True]),
    Encoded(2, [7, 8], [False, True]),
    Encoded(3, [11, 12, 13, 14, 15, 16, 17, 18, 2], [False, True, False, True] * 2 + [True]),
]
NO_TARGET = Encoded(4, [3, 4, 5], [False] * 3)
ARCHS = ("llama", "gpt2", "gemma3", "qwen3")


def plainly(model, rows):
    """Summed -log p of the targets, in float64 from the logits on."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
        for place in range(1, len(row.ids)):
            if row.loss[place]:
                total -= float(logits[place - 1].log_softmax(-1)[row.ids[place]])
                count += 1
    return total, count


class AllLogits(nn.Module):
    """A model that cannot leave logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, use_cache):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )


@pytest.mark.parametrize("wrap", [lambda model: model, AllLogits], ids=["kept", "all"])
@pytest.mark.parametrize("arch", ARCHS)
def test_padded_and_packed_equal_the_definition(arch, wrap):
    model = tiny(arch)
    expected, count = plainly(model, ROWS)
    with torch.no_grad():
        padded = loss_sum(wrap(model), pad(ROWS, 0))
        with packed_attention(model):
            packed = loss_sum(wrap(model), pack(ROWS))
    assert padded[1] == packed[1] == count == 9
    assert float(padded[0]) == pytest.approx(expected, rel=1e-5)
    assert float(packed[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [[NO_TARGET], [NO_TARGET, NO_TARGET]])
def test_no_target_gives_zero(rows):
    model = tiny("llama")
    with packed_attention(model):
        assert [
            (float(loss), count)
            for loss, count in (loss_sum(model, pack(rows)), loss_sum(model, pad(rows, 0)))
        ] == [
            (0.0, 0),
            (0.0, 0),
        ]


def test_padding_and_pad_id_change_nothing():
    model = tiny("llama")
    losses = {
        round(float(loss_sum(model, pad([*ROWS, *more], pad_id))[0]), 3)
        for pad_id in (0, 2, 40)
        for more in ([], [NO_TARGET])
    }
    assert len(losses) == 1


def test_half_precision_is_summed_in_float32():
    model = tiny("llama").bfloat16()
    loss, _ = loss_sum(model, pad(ROWS * 30, 0))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(30 * float(loss_sum(model, pad(ROWS, 0))[0]), rel=1e-3)
