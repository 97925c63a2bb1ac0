# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv when it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check setup bench-training
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# One thread: the embedded models are so small that a second one costs more than it brings, and 5 x on a busy machine.
demo: setup
	OMP_NUM_THREADS=1 $(BIN)/vlmdefend evaluate --attack pgd

# Processes in place of threads, for the same reason.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Hours; `benchmarks/training.py step` takes minutes.
bench-training: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training.py table
