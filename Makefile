# `make run` and `make test` do all their own set-up; a second call installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python scripts/install.py

.PHONY: help run viz test lint test-slow test-cluster house verify-recipe verify-full-size bench bench-long bench-gpu bench-gpu-packages bench-scale bench-peers base-model lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: $(VENV)/.installed ## the embedded default: pictures in, adapter and before/after report out
	$(BIN)/kedro run

viz: $(VENV)/.installed ## look at pipelines and artifacts in the browser
	$(BIN)/qwen-vl-lora viz

# Many tests wait for another process or for a limit of time, so one process more than cores keeps the cores busy.
WORKERS = $(shell $(BIN)/python -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')

test: lint ## lint, types, layers and tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not cluster" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --config pyproject.toml

house: $(VENV)/.installed ## how simple the whole is: statements, settings' walk, parameters, circles (LISTS=1 shows what is behind the figures)
	$(BIN)/python scripts/house.py $(if $(LISTS),--lists)

test-slow: $(VENV)/.installed-dev ## the tests that take minutes
	$(BIN)/python -m pytest -m slow --timeout 3600

test-cluster: $(VENV)/.installed-dev ## the tests on a Ray cluster of two nodes, which they start in a network of their own
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster tests/cluster

verify-recipe: $(VENV)/.installed ## run a recipe on real weights: make verify-recipe ENV=qwen2_vl_2b_coco
	$(BIN)/python -m benchmarks.verify_recipe --env $(ENV) --params "$(PARAMS)"

verify-full-size: $(VENV)/.installed-dev ## Qwen2-VL-2B at its true sizes with random weights on a CPU, end to end (under an hour on 2 quiet cores)
	$(BIN)/python -m benchmarks.verify_full_size

bench: $(VENV)/.installed ## speed and memory against the tutorials' method (about 25 minutes on two quiet cores; MINUTES=15 leaves out what would not end by then)
	$(BIN)/python -m benchmarks.bench $(if $(MINUTES),--minutes $(MINUTES))

bench-long: $(VENV)/.installed ## the same with all workloads, the longest in five pairs (about 2.5 hours)
	$(BIN)/python -m benchmarks.bench --long

# A bare GPU host has no package index: it uses its own Python and what bench-gpu-packages unpacked.
BARE := $(if $(wildcard $(VENV)),,$(wildcard .gpu_box))

bench-gpu: $(if $(BARE),,$(VENV)/.installed-dev) ## proofs and figures of Qwen2-VL-2B and Qwen2.5-VL-7B with random weights, in 9 minutes (MINUTES=…); a second call goes on; needs a GPU
	$(if $(BARE),$(PYTHON),$(BIN)/python) -m benchmarks.gpu_box $(if $(MINUTES),--minutes $(MINUTES))

bench-gpu-packages: $(VENV)/.installed ## unpack into .gpu_box what a bare GPU host lacks
	$(BIN)/python -m benchmarks.gpu_box.bring

bench-scale: $(VENV)/.installed ## data_engineering of 100,000, 500,000 and 1,000,000 rows: peak memory and time of a row (about 10 minutes)
	$(BIN)/python -m benchmarks.scale

bench-peers: $(VENV)/.installed ## the same work in TRL, ms-swift and LLaMA-Factory, each in its own environment
	$(BIN)/python -m benchmarks.peers.run

base-model: $(VENV)/.installed ## rebuild the tiny base from nothing
	$(BIN)/kedro run --pipeline base_model

lock: ## pin the newest versions that pyproject.toml allows (needs uv)
	uv pip compile --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --quiet \
		--upgrade --extra viz pyproject.toml -o requirements.txt
	uv pip compile --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --quiet \
		--extra viz --extra dev -c requirements.txt pyproject.toml | grep -vxFf requirements.txt > requirements-dev.txt

clean: ## remove everything that runs made, but not the environment
	git clean -fdxq data logs

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| (echo "Python 3.11 to 3.13 is needed; name one: make PYTHON=python3.12 …" && exit 1)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing about 7 GB into $(VENV). On a fresh machine this takes 3 to 10 minutes, depending on the network; later calls install nothing."
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -e .
	$(BIN)/python -m compileall -q src # where PYTHONDONTWRITEBYTECODE is set, each start would compile anew
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-vocabulary.txt $(VENV)/.installed
	$(INSTALL) -r requirements-dev.txt
	$(INSTALL) --no-deps -r requirements-vocabulary.txt
	touch $@
