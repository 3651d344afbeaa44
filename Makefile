# Two commands on a fresh machine (Python ≥ 3.10 and make): `make train` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An environment that is there already: make gpu PYTHON_GPU=python3
PYTHON_GPU ?= $(BIN)/python

.PHONY: train test lint audit compat smoke gpu gpu-train setup clean

train: setup
	$(BIN)/python train.py $(ARGS)

# One process per core, each with one thread: many small tests, and threads that wait for each other are slow.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ifeq ($(PYTHON_GPU),$(BIN)/python)
gpu gpu-train: setup
endif

# Everything that a GPU can show, the most valuable first, in nine minutes (ARGS='--seconds N --out DIR'); the same
# command goes on with what is missing.
gpu:
	$(PYTHON_GPU) -m bench prove --device cuda $(ARGS)

# The published recipe with the time to mAP, nine minutes a call; the same command goes on. ARGS: flags of train.py
gpu-train:
	$(PYTHON_GPU) -m bench train --out runs/gpu-train --seconds 540 -- --preset full --device cuda --precision bf16 \
		--backend fused --cuda_graph on $(ARGS)

# Every kernel × config × dtype compiled for three architectures, without a GPU, and judged.
audit: setup
	$(BIN)/python -m bench audit

# The oldest and the newest supported pair, torch-triton; pyproject.toml and README.md say the same.
COMPAT ?= 2.11-3.6 2.15-3.9
# The kernels' ops, torch.compile and torch.export, CUDA graphs, and what is told of the versions.
COMPAT_TESTS := $(wildcard $(patsubst %,tests/test_%*.py, \
	audit batch_norm compile convolution export frame_windows fused_networks graph inference joining launch moments projected_losses \
	recompute shared_parameters step_memory symbolic_sizes tf32 traffic))

# Those tests and the audit with each pair, in environments of some gigabytes each under .compat/.
compat: $(COMPAT:%=compat-%)

compat-%: .compat/%/installed
	OMP_NUM_THREADS=1 .compat/$*/bin/python -m pytest -n auto $(ARGS) $(COMPAT_TESTS)
	.compat/$*/bin/python -m bench audit

# constraints.txt without the pair that it pins: the environments differ in nothing else.
.compat/%/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .compat/$*
	grep -vE '^(torch|triton)==' constraints.txt > .compat/$*/constraints.txt
	.compat/$*/bin/python -m pip install --quiet --constraint .compat/$*/constraints.txt --editable '.[dev]' \
		'torch==$(firstword $(subst -, ,$*)).*' 'triton==$(lastword $(subst -, ,$*)).*'
	touch $@

.PRECIOUS: .compat/%/installed

# Every benchmark and check that a GPU would run, on the CPU at small sizes: there a second thread waits more than it
# works, and doubles the work. The time is one that a busy machine keeps.
smoke: setup
	out=$$(mktemp -d) && OMP_NUM_THREADS=1 $(BIN)/python -m bench prove --device cpu --quick --seconds 1500 --out $$out; \
		status=$$?; rm -rf $$out; exit $$status

setup: $(VENV)/installed

# The stamp is newer than the files that say what to install, so a second call installs nothing. The CPU build of
# torch does not bring triton, which the kernel tests need: pyproject.toml asks for it.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: Python 3.10 or newer is needed, " \
		"this is %d.%d; name one with make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
