# Every target works from a fresh clone, also below a path with a space; the first one that is run makes .venv.
#   PYTHON=python3.12   another interpreter (3.11 or 3.12)
#   TORCH_INDEX=URL     another index for torch, e.g. https://download.pytorch.org/whl/cpu
#   ARGS="--split 3"    what `make demo` hands to examples/digits/demo.py; ARGS=--help tells more

PYTHON ?=
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=

RUN := .venv/bin/python -m
STAMP := .venv/.installed
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))

.PHONY: help setup demo test test-all lint doctor
.DEFAULT_GOAL := help

help:
	@echo "make setup | demo | test | test-all | lint | doctor   (README.md, CONTRIBUTING.md)"

setup: $(STAMP)

# torch goes first and alone: a range in pyproject.toml would take the newest build with all of CUDA.
# Scripts in .venv/bin are never called: their first line cannot hold a path with a space.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.cpp)
	@set -e; found=; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.12 python3.11); do \
	  if "$$python" -c '$(SUPPORTED)' 2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "unimega: no Python 3.11 or 3.12 (tried: $(or $(PYTHON),python3 python3.12 python3.11)). Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	  exit 2; \
	fi; \
	if ! { [ -x .venv/bin/python ] && .venv/bin/python -c '$(SUPPORTED)'; } 2>/dev/null; then \
	  echo "making .venv with $$found"; "$$found" -m venv --clear .venv; \
	fi
	$(RUN) pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	$(RUN) pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $(STAMP)

demo: setup
	.venv/bin/python examples/digits/demo.py $(ARGS)

# Two processes, a file to each at a time: worlds and checkpoints that a file's tests share are made once.
test: setup
	$(RUN) pytest -q -n 2 --dist loadfile -m "not slow" tests

test-all: setup
	$(RUN) pytest -q -n 2 --dist loadfile tests

lint: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

doctor: setup
	$(RUN) unimega doctor
