# Sets up .venv and runs the demo, the checks and the tests. `make demo` and `make test` need nothing but Python 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test check lint types fast clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/onebase demo

test: setup lint types
	$(BIN)/pytest

check: setup lint types fast

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

fast: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not slow'

clean:
	rm -rf $(VENV) build dist src/*.egg-info
