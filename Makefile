# From a fresh clone each of these does everything: `make demo` shows the method, `make test` checks the project.
# Both make .venv first; it is kept, and made anew only when pyproject.toml or constraints.txt change.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# The build of PyTorch that .venv has; another one that is asked for makes it anew.
BUILT := $(shell cat $(VENV)/.build 2>/dev/null)
# cpu pulls no CUDA package; on a GPU machine give PyTorch's name of the build instead, as in: make setup TORCH_BUILD=cu130
TORCH_BUILD ?= $(or $(BUILT),cpu)
ifeq ($(shell uname -s),Darwin)
TORCH_SPEC := torch==$(TORCH)
else
TORCH_SPEC := torch==$(TORCH)+$(TORCH_BUILD)
endif
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(VENV)/bin/python -m pip install -qq --progress-bar off
# One thread a process: two ranks on two cores would otherwise fight for them.
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# Most tests start one to four ranks of their own.
TEST_PROCESSES ?= 2
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.PHONY: help demo test faults setup format clean

help:
	@echo "make demo    calibrate, train with ZeRO-3 on two CPU processes, export and evaluate a small LLaMA"
	@echo "make test    lint, types and all tests"
	@echo "make faults  kills, full disks and broken networks, all of them (an hour)"
	@echo "make setup   only what both need: .venv with everything in it"
	@echo "make format  let ruff order imports and lay out the code"
	@echo "make clean   remove .venv and caches; runs/ stays"

demo: $(READY)
	@$(RUN) $(OFFLINE) CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu deepspeed --quiet --num_accelerators 2 launch/train.py --recipe tiny_math

test: $(READY)
	@echo "== lint"; $(RUN) ruff check .; $(RUN) ruff format --check .
	@echo "== types"; $(RUN) mypy
	@echo "== tests"; $(RUN) $(OFFLINE) DS_ACCELERATOR=cpu python -m pytest -n $(TEST_PROCESSES) \
		--no-loadscope-reorder --durations=25

# Short selections of these are part of the tests; the figures go to build/faults.json.
faults: $(READY)
	@$(RUN) $(OFFLINE) DS_ACCELERATOR=cpu NSLORA_FAULTS=full python -m pytest tests/faults --durations=10

setup: $(READY)

ifneq ($(TORCH_BUILD),$(BUILT))
.PHONY: $(READY)
endif
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else \
		"error: Python 3.11 or 3.12 is needed, $(PYTHON) is %d.%d; give another: make PYTHON=python3.11" % v)'
	@rm -f $@
	@test -x $(VENV)/bin/python || { echo "== .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@test -z "$(BUILT)" -o "$(BUILT)" = "$(TORCH_BUILD)" || $(VENV)/bin/python -m pip uninstall -qq -y torch
	@echo "== installing $(TORCH_SPEC) (200 MB and more)"
	@$(PIP) "$(TORCH_SPEC)" $(TORCH_INDEX) -c constraints.txt 2>/dev/null || { \
		echo "== pip's sources have no such build: taking their torch==$(TORCH), which may bring CUDA packages along"; \
		echo "   (to avoid that: make TORCH_INDEX='--index-url URL' with that build's index, from PyTorch's install page)"; \
		$(PIP) "torch==$(TORCH)" -c constraints.txt; }
	@echo "== installing nslora_dist and what it needs, pinned in constraints.txt (a few minutes)"
	@$(PIP) -c constraints.txt -e ".[dev]"
	@echo $(TORCH_BUILD) > $(VENV)/.build
	@touch $@
	@echo "== ready"

format: $(READY)
	@$(RUN) ruff check --fix .; $(RUN) ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
