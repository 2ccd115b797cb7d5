# Two commands set everything up on a machine with Python 3.11, make and a package index:
#   make demo    a photo in, an answer out
#   make test    lint, types, tests
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test unit lint env proto lock clean

demo: env
	@$(BIN)/python -m benchmarks.demo

test: lint
	$(BIN)/pytest

unit: env
	$(BIN)/pytest tests/unit

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

proto: env
	$(BIN)/python proto/generate.py

lock: env
	$(BIN)/uv pip compile --quiet --python-platform linux --python-version 3.11 --extra dev --no-emit-index-url --no-header \
		--output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
