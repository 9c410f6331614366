# Every command works on a fresh machine with Python 3.11, a C++ compiler and PyPI.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Programs that we start by name (ray, serve, weed, ninja) come from the environment too.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: environment quick test coverage nightly check format quickstart serve bench clean

environment: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Three at a time on two cores, since some wait; tests/conftest.py says which start Ray clusters.
test: environment
	$(SIDE_BY_SIDE) -m "not alone and not nightly"
	$(BIN)/python -m pytest -m "alone and not nightly" tests/cluster
SIDE_BY_SIDE = $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# For each edit: tests without a cluster, an S3 server, kubectl or HAProxy, of at most half a second.
quick: environment
	$(QUICK)
QUICK = $(BIN)/python -m pytest -n 3 --dist loadfile -m "not slow and not server and not alone"

# Line coverage of the library by the quick tests, which take two thirds longer.
coverage: environment
	$(QUICK) --cov --cov-fail-under=90

# More thorough versions of tests in `make test`.
nightly: environment
	$(BIN)/python -m pytest -m nightly

check: environment
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests/gpu
	$(BIN)/mypy --config-file tests/mypy.ini $(filter-out tests/gpu/ tests/__pycache__/,$(wildcard tests/*/)) tests/conftest.py

format: environment
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quickstart: environment
	$(BIN)/python -m jobs.quickstart

serve: environment
	$(BIN)/python -m jobs.quickstart --keep-serving

# Our engine; with PEERS=DIR, made by platform/gptj_bench/peers/setup.sh, other engines as well.
bench: environment
	test -e .bench/model/manifest.json || $(BIN)/python -m gptj_bench model .bench/model
	$(BIN)/python -m gptj_bench decode --model .bench/model --dtype bfloat16,int8,int4,float32 $(BESIDE)
	$(BIN)/python -m gptj_bench serve --model .bench/model --dtype bfloat16 $(BESIDE)
BESIDE = $(if $(PEERS),--peers $(abspath $(PEERS)))

clean:
	rm -rf $(VENV) .quickstart .bench outputs build *.egg-info
