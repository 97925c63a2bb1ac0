# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv when it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: the embedded models are so small that a second one costs more than it brings, and 5 x on a
# busy machine. Tests run in processes instead.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal
# The promises most often broken, for the edit loop: names, options, imports, contracts, one cell, one record.
FAST := tests/test_registry.py tests/test_types.py tests/test_imports.py tests/test_architecture.py tests/test_public.py \
	tests/cli/test_help.py tests/cli/test_main.py tests/cli/test_list_defenses.py tests/published tests/attacks/test_contract.py \
	tests/evaluation/store tests/evaluation/statistics tests/training/settings tests/training/loop/test_loop.py tests/reporting

.PHONY: demo test test-fast test-numerics check setup bench-training
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -m venv $(VENV)
	@PIP_ROOT_USER_ACTION=ignore $(BIN)/pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup
	OMP_NUM_THREADS=1 $(BIN)/vlmdefend evaluate --attack pgd

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) $(FAST)

# Tests whose outcome could rest on the last bits of one processor's floats, on the instruction sets of older ones.
test-numerics: setup
	ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m numerics
	ATEN_CPU_CAPABILITY=default $(PYTEST) -m numerics

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Hours; `python -m benchmarks.quality.training step` takes minutes.
bench-training: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.training table
