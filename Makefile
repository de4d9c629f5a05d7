# make quickstart   set up, pack the mini world, tune the four tasks, evaluate, print one table
# make test         set up and run the tests
# make lint         ruff and mypy
# make clean        remove what the commands above made, but not the environment (make distclean: that too)

SHELL  := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed
RUN    ?= runs/quickstart
SEED   ?= 0

# First on PATH, so that DeepSpeed finds the environment's ninja when it compiles its C++ op.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# Threads wait without spinning: beside another busy program, spinning ones make the evaluation many times slower.
export OMP_WAIT_POLICY ?= passive

# All GPUs (the largest power of two of them, so that the global batch divides), or two ranks on the CPU.
GPUS  := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
RANKS ?= $(shell n=$(GPUS); if [ "$$n" -ge 1 ]; then p=1; while [ $$((2*p)) -le "$$n" ]; do p=$$((2*p)); done; echo $$p; else echo 2; fi)
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# Ranks that each start a thread per core slow one another down.
RANK_THREADS := $(shell t=$$(( $(CORES) / $(RANKS) )); [ $$t -ge 1 ] && echo $$t || echo 1)

.PHONY: install quickstart test lint clean distclean
.DEFAULT_GOAL := quickstart

install: $(STAMP)

$(STAMP): setup.py
	[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	$(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]'
	touch $@

quickstart: $(STAMP)
	$(VENV)/bin/python pipeline/shard_mmud.py
	OMP_NUM_THREADS=$(RANK_THREADS) $(VENV)/bin/deepspeed --num_gpus $(RANKS) pipeline/train.py \
	    --deepspeed ds_configs/z2.json --output_dir $(RUN) --seed $(SEED)
	$(VENV)/bin/python pipeline/evaluate_mmud.py --checkpoint $(RUN) --condition all

test: $(STAMP)
	$(VENV)/bin/python -m pytest

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf runs build *.egg-info mlruns mlflow.db .pytest_cache .mypy_cache .ruff_cache
	find shards -mindepth 1 ! -name FORMAT.md -delete 2>/dev/null || true
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
