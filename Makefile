# Two commands on a fresh machine (Python ≥ 3.10 and make): `make train` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: train test lint setup clean

train: setup
	$(BIN)/python train.py $(ARGS)

# One process per core, each with one thread: many small tests, and threads that wait for each other are slow.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/installed

# The stamp is newer than the files that say what to install, so a second call installs nothing. The CPU build of
# torch does not bring triton, which the kernel tests need: pyproject.toml asks for it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python 3.10 or newer is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
