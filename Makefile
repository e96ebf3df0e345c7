# Targets for a fresh clone; `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install train test gpu test-gpu test-long parity reference check bench clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTS ?= tests
PYTEST_ARGS ?=
# `make test` gives whole files of tests to this many processes; one test has up to four ranks, each of one thread
TEST_PROCESSES ?= 2
# All benchmark programs but growth and two_trees, which need arguments, and those over a slow link, which need root
BENCH ?= $(filter-out growth two_trees overlap optimistic,$(basename $(notdir $(shell grep -l __main__ benchmarks/*.py))))

# A working NVIDIA driver means cuda. requirements.lock pins torch's version; pip's index decides which build it gets.
DEVICE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

# Several ranks on one machine: one thread per rank, and gloo on the loopback device if there is one.
LOCAL_RANKS := OMP_NUM_THREADS=1 $(if $(wildcard /sys/class/net/lo),GLOO_SOCKET_IFNAME=lo)

# The first Python from 3.11 on that can create an environment (some systems ship python3 without ensurepip).
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c '$(USABLE)' >/dev/null 2>&1 && { echo $$python; break; }; done)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP)  ## create .venv with the exact versions of requirements.lock (does nothing if it is up to date)

$(STAMP): pyproject.toml requirements.lock
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.11 or newer with venv found; name one: make install PYTHON=..." >&2; exit 2; }
	@echo "install: device $(DEVICE), $$($(PYTHON) --version), into $(VENV); takes some minutes the first time"
	@[ "$(DEVICE)" = cuda ] || echo "install: torch's CPU build is enough here; where pip's index serves only the CUDA \
	build (several GB), add an index with CPU builds through PIP_EXTRA_INDEX_URL"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.lock
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@
	@echo "install: done; $(BIN)/longcat --help lists the commands"

train: install  ## build the default corpus and train the default model on 2 local processes (runs/quickstart)
	@$(BIN)/longcat data build data=python_source model=tiny
	@$(BIN)/longcat train experiment=quickstart

test: install  ## run the test suite (25 to 30 minutes on 2 cores); TESTS=path selects some
	@$(LOCAL_RANKS) $(BIN)/python -m pytest $(TESTS) -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# GPU_PARTS="attention training" selects some
gpu: install  ## show what a first GPU should show, in ten minutes; writes gpu_results.md to docs
	@$(BIN)/python -m benchmarks.gpu $(GPU_PARTS)

test-gpu: install  ## run the GPU tests, which make gpu has too: kernels bitwise equal to their plain versions
	@$(BIN)/python -m pytest tests/gpu -m gpu $(PYTEST_ARGS)

# mlx-lm, a client of exports, in an environment of its own; without it (no network, no wheel) its tests are skipped
MLX := $(VENV)-mlx
MLX_STAMP := $(MLX)/.installed

$(MLX_STAMP): tests/support/mlx_requirements.txt
	@[ -x $(MLX)/bin/python ] || $(PYTHON) -m venv $(MLX)
	@$(MLX)/bin/python -m pip install --disable-pip-version-check --quiet --no-cache-dir -r $<
	@touch $@

test-long: install  ## run the tests that take minutes; makes $(VENV)-mlx (360 MB), to read exports with mlx-lm
	@$(MAKE) --no-print-directory $(MLX_STAMP) || echo "test-long: mlx-lm was not installed; its tests are skipped" >&2
	@if [ -f $(MLX_STAMP) ]; then export LONGCAT_MLX_PYTHON=$(CURDIR)/$(MLX)/bin/python; fi; \
	$(LOCAL_RANKS) $(BIN)/python -m pytest $(TESTS) -m long -o faulthandler_timeout=3600 $(PYTEST_ARGS)

parity: install  ## compare every layout with one process; writes the table of errors to docs/parity.md
	@$(LOCAL_RANKS) $(BIN)/python -m pytest tests/parity -m "" -k equals_one_process --parity-table docs/parity.md $(PYTEST_ARGS)

reference: install  ## write docs/reference/keys.md and docs/images/architecture.svg from the code
	@$(BIN)/python -m tests.house.reference
	@$(BIN)/python -m tests.house.picture

check: install  ## check lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: install  ## run the benchmarks; BENCH="throughput ..." selects some
	@for name in $(BENCH); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

clean:  ## remove caches and build folders, but not .venv, data and runs
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
