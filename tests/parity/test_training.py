"""The same start, rows and settings: a run gives the losses and the adapter that a plain loop over PEFT gives."""

import copy
import random

import pytest
import torch
from peft import PeftModel

from onebase.adapters.injection import extract, inject, new_adapter, trainable, use
from onebase.config import LoraConfig, OptimConfig
from onebase.data.pack import step_rows
from onebase.data.template import Encoded
from onebase.models.scoring import packed_loss, padded_loss
from onebase.storage.format import read_adapter, save_adapter
from onebase.training.optim import lr_factor, make_optimizer, set_lr
from onebase.training.step import train_step
from tiny import tiny

ARCHS = ("llama", "gpt2", "qwen3", "gemma3")
STEPS, CLIP = 8, 0.5
OPTIM = OptimConfig(
    lr=3e-3,
    lora_plus=4,
    weight_decay=0.01,
    beta1=0.8,
    eps=1e-6,
    batch_size=2,
    accumulate=2,
    warmup=2,
    clip=CLIP,
)


def rows(count=16):
    chance = random.Random(0)
    made = []
    for number in range(count):
        length = chance.randint(4, 12)
        ids = [chance.randint(3, 95) for _ in range(length)]
        made.append(Encoded(number, ids, [False] * (length // 3 + 1) + [True] * (length - length // 3 - 1)))
    return made


def schedule():
    """Linear warm-up over two steps, then linear to zero: written out, not taken from the code under test."""
    return [1 / 3, 2 / 3, *(1 - way / (STEPS - 2) for way in range(STEPS - 2))]


def micro_batches():
    data = rows()
    for step in range(STEPS):
        yield [[data[index] for index in batch] for batch in step_rows(len(data), 2, 2, 0, step)]


def ours(model, adapter, packed):
    """Our step, batch for batch; the losses and the adapter at the end."""
    inject(model, adapter)
    parameters = trainable(model, "default")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = make_optimizer(parameters, OPTIM)
    loss = packed_loss(model) if packed else padded_loss(model, 0)
    results = []
    for step, batches in enumerate(micro_batches()):
        set_lr(optimizer, lr_factor(step, STEPS, OPTIM))
        with use(model):
            results.append(train_step(loss, parameters, optimizer, batches, CLIP))
    return [result.loss for result in results], [result.grad_norm for result in results], extract(model)


def adamw(model):
    """A plain AdamW with LoRA+'s two rates: B learns four times as fast."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "lora_A" in name], "lr": 3e-3},
        {"params": [p for name, p in named if "lora_B" in name], "lr": 4 * 3e-3},
    ]
    assert sum(len(group["params"]) for group in groups) == len(named) > 0
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.999), eps=1e-6, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule().__getitem__)


def theirs(model):
    """The loop that users of PEFT write: right padding, labels of -100, the sum over the step's tokens."""
    optimizer, scheduler = adamw(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, norms = [], []
    for step, batches in enumerate(micro_batches()):
        count, total = sum(sum(row.loss) for batch in batches for row in batch), 0.0
        optimizer.zero_grad()
        for batch in batches:
            width = max(len(row.ids) for row in batch)
            ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in batch])
            mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in batch])
            carries = torch.tensor([row.loss + [False] * (width - len(row.loss)) for row in batch])
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            labels = ids.masked_fill(~carries, -100)[:, 1:]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / count).backward()
            total += float(loss.detach()) / count
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        if step + 1 < STEPS:
            scheduler.step()
    return losses, norms


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_run_equals_a_plain_loop_over_peft(arch, packed, tmp_path):
    model = tiny(arch)
    adapter = new_adapter(model, LoraConfig(rank=4, alpha=8), seed=1)
    save_adapter(adapter, tmp_path / "start")
    peer = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "start", is_trainable=True).eval()
    peer_losses, peer_norms = theirs(peer)
    losses, norms, trained = ours(model, adapter, packed)
    assert losses == pytest.approx(peer_losses, rel=1e-5)
    assert norms == pytest.approx(peer_norms, rel=1e-3)
    assert losses[-1] < losses[0] - 0.05  # it learned, so equal is not merely unchanged
    assert max(norms) > CLIP  # and clipping took part

    peer.save_pretrained(tmp_path / "end")
    expected, found = read_adapter(tmp_path / "end").tensors(), trained.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)
        assert not torch.equal(tensor, adapter.tensors()[name])


def test_the_schedule_is_the_plain_one():
    assert [lr_factor(step, STEPS, OPTIM) for step in range(STEPS)] == pytest.approx(schedule())
