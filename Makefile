# Everything happens in .venv. A second run skips what is done: the stamps are newer than the files they depend on.

PYTHON ?= python3
BIN := .venv/bin
# Two test processes with one thread each; torch would otherwise start a thread per core in each of them.
TEST_PROCESSES ?= 2

RUN := .venv/.installed-to-run
DEV := .venv/.installed-to-develop

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-long test-faults test-fuzz lint format types bench clean

help:
	@echo "make quickstart   set up, then train a small chat model from nothing"
	@echo "make test         set up, then run the tests"
	@echo "make test-long    run the tests that take minutes"
	@echo "make test-faults  kill, starve and damage runs, and count what is lost (about half an hour)"
	@echo "make test-fuzz    load 105,000 damaged files; takes a quarter of an hour"
	@echo "make lint         check style and types"
	@echo "make format       put the code into its format"
	@echo "make types        check types only"
	@echo "make bench        measure training and decoding speed"
	@echo "make clean        remove caches and build files; .venv stays"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is missing or older than 3.10; set another: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv .venv

$(RUN): requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(DEV): requirements-dev.txt $(RUN)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

quickstart: $(RUN)
	$(BIN)/tinylm quickstart

test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) -m "not long"

test-long: $(DEV)
	$(BIN)/python -m pytest -q -m long

# Forms for `make test` and long ones alike. FAULTS_SEED=N repeats the soak of a run that printed it.
test-faults: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults -m "long or not long" -rs

test-fuzz: $(DEV)
	$(BIN)/python -m tests.fuzz.run --cases 105000 --seed 0

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tinylm

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV)
	$(BIN)/mypy tinylm

bench: $(DEV)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find tinylm tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
