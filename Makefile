# make demo    generates images of PROMPT with the shipped bundle, in out/
# make test    the whole test suite
# make lint    ruff and mypy
# make check   test and lint
# make test-oldest   the whole test suite on Python 3.11 and the oldest release of everything (tests/oldest.txt)
# make mutants       plants small faults for ten minutes and counts how many the tests notice (docs/testing.md)
#
# Each makes the environment it needs first, in $(VENV): demo needs the package alone, the others the `dev` extra.
# That of test-oldest is $(OLDEST), and never $(VENV).

VENV ?= .venv
OLDEST ?= .venv-oldest
JOBS ?= 2
SEED ?= 0
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(call usable,$(name))))
usable = $(shell $(1) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && echo $(1))
PYTHON_OLDEST ?= $(firstword $(foreach name,python3.11 python3 python,$(call is_311,$(name))))
is_311 = $(shell $(1) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $(1))
PYTEST = pytest -n $(JOBS) --dist loadfile -m "not network" -rs

PROMPT ?= a red heart above a blue circle
# The shell finds the prompt in its environment, untouched: quotes, $ and Chinese need no escaping.
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: setup demo test test-oldest lint check mutants
.DEFAULT_GOAL := check

setup: $(VENV)/.dev

demo: $(VENV)/.base
	@$(VENV)/bin/tessera generate -n 4 --candidates 16 --seed 0 -o out -- "$$PROMPT"

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m $(PYTEST)

test-oldest: $(OLDEST)/.oldest
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m $(PYTEST)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

check: lint test

mutants: $(VENV)/.mutants
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.mutants --jobs $(JOBS) --minutes 8 --seed $(SEED)

# One environment with two stamps: the development one holds all that the demo needs.
$(VENV)/.base: pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/pip install --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/pip install --editable '.[dev]'
	@touch $(VENV)/.base $@

$(VENV)/.mutants: $(VENV)/.dev
	$(VENV)/bin/pip install --editable '.[dev,mutants]'
	@touch $@

$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "tessera needs Python 3.11 to 3.14; none was found (or give PYTHON=...)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(OLDEST)/.oldest: pyproject.toml tests/oldest.txt | $(OLDEST)/bin/pip
	$(OLDEST)/bin/pip install --constraint tests/oldest.txt --editable '.[dev]'
	@touch $@

$(OLDEST)/bin/pip:
	@test -n "$(PYTHON_OLDEST)" || { echo "the oldest set needs Python 3.11; none was found (or give PYTHON_OLDEST=...)" >&2; exit 2; }
	$(PYTHON_OLDEST) -m venv $(OLDEST)
