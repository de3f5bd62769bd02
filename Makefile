# make compare   run the main job: every solver against its error on real data
# make test      run the tests
# Both make their own virtual environment in .venv from nothing but Python 3.11 or newer.

PYTHON ?= python3
VENV   ?= .venv
OUTPUT ?= results/compare
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: compare test environment lint format types docs clean
.DELETE_ON_ERROR:

compare: $(VENV)/.ready-compare
	$(BIN)/sdeflow compare --output $(OUTPUT)

test: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# Everything a developer needs: the tools of the tests, and the package itself, editable.
environment: $(VENV)/.ready-test

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.ready-test
	$(BIN)/pyright --pythonpath $(BIN)/python

# Write the documentation's solver table from the solvers' own facts.
docs: $(VENV)/.ready-compare
	$(BIN)/sdeflow solvers --markdown docs/solvers.md

clean:
	rm -rf $(VENV) build dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"sdeflow needs Python 3.11 or newer, $(PYTHON) is {v}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# A stamp is written when an installation has succeeded, so the next run starts at once and an interrupted one repeats.
$(VENV)/.ready-compare: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing sdeflow[compare] into $(VENV); the first time takes some minutes."
	$(PIP) --editable '.[compare]'
	@touch $@

$(VENV)/.ready-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing sdeflow[test] into $(VENV); the first time takes some minutes."
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.ready-compare
