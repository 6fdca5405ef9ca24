# Everything runs in .venv, made on first use from the pinned versions in constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The same set-up whether or not the shell has another environment active.
unexport PYTHONPATH
unexport VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help install run test test-slow bench bench-inference bench-gpu sweep study readme-tables docs lint types check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY) ## make .venv with the pinned dependencies

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "needs Python 3.11; name one with: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(READY) ## distil the embedded digits: teacher, seven students, ensemble, report
	$(BIN)/python -m pkd_lightning.run experiment=digits $(ARGS)

test: $(READY) ## the default test suite
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(READY) ## the tests that need real MNIST or minutes of training
	$(BIN)/python -m pytest -m slow -n 2 $(ARGS)

sweep: $(READY) ## search the ladder of mnist_best with Optuna, within the paper's budgets; goes on where it stopped
	$(BIN)/python -m experiments.search experiments/mnist_best $(ARGS)

STUDY := mnist_best
study: $(READY) ## run or go on with a study and collect its results: make study STUDY=digits
	$(BIN)/python -m experiments.study $(STUDY) $(ARGS)

readme-tables: $(READY) ## the tables and figures of the READMEs, from the collected results
	$(BIN)/python -m experiments.readme

bench: $(READY) ## timings of the scan, training and the data path on this machine, against their targets
	$(BIN)/python -m benchmarks.bench $(ARGS)

bench-inference: $(READY) ## latencies of ensembles in use, into docs/inference.md
	$(BIN)/python -m benchmarks.inference --write $(ARGS)

bench-gpu: $(READY) ## timings of the scan and training steps on a CUDA device
	$(BIN)/python -m benchmarks.gpu $(ARGS)

docs: $(READY) ## the pages of docs/ and the API as a site, in build/docs
	$(BIN)/python -c 'import mkdocstrings, material' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

lint: $(READY) ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

check: lint types test ## all that CI runs

clean: ## remove .venv and caches, keep the runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
