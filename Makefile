# All work on a fresh clone: .venv is made first where it is missing, not whole, or of another folder or Python.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

EXPERIMENTS := methods weights views targets attacks levels few few_draws stability

.PHONY: help environment repro experiments test bench lint style clean

help:
	@echo "make repro   install into .venv and run the whole pipeline (dvc repro)"
	@echo "make experiment-NAME  one comparison: $(EXPERIMENTS) photographs"
	@echo "make experiments  all of them but photographs (an hour and a half on two cores)"
	@echo "make test    install into .venv, check style and types, run all tests"
	@echo "make bench   measure everything in docs/BENCHMARKS.md again (an hour; needs real images, see there)"
	@echo "make lint    check style and types only"
	@echo "make style   rewrite the code in the project's style"
	@echo "make ... PYTHON=python3.12  with another Python than python3 in .venv"
	@echo "make clean   remove .venv and caches of tools"

environment:
	@.ci/environment "$(PYTHON)"

repro: environment
	@python -m stages.doctor --dvc
	dvc repro

experiment-%: environment
	dvc repro teacher
	python -m stages.experiment experiments/$*.yaml

experiments: $(EXPERIMENTS:%=experiment-%)

test: lint
	python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

bench:
	@.ci/environment "$(PYTHON)" bench
	@python -m pip install --quiet --no-deps --constraint constraints.txt adv-lib # but not visdom, see benchmarks/peers.py
	python -m benchmarks.attack
	python -m benchmarks.peers
	python -m benchmarks.students
	python -m benchmarks.shards
	python -m benchmarks.levels
	python -m benchmarks.scale

lint: environment
	ruff check .
	ruff format --check .
	lint-imports --no-cache
	mypy

style: environment
	ruff check --fix .
	ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
