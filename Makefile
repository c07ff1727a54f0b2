# One environment, .venv, made from pyproject.toml and constraints.txt; every target that needs it makes it.
# `make` alone says what there is.

PYTHON  ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN     := .venv/bin
STAMP   := .venv/.installed
WORKERS ?= 2

# Two test workers share two cores, so each computes on one thread: without this they fight over them.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check format api docs bench clean

help: ## say what the targets do
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "lowvar needs Python 3.11 or newer, and '$(PYTHON)' is not one: install it, or name one with make PYTHON=/path/to/python3.11." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment: install its venv module (python3-venv on Debian) and run make again." >&2; exit 2; }
	@echo "installing the pinned versions into .venv (some minutes)"
	$(BIN)/python -m pip install --disable-pip-version-check -qq --constraint constraints.txt --editable '.[dev,docs,track]'
	@touch $@

demo: $(STAMP) ## train, calibrate and sample on real digits; writes runs/demo/report.html (10 minutes at most)
	$(BIN)/lowvar demo --out runs/demo

test: $(STAMP) ## run the tests, doctests included (8 minutes at most)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --durations=10

test-slow: $(STAMP) ## run the slow tests and record the result in tests/SLOW.md
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m slow --durations=10 --record=tests/SLOW.md

check: $(STAMP) ## lint, check the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(STAMP) ## mend what lint and format can mend
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

api: $(STAMP) ## write tests/api_snapshot.txt anew after a reviewed change of the public API
	$(BIN)/python tests/test_api.py

docs: $(STAMP) ## build the documentation into build/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

bench: $(STAMP) ## run the benchmarks and write their results
	@set -e; scripts="benchmarks/run.py"; test -f $$scripts || scripts=$$(ls benchmarks/*.py 2>/dev/null || true); \
	  test -n "$$scripts" || { echo "benchmarks/ holds no script." >&2; exit 2; }; \
	  for script in $$scripts; do echo "== $$script"; $(BIN)/python $$script; done

clean: ## remove builds and caches; .venv and runs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis docs/_generated
	find src tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
