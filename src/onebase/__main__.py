"""`python -m onebase`: the command line, as torchrun starts it."""

from __future__ import annotations

from onebase.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
