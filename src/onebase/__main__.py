"""`python -m onebase`: the command line, as torchrun starts it."""

from __future__ import annotations

import os

from onebase.cli.main import load, main

if __name__ == "__main__":
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun; a plain run need not import torch here
        load("onebase.training.distributed").leave(code)
    raise SystemExit(code)
