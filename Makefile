# fedlight: `make demo` runs the main job, `make test` passes the tests; each sets up all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FMNIST := /usr/share/datasets/fashion-mnist
SLURM := /usr/sbin/slurmctld

.DEFAULT_GOAL := help
.PHONY: help install demo test format clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

install: $(INSTALLED)  ## make .venv with everything in it

$(INSTALLED): pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { apt-get update -q && apt-get install -yq python3-venv && $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/pip install -q uv
	$(BIN)/uv pip install --python $(BIN)/python -q --compile-bytecode -e '.[dev]'
	touch $@

demo: install  ## four methods x three client counts on digits: about 8 minutes on two cores
	$(BIN)/python -m fedlight.run -m sweeps=demo hydra/launcher=local

test: install $(FMNIST) $(SLURM)  ## lint, types and all tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest

# Real Fashion-MNIST for the tests; without the right to install it, the tests that need it are skipped.
$(FMNIST):
	-test "$$(id -u)" != 0 || { apt-get update -q && apt-get install -yq dataset-fashion-mnist; }

# A SLURM that the tests start and stop by themselves; they need to be root for it.
$(SLURM):
	-test "$$(id -u)" != 0 || { apt-get update -q && apt-get install -yq slurm-wlm munge; }

format: install  ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove .venv and caches, keep runs/
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist
