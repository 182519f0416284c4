# Two commands: `make quickstart` and `make test`; both set up their own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# A command, and a dot every two seconds as long as it runs.
dots = $(1) & pid=$$!; while kill -0 $$pid 2> /dev/null; do printf .; sleep 2; done; echo; wait $$pid

.PHONY: setup quickstart test test-slow test-lowest test-newest gpu lint clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"got Python {v[0]}.{v[1]}, wanted 3.11 to 3.13: make PYTHON=python3.12 ..." if not (3, 11) <= v <= (3, 13) else 0)'
	@echo "set-up, once, a few minutes: a virtual environment in $(VENV)"
	@$(call dots,$(PYTHON) -m venv $(VENV))
	@echo "set-up: torch"
	@$(call dots,$(BIN)/pip install --quiet --constraint constraints.txt "setuptools>=77" wheel torch)
	@echo "set-up: everything else"
	@$(call dots,$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]')
	@touch $@

quickstart: setup
	$(BIN)/deltatok-pipeline quickstart

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 -m slow

# Lowest versions that pyproject.toml allows, and the newest; a few minutes each (.ci/bounds).
test-lowest:
	PYTHON=$(PYTHON) .ci/bounds lowest

test-newest:
	PYTHON=$(PYTHON) .ci/bounds newest

# Where there is a GPU. Installs nothing: tests/gpu/run.py says what it needs.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/gpu/run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
