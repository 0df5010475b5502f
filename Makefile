# Every target sets up what it needs first; Python 3.11 or newer and make are all that must be there.

PYTHON ?= python3
DATA ?= digits
PYTEST_ARGS ?=

VENV := .venv
STAMP := $(VENV)/.installed
# Containers often set this; with it, and with what is installed uncompiled, every process would compile torch again: 10 seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP = PIP_DISABLE_PIP_VERSION_CHECK=1 $(VENV)/bin/python -m pip install -qq --no-compile

# These have processes of their own: a test process that had loaded ONNX Runtime and OpenVINO was killed later on, when it
# trained networks.
APART := tests/training
RUNTIMES := tests/inference tests/test_examples.py tests/test_own_network.py
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup test slow lint quick-lint format mutants docs dist oldest demo study dense-demo export-matrix results clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP) ## make .venv and install mpvg with everything the checks need

# mypy needs one core for a minute, so it runs beside the first tests.
test: quick-lint ## all checks: lint, format, types, import contracts, tests
	@$(VENV)/bin/mypy & types=$$!; \
	$(PYTEST) $(addprefix --ignore ,$(APART) $(RUNTIMES)) $(PYTEST_ARGS); tests=$$?; \
	wait $$types || { echo "mypy found errors: its lines stand among those of the first tests" >&2; exit 1; }; exit $$tests
	$(PYTEST) $(RUNTIMES) $(PYTEST_ARGS)
	$(PYTEST) $(APART) -m "not slow" $(PYTEST_ARGS)

slow: $(STAMP) ## the tests that CI has no time for: torchrun starts killed workers again, dense runs in two processes are killed
	$(PYTEST) $(APART) -m slow $(PYTEST_ARGS)

lint: quick-lint ## all checks but the tests
	$(VENV)/bin/mypy

quick-lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

format: $(STAMP) ## rewrite the code in the one format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

mutants: $(STAMP) ## put plausible bugs into copies of the package: each must make a test fail
	$(VENV)/bin/python tests/mutations.py

docs: $(STAMP) ## build the site from docs/ into build/docs; a warning is an error
	$(VENV)/bin/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/docs
	@echo "build/docs/index.html"

dist: $(STAMP) ## build wheel and sdist, check them, and try them in empty environments; fetches gigabytes
	@$(PIP) -c constraints.txt -e '.[release]'
	$(VENV)/bin/python .ci/dist.py

oldest: $(STAMP) ## a part of the tests with the oldest versions that pyproject.toml allows; fetches gigabytes
	$(VENV)/bin/python .ci/oldest.py

demo: OUT ?= demo
demo: $(STAMP) ## train and compare on data that needs no download: DATA=digits OUT=demo
	$(VENV)/bin/mpvg demo --data $(DATA) --out $(OUT)

study: OUT ?= studies
study: $(STAMP) ## Tables 1 and 6 on digits, 5 seeds each: OUT=studies
	$(VENV)/bin/mpvg study table1 --scale tiny --seeds 5 --out $(OUT)/table1-tiny
	$(VENV)/bin/mpvg study table6 --scale tiny --seeds 5 --out $(OUT)/table6-tiny

dense-demo: OUT ?= dense-demo
dense-demo: $(STAMP) ## pre-train a small classifier, train a segmenter and a detector from it, draw what they find: OUT=dense-demo
	$(VENV)/bin/mpvg train --data canvas-tiles --method mpvg --epochs 5 --threads 1 --out $(OUT)/tiles
	$(VENV)/bin/mpvg train --recipe canvas_segmentation --data canvas-easy --epochs 3 --threads 1 --network.init $(OUT)/tiles --out $(OUT)/segmenter
	$(VENV)/bin/mpvg train --recipe canvas_detection --data canvas-easy --threads 1 --network.init $(OUT)/tiles --out $(OUT)/detector
	for run in segmenter detector; do \
	  $(VENV)/bin/mpvg predict $(OUT)/$$run $(foreach n,1 2 3 4,~/.cache/mpvg/canvas/canvas-easy-v1/images/validation/00000$(n).png) --out $(OUT)/$$run-pictures || exit; \
	done

results: $(STAMP) ## rewrite what is generated from the ledgers in results/: tables, docs/claims.md, README
	$(VENV)/bin/python -m mpvg.study.claims

export-matrix: $(STAMP) ## every family, method and runtime: exported against PyTorch, with a record
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/export_matrix.py --json benchmarks/records/export_matrix.json

clean: ## remove caches and build products; .venv, runs and demo stay
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# -qq: errors only. --no-compile: only what is imported is compiled, when it is, which saves a minute. A failed attempt leaves
# no stamp, so the next one starts again. pip unpacks gigabytes on one core, so CUDA's libraries are installed beside the rest;
# the last line checks and completes, and does all where these versions do not exist.
$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV); the first time this fetches torch and takes some minutes and gigabytes."
	@[ "$$(uname -sm)" != "Linux x86_64" ] || { \
	  $(PIP) --no-deps $$(grep '^nvidia' constraints.txt) & \
	  $(PIP) --no-deps $$(grep -v '^nvidia\|^#' constraints.txt); wait; } 2> /dev/null
	@$(PIP) -c constraints.txt -e '.[dev]'
	@$(VENV)/bin/python -c 'import mpvg.training, mpvg.study.runner, mpvg.tasks'  # compiles it, for commands without make too
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mpvg needs Python 3.11 or newer, and $(PYTHON) is not; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) could not make a virtual environment; Debian and Ubuntu need the package python3-venv" >&2; exit 1; }
