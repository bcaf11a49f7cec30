"""Training speed where rows share prompts: E2E's 8.5 references a prompt, grouped, each prompt computed once.

As in train_throughput.py, but the rows of a prompt stand in one batch, of which onebase's trie makes one prefix and its
continuations. `ours_unshared` is the same engine without sharing: what is left of the gain then comes from the rest.
The bound is that of the products which remain after sharing.
"""

from __future__ import annotations

import argparse

from benchmarks.common import parser
from benchmarks.train_throughput import compare_speed, speed_options
from benchmarks.workload import grouped

NAME = "shared_prefix"
PEERS = ("peft", "peft_tuned")
TARGET = {"peft": 4.0, "peft_tuned": 2.2}


def main(given: argparse.Namespace) -> None:
    compare_speed(NAME, given, grouped, ("ours_shared", "ours_unshared", *given.peers), TARGET)


if __name__ == "__main__":
    main(speed_options(parser(__doc__, runs=5), PEERS).parse_args())
