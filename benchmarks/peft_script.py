"""A script as users of transformers and peft write it, up to its first optimiser step; for cold_start.py.

Arguments: base folder, rows (JSONL with prompt and completion), batch size, rank, dtype. Prints the step's loss and the
time at its end. It imports nothing but what it needs, and does no work that the step does not need.
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def encode(tokenizer, rows):
    """Ids and labels: the completion and the end of text carry loss."""
    prompts = tokenizer([f"{row['prompt']}\n" for row in rows])["input_ids"]
    texts = tokenizer([f"{row['prompt']}\n{row['completion']}{tokenizer.eos_token}" for row in rows])[
        "input_ids"
    ]
    return [(ids, [-100] * len(p) + ids[len(p) :]) for p, ids in zip(prompts, texts, strict=True)]


def padded(rows):
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }


def main(base, data, batch_size, rank, dtype):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    config = LoraConfig(
        r=int(rank), lora_alpha=2 * int(rank), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    rows = encode(tokenizer, [json.loads(line) for line in Path(data).read_text().splitlines()])
    random.Random("0:0").shuffle(
        rows
    )  # onebase's order of a first epoch: both sides' first batch is the same
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.0
    )
    loss = model(**padded(rows[: int(batch_size)])).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    print(json.dumps({"loss": float(loss), "done": time.time()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
