"""Greedy decoding of one prompt with llama.cpp, for decode.py; needs llama-cpp-python and numpy alone.

Takes one JSON object: model, prompt (token ids), count, threads. Prints another: tokens, tokens_per_second (after the
first one).
"""

import json
import sys
import time

import llama_cpp
import numpy as np


def main(task):
    prompt, count, threads = task["prompt"], task["count"], task["threads"]
    room = {"n_ctx": max(len(prompt) + count, 64), "n_threads": threads, "n_threads_batch": threads}
    model = llama_cpp.Llama(task["model"], **room, verbose=False)
    for _ in range(2):  # the first time is a warm-up
        model.reset()
        found, new, start = [], list(prompt), 0.0
        while len(found) < count:
            model.eval(new)
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            new = [int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())]
            found += new
            start = start or time.perf_counter()
        seconds = time.perf_counter() - start
    print(json.dumps({"tokens": found, "tokens_per_second": (count - 1) / seconds}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
