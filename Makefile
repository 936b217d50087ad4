# Everything happens in .venv, test-oldest in .venv-oldest and test-transformers in .venv-transformers4. A second run
# skips what is done: the stamps are newer than the files they depend on.

PYTHON ?= python3
BIN := .venv/bin
# Two test processes with one thread each; torch would otherwise start a thread per core in each of them. The tests of
# a file stay together, since many share one run; the files keep their order, in which the long ones are not last.
TEST_PROCESSES ?= 2
PARALLEL := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

RUN := .venv/.installed-to-run
DEV := .venv/.installed-to-develop
OLDEST := .venv-oldest/.installed
TRANSFORMERS4 := .venv-transformers4/.installed

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-long test-oldest test-transformers test-faults test-fuzz test-gpu lint format types bench clean

help:
	@echo "make quickstart   set up, then train a small chat model from nothing"
	@echo "make test         set up, then run the tests (about eight minutes on two cores)"
	@echo "make test-long    run the tests that take minutes; on a machine with nothing else to do"
	@echo "make test-oldest  run the tests with the oldest versions that pyproject.toml allows, in .venv-oldest"
	@echo "make test-transformers  run the tests that use transformers and PEFT with transformers 4, in .venv-transformers4"
	@echo "make test-faults  kill, starve and damage runs, and count what is lost (about half an hour)"
	@echo "make test-fuzz    load 105,000 damaged files; takes a quarter of an hour"
	@echo "make test-gpu     run the tests that need a CUDA GPU, with PYTHON and the packages it has (minutes)"
	@echo "make lint         check style and types"
	@echo "make format       put the code into its format"
	@echo "make types        check types only"
	@echo "make bench        measure speed beside transformers (ten minutes); figures in bench.json"
	@echo "make clean        remove caches and build files; .venv, .venv-oldest and .venv-transformers4 stay"

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) -m "not long and not gpu"

test-long: $(DEV)
	$(BIN)/python -m pytest -q -m long

$(OLDEST): pyproject.toml tests/oldest_versions.py $(DEV)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	$(BIN)/python tests/oldest_versions.py > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# All but the test whose subject is the newer versions of requirements.txt.
test-oldest: $(OLDEST)
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q $(PARALLEL) -m "not long and not gpu" -k "not pip_reads_the_requirements"

# The last transformers 4, and the versions of its own parts that fit it; all else as in .venv.
$(TRANSFORMERS4): pyproject.toml requirements.txt requirements-dev.txt Makefile
	test -x .venv-transformers4/bin/python || $(PYTHON) -m venv .venv-transformers4
	grep -hvE '^(-r |transformers|tokenizers|huggingface_hub)' requirements.txt requirements-dev.txt \
		> .venv-transformers4/requirements.txt
	.venv-transformers4/bin/python -m pip install --quiet --disable-pip-version-check \
		-r .venv-transformers4/requirements.txt transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
	.venv-transformers4/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# Every file of tests that names one of them, but those of the benchmark: its compiled step warns in transformers 4.
test-transformers: $(TRANSFORMERS4)
	OMP_NUM_THREADS=1 .venv-transformers4/bin/python -m pytest -q $(PARALLEL) -m "not long and not gpu" \
		$$(grep -rlE 'transformers|peft|reference_of' --include='test_*.py' tests | grep -v bench | sort)

# Forms for `make test` and long ones alike. FAULTS_SEED=N repeats the soak of a run that printed it.
test-faults: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults -m "long or not long" -rs

test-fuzz: $(DEV)
	$(BIN)/python -m tests.fuzz.run --cases 105000 --seed 0

# Rented GPU machines come with a torch of their own, built for their driver: PYTHON uses it, and nothing is installed.
# Warnings are shown, not errors: the versions there are not those of requirements.txt.
test-gpu:
	$(PYTHON) -m pytest -q -W default -p no:cacheprovider --durations=5 tests/gpu

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
	$(BIN)/tinylm bench

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find tinylm tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
