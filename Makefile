# On a fresh machine with Python 3.11 or 3.12 and make, `make demo` and `make test` need nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
READY := .venv/.ready
export UV_COMPILE_BYTECODE := 1
export PYTHONDONTWRITEBYTECODE :=
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup demo test acceptance chaos lint format lock clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(READY) ## the environment in .venv; reused as long as requirements.lock and pyproject.toml stand

$(READY): requirements.lock pyproject.toml
	@python=; for name in python3 python3.12 python3.11; do \
	  if command -v $$name >/dev/null && $$name -c 'import sys; import ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; \
	  then python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then echo "error: Python 3.11 or 3.12 with venv (Debian: python3-venv) is needed and was not found (python3 is $$(python3 --version 2>&1))" >&2; exit 2; fi; \
	if [ ! -x $(BIN)/uv ]; then echo "setting up .venv with $$($$python --version)"; $$python -m venv .venv; $(BIN)/python -m pip install --quiet uv; fi
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $(READY)

demo: $(READY) ## the whole pipeline on this machine; DATA=<folder> takes real data (README)
	@$(BIN)/python jobs/demo.py $(if $(DATA),--data "$(DATA)")

test: $(READY) ## every test but the long ones, in two processes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not acceptance and not chaos"

acceptance: $(READY) chaos ## the tests with full counts, after those of chaos
	@$(BIN)/python -m pytest -m "acceptance"

chaos: $(READY) ## faults in training: killed workers, drivers and nodes, full disks
	@$(BIN)/python -m pytest -m "chaos"

lint: $(READY) ## ruff, pyright, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

format: $(READY) ## let ruff put things straight
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format --quiet .

lock: $(READY) ## resolve the dependencies anew
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --group dev --no-header --no-annotate --no-emit-index-url \
	  --upgrade -o requirements.lock pyproject.toml

clean: ## remove what the demo made
	rm -rf demo demo-real
