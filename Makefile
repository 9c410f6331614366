# Every command works on a fresh machine with Python 3.11, a C++ compiler and PyPI.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Programs that we start by name (ray, serve, weed, ninja) come from the environment too.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: environment test check format quickstart serve clean

environment: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

test: environment
	$(BIN)/python -m pytest

check: environment
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: environment
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quickstart: environment
	$(BIN)/python -m jobs.quickstart

serve: environment
	$(BIN)/python -m jobs.quickstart --keep-serving

clean:
	rm -rf $(VENV) .quickstart outputs build *.egg-info
