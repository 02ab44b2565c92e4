# fedlight: `make demo` runs the main job, `make test` passes the tests; each sets up all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FMNIST := /usr/share/datasets/fashion-mnist
CHROMEDRIVER := /usr/bin/chromedriver
BOOKTABS := /usr/share/texlive/texmf-dist/tex/latex/booktabs/booktabs.sty
SLURM := /usr/sbin/slurmctld
DEBIAN := $(FMNIST) $(CHROMEDRIVER) $(BOOKTABS) $(SLURM)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-full docs check fast-tests test all-tests lint bench gpu format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(INSTALLED)  ## make .venv with everything in it

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV) || \
	  { apt-get update -q && apt-get install -yq python3-venv && $(PYTHON) -m venv --clear $(VENV); }

$(INSTALLED): pyproject.toml | $(BIN)/pip
	$(BIN)/pip install -q uv
	$(BIN)/uv pip install --python $(BIN)/python -q --compile-bytecode -e '.[dev]'
	touch $@

OPEN :=
demo: install  ## what a client gains by federating, on digits, as a page: under 3 minutes on two cores; OPEN=1 opens it
	$(BIN)/python -m fedlight.run -m sweeps=quick hydra/launcher=local
	$(BIN)/python -m fedlight.report runs/quick $(if $(OPEN),--open)

demo-full: install  ## what each method exchanges, at which quality, for 2, 5 and 10 clients: about 7 minutes on two cores
	$(BIN)/python -m fedlight.run -m sweeps=demo hydra/launcher=local
	$(BIN)/python -m fedlight.report runs/demo $(if $(OPEN),--open)

docs: install  ## the docs as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "site/index.html"

PYTEST := $(BIN)/pytest --dist loadfile --no-loadscope-reorder

check:  ## lint, types and the fast tests: about 3 minutes
	$(MAKE) --jobs=2 lint fast-tests

fast-tests: install
	$(PYTEST) -n 2 -m "not slow"

test:  ## lint, types and all tests
	$(MAKE) --jobs=2 lint all-tests   # Debian's packages are installed while Python's are

all-tests: install $(DEBIAN)
	$(PYTEST) -n 4   # SLURM and Flower mostly wait

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: install  ## the quick benchmarks against the committed ratios: about 5 minutes
	$(BIN)/python benchmarks/bench.py

SLICE :=
gpu: install  ## tests, measurements and the paper's grid on a GPU; with SLICE=600 ten minutes of it, and on with the next
	$(BIN)/python benchmarks/gpu.py $(if $(SLICE),--slice $(SLICE)) || test $$? = 75

# Real data, a browser, LaTeX and SLURM for the tests, which start and stop it by themselves; without the right to
# install them, the tests that need them are skipped.
$(DEBIAN) &: | $(BIN)/pip
	-test "$$(id -u)" != 0 || { apt-get update -q && for packages in dataset-fashion-mnist "chromium chromium-driver" \
	    texlive-latex-recommended "slurm-wlm munge"; do apt-get install -yq --no-install-recommends $$packages; done; }

format: install  ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove .venv and caches, keep runs/
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist site
