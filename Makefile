# Two commands: `make demo` and `make test`. Each sets up .venv by itself. CI also runs `make test-slow`.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(8, os.cpu_count() or 2))")

.PHONY: demo test test-slow check clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/ready

demo: .venv/ready
	$(BIN)/streamprune demo

# A thread per process: two processes that each start two would wait for each other. Work is stolen, not dealt out, so that
# the tests of a module stay together and share what it makes once.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

# What takes longest: kills at many commits, kernels for every card, the real model, the wheel.
test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow

# Lint, format and types.
check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info
