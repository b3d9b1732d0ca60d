# make demo    serve a small model and save a picture
# make test    all tests
# make lint    ruff and mypy
# make bench   compare engines at SDXL's real size: 7 GB of random weights, 16 GB of memory, most of an hour
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python -m

.PHONY: bench demo test lint

demo: $(VENV)/served
	$(RUN) scripts.demo

test: $(VENV)/tested
	$(RUN) pytest

lint: $(VENV)/tested
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

bench: $(VENV)/served build/base
	$(RUN) benchmarks

build/base: | $(VENV)/served
	$(RUN) scripts.make_random_model $@ --size base

$(VENV)/served: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet -r requirements.txt
	touch $@

$(VENV)/tested: $(VENV)/served requirements-dev.txt
	$(RUN) pip install --quiet -r requirements-dev.txt
	touch $@
