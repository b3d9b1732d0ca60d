# make demo    serve a small model and save a picture
# make test    all tests
# make lint    ruff and mypy
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python -m

.PHONY: demo test lint

demo: $(VENV)/served
	$(RUN) scripts.demo

test: $(VENV)/tested
	$(RUN) pytest

lint: $(VENV)/tested
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

$(VENV)/served: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet -r requirements.txt
	touch $@

$(VENV)/tested: $(VENV)/served requirements-dev.txt
	$(RUN) pip install --quiet -r requirements-dev.txt
	touch $@
