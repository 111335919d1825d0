# Everything runs in .venv. Whatever needs it sets it up first, once: again only when pyproject.toml or
# constraints.txt is newer than the stamp.
PYTHON ?= python3
# Test processes side by side, one thread each: the tensors are small, and the machine may be as well.
JOBS ?= 2
# More arguments for pytest: make test ARGS="-k tucker"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run toys test test-slow test-browser test-slurm test-gpu bench format lint type clean

help: ## Show what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Set up .venv (every other target does it by itself)

run: $(STAMP) ## Decompose TMS, a CNN on digits and a small language model; print a table of each and where its atlas is
	@$(BIN)/l3d demo

toys: $(STAMP) ## Decompose every toy, 16 seeds and both recipes each, and score it against the ground truth
	@$(BIN)/l3d toys

test: $(STAMP) ## Run the tests
	@$(PYTEST) -m "not slow and not slurm and not browser and not gpu" $(ARGS)

test-slow: $(STAMP) ## Run the slow tests
	@$(PYTEST) -m "slow and not browser" $(ARGS) || { status=$$?; test $$status -eq 5 && echo "No test is marked slow." || exit $$status; }

# One process: a test measures how fast the page answers.
test-browser: $(STAMP) ## Run the tests of the atlas in a headless Chromium; screenshots: artifacts/atlas
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser $(ARGS)

# One process for each file, and a cluster for each: there, waiting is most of the time.
test-slurm: $(STAMP) ## Run the tests on a Slurm of two nodes, made here (root; apt-get install slurm-wlm munge)
	@$(PYTEST) --dist loadfile -m slurm tests/slurm $(ARGS)

test-gpu: $(STAMP) ## Run the tests that need a CUDA device
	@OMP_NUM_THREADS=4 $(BIN)/python -m pytest -m gpu $(ARGS)

bench: $(STAMP) ## Measure speed (benchmarks/toy_step.py and step.py)
	@set -e; for script in benchmarks/toy_step.py benchmarks/step.py; do echo "== $$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script; done

format: $(STAMP) ## Format the code
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

lint: $(STAMP) ## Check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

type: $(STAMP) ## Check types
	@$(BIN)/mypy

clean: ## Remove caches and builds (not .venv, not runs/)
	@rm -rf build dist *.egg-info .coverage htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "No $(PYTHON) on PATH: l3d_pl needs Python 3.11 or newer (make PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "l3d_pl needs Python 3.11 or newer, and $(PYTHON) is %d.%d: name another by make PYTHON=..." % sys.version_info[:2])'
	@echo "Setting up $(VENV) ($$($(PYTHON) --version 2>&1)): about two minutes, and the downloads. Log: $(VENV)/set-up.log"
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --constraint constraints.txt --editable '.[cpu]' > $(VENV)/set-up.log 2>&1 || { \
		grep -v ^WARNING $(VENV)/set-up.log | tail -n 15 >&2; echo "Set-up failed; everything pip said: $(VENV)/set-up.log" >&2; exit 1; }
	@touch $@
