"""Greedy decoding with llama.cpp, for llama_parity.py; needs llama-cpp-python and numpy alone.

Takes one JSON object: model, lora, prompts (token ids), count, output. Cache in float32, one thread.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama

FLOAT32 = 0  # ggml's number for it


def main(task):
    room = max(map(len, task["prompts"])) + task["count"]
    files = {"model_path": task["model"], "lora_path": task["lora"]}
    cache = {"n_ctx": max(room, 64), "type_k": FLOAT32, "type_v": FLOAT32, "logits_all": True}
    model = Llama(**files, **cache, n_threads=1, n_threads_batch=1, verbose=False)
    found = {}
    for number, prompt in enumerate(task["prompts"]):
        model.reset()
        ids, rows, new = list(prompt), [], list(prompt)
        for _ in range(task["count"]):
            model.eval(new)
            rows.append(np.array(model.scores[len(ids) - 1]))
            new = [int(rows[-1].argmax())]
            ids += new
        found[f"tokens{number}"] = np.array(ids[len(prompt) :])
        found[f"logits{number}"] = np.stack(rows)
    np.savez(task["output"], **found)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
