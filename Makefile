# make demo    set up .venv, then run the quick start
# make test    set up .venv, then every test: docstrings and tests/
# make check   lint, types and the fast tests (under two minutes)
# make lint    ruff and mypy alone
# make test-dist    models under every kind of parallelism, as 2, 4 and 8 processes on this machine, one row after another
# make test-quant   real models under every scheme of quantization, all by all, against the dequantized model
# make test-faults  faults done to the cache of tuned tiles (killed writers, corrupt files, a full disk), with figures
# make bench   side-by-side with peers on this machine
# make gpu     the checks and timings that need a GPU
# make clean   remove build and test leftovers (the .venv stays; `make distclean` removes it too)
#
# Variables:
#   PYTHON    the interpreter that .venv is made with: 3.11 or 3.12
#   PIP_ARGS  more arguments for every pip install, e.g. PIP_ARGS="--extra-index-url <URL>"
#   TORCH     the torch to install. On Linux without an NVIDIA driver the default is the CPU build and
#             nothing else, so that pip never fetches gigabytes of CUDA libraries for no use.
#   JOBS      test processes
SHELL := /bin/bash

VENV ?= .venv
JOBS ?= 2
PIP_ARGS ?=
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)

TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH ?= torch==$(TORCH_VERSION)+cpu
else
TORCH ?= torch==$(TORCH_VERSION)
endif

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# A machine that comes with its own torch and Triton needs no .venv.
GPU_PYTHON ?= $(firstword $(wildcard $(PY)) python3)

.PHONY: demo test test-dist test-quant test-faults check lint bench gpu setup clean distclean

demo: setup
	$(PY) examples/quickstart.py

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal --doctest-modules tessel tests

test-dist: setup
	OMP_NUM_THREADS=1 TESSEL_TEST_DIST=1 $(PY) -m pytest -q -s tests/test_dist_matrix.py

test-quant: setup
	OMP_NUM_THREADS=1 TESSEL_TEST_QUANT=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal tests/test_quant_models.py

test-faults: setup
	OMP_NUM_THREADS=1 $(PY) -W ignore tests/faults.py

check: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal --doctest-modules -m "not slow" tessel tests

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: setup
	$(PY) benchmarks/run.py

gpu:
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_tiles.py
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_scans.py

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Tessel needs Python 3.11 or 3.12; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "$(PY) -m pip install $(TORCH)"
	@$(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt "$(TORCH)" || { \
	  echo >&2; \
	  echo "Could not install $(TORCH). If no package index in use offers that build, either" >&2; \
	  echo "  name one that does:     make PIP_ARGS='--extra-index-url <URL>'   (PyTorch's install page lists the CPU index)" >&2; \
	  echo "  or take what there is:  make TORCH=torch==$(TORCH_VERSION)   (on Linux this may bring gigabytes of CUDA libraries)" >&2; \
	  exit 1; }
	$(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find tessel tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)
