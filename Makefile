# `make repro` and `make test` work on a fresh clone: both make .venv first when it is missing.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

EXPERIMENTS := methods weights views targets attacks few few_draws stability

.PHONY: help repro experiments test bench lint style clean

help:
	@echo "make repro   install into .venv and run the whole pipeline (dvc repro)"
	@echo "make experiment-NAME  one comparison: $(EXPERIMENTS) photographs"
	@echo "make experiments  all of them but photographs (an hour and a half on two cores)"
	@echo "make test    install into .venv, check style and types, run all tests"
	@echo "make bench   measure everything in docs/BENCHMARKS.md again (half an hour; needs real images, see there)"
	@echo "make lint    check style and types only"
	@echo "make style   rewrite the code in the project's style"
	@echo "make clean   remove .venv and caches of tools"

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dvc,test]'
	touch $@

repro: .venv/.installed
	dvc repro

experiment-%: .venv/.installed
	dvc repro teacher
	python -m stages.experiment experiments/$*.yaml

experiments: $(EXPERIMENTS:%=experiment-%)

test: lint
	python -m pytest

bench: .venv/.installed
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	python -m benchmarks.attack
	python -m benchmarks.students
	python -m benchmarks.shards

lint: .venv/.installed
	ruff check .
	ruff format --check .
	lint-imports --no-cache
	mypy

style: .venv/.installed
	ruff check --fix .
	ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
