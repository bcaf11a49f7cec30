# Sets up .venv and runs the demo, the checks and the tests. `make demo` and `make test` need nothing but Python 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test check lint types fast bench evidence clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/onebase demo

test: setup lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

check: setup lint types fast

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

fast: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not slow' tests/arch tests/unit

# Hours on an idle machine; see benchmarks/common.py. One alone: .venv/bin/python -m benchmarks.NAME
BENCHMARKS := train_throughput shared_prefix train_memory cold_start joint_training time_to_quality plan_error \
	variants merge unmerge_drift combine llama_parity decode mixed_decode adapter_load many_adapters serve_soak

bench: setup
	-$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	@failed=; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# What is missing of docs/evidence/rows.jsonl, hours on an idle machine; stopped and started again it goes on.
evidence: setup
	$(BIN)/python -m benchmarks.evidence run --quiet
	$(BIN)/python -m benchmarks.evidence render

clean:
	rm -rf $(VENV) build dist src/*.egg-info
