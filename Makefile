# Every target does its own set-up: a virtual environment in .venv from requirements.lock, kept while the lock is the
# same. Needed on the machine: Python 3.11 or newer, make, gcc.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready-$(shell cat requirements.lock pyproject.toml | cksum | tr ' ' '-')
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: setup repro test lint clean

repro: setup ## the whole pipeline, only what has changed
	dvc repro

test: setup ## lint, then all tests
	ruff check .
	ruff format --check .
	python -m pytest

lint: setup ## put the code into its form
	ruff check --fix .
	ruff format .

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --requirement requirements.lock
	python -m pip install --quiet --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/ready-*
	touch $@

clean: ## forget the environment; the pipeline's outs stay
	rm -rf $(VENV)
