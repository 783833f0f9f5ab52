# Everything one does with this project. `make` alone lists the targets.
#
#   make train ARGS="--epochs 3"     arguments for the program
#   make train CONFIG=eight_gpus     another file of configs/accelerate/
#   make env PYTHON=python3.12       another Python; VENV=/elsewhere, another place

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# Chapters tested at the same time; each gets its share of the cores.
WORKERS ?= $(shell echo $$(( $(CORES) < 4 ? $(CORES) : 4 )))
# Tests run at the same time: one more than chapters, since some of them wait for processes that they have started.
TESTERS ?= $(shell echo $$(( $(WORKERS) + 1 )))
# How `make train` starts: one process, on a GPU when there is one.
CONFIG ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo one_gpu || echo one_cpu)

RUNS = $(addsuffix /predictions.png,$(addprefix runs/,detr masks panoptic))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
THREADS = $(shell echo $$(( $(CORES) > $(WORKERS) ? $(CORES) / $(WORKERS) : 1 )))
RUN_TESTS = MPLBACKEND=agg OMP_NUM_THREADS=$(THREADS) PATH="$(abspath $(BIN)):$$PATH"

SETTING ?=

.PHONY: help env chapter diffs train test test-slow test-machines test-book book bench race lint export check clean constraints

# `make chapter NAME`: what stands after `chapter` are names of notebooks, not targets.
ifeq (chapter,$(firstword $(MAKECMDGOALS)))
CHAPTERS := $(wordlist 2,$(words $(MAKECMDGOALS)),$(MAKECMDGOALS))
$(eval .PHONY: $(CHAPTERS))
$(eval $(CHAPTERS):;@:)
endif

help: ## this list
	@echo "detr_nb: a DETR you read, run and train"
	@echo
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

env: $(STAMP) ## create .venv and install the package and the book's tools into it

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no '$(PYTHON)'. Install Python 3.10 or newer, or name one: make env PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $$($(PYTHON) --version) is too old, 3.10 or newer is needed. Name another: make env PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot create environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "make: installing into $(VENV) (torch is large; the first time takes minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

chapter: env ## make chapter NAME: sync its script, export its module, run it, clean it, check its style
	@test -n "$(CHAPTERS)" || { echo "make: name a chapter: make chapter 02_boxes" >&2; exit 1; }
	@PATH="$(abspath $(BIN)):$$PATH" python tools/chapter.py $(CHAPTERS) $(ARGS)
	@$(BIN)/ruff check $(foreach name,$(CHAPTERS),nbs/$(name).ipynb)

diffs: ## tell git in this clone to show notebooks as text, without their pictures
	@git config diff.jupyter.textconv '"$(abspath $(BIN))/jupytext" --from ipynb --to py:percent --opt notebook_metadata_filter=-all --output -'
	@git config diff.jupyter.cachetextconv true

train: env ## train and evaluate, on the GPU if there is one; without ARGS what learns fastest on the embedded set
	@PATH="$(abspath $(BIN)):$$PATH" accelerate launch --config_file configs/accelerate/$(CONFIG).yaml \
		$(if $(findstring one_cpu,$(CONFIG)),--num_cpu_threads_per_process $(CORES)) -m detr_nb.train $(or $(ARGS),shapes_dino)

test: env ## run every chapter, compare what its cells say with what is saved, then tests/
	@start=$$SECONDS; \
	echo "make: running the chapters, $(WORKERS) at a time; what they say must be what they have saved"; \
	$(RUN_TESTS) python tools/chapter.py --check --workers $(WORKERS); \
	echo "make: running tests/"; \
	$(RUN_TESTS) pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder; \
	echo "make: all chapters and tests passed in $$(( SECONDS - start )) s"

test-slow: env $(RUNS) ## run the slow tests and the slow cells of the chapters as well; first trains what they read
	@start=$$SECONDS; \
	$(RUN_TESTS) python tools/chapter.py --check --workers $(WORKERS) --flags slow; \
	$(RUN_TESTS) pytest -m "not book" -n $(TESTERS) --dist loadfile --no-loadscope-reorder; \
	echo "make: all chapters and tests, slow ones too, passed in $$(( SECONDS - start )) s"

test-machines: env ## run what another machine could fail, in settings like those; SETTING=default runs one of them
	@PATH="$(abspath $(BIN)):$$PATH" python tools/test_machines.py $(SETTING)

bench: env ## our speed beside other implementations: prints a table and writes nbs/bench.md and nbs/bench.json
	@PATH="$(abspath $(BIN)):$$PATH" python benchmarks/bench.py --output nbs

race: env runs/detr/predictions.png ## what each idea after DETR gives: hours; ARGS="--epochs 1 --limit_val 250" for minutes
	@PATH="$(abspath $(BIN)):$$PATH" python benchmarks/race.py $(ARGS)

# The runs that slow cells read. Their last act is a picture, so who has it has come to the end.
runs/detr/predictions.png: | env
	@$(MAKE) train ARGS="shapes --output_dir runs/detr --resume auto"

runs/masks/predictions.png: | runs/detr/predictions.png
	@$(MAKE) train ARGS="--masks --frozen_weights runs/detr/best.pth --output_dir runs/masks --resume auto"

runs/panoptic/predictions.png: | runs/detr/predictions.png
	@$(MAKE) train ARGS="--masks --dataset_file coco_panoptic --finetune runs/detr/best.pth --keep_classes \
		--output_dir runs/panoptic --resume auto"

book: env ## build the pages of the book, warnings as errors
	@PATH="$(abspath $(BIN)):$$PATH" jupyter-book build nbs -W -n --keep-going -q
	@echo "make: the book is at nbs/_build/html/index.html"

test-book: book ## look at every page in Chromium (BROWSER=path), at two widths, and touch its figures
	@$(BIN)/python -m pytest -q -n 2 -m book -rs

lint: env ## check the style of package, tests, tools and notebooks
	@$(BIN)/ruff check .

export: env ## write the package from the notebooks
	@cd "$(CURDIR)" && PATH="$(abspath $(BIN)):$$PATH" nbdev_export

check: ## all that continuous integration checks
	@.ci/run

constraints: env ## pin again what `make env` installs (keeps the pins that still hold)
	@$(BIN)/python -m pip install --quiet uv
	@UV_CUSTOM_COMPILE_COMMAND="make constraints" $(BIN)/uv pip compile --quiet --universal --python-version 3.10 \
		--extra dev --no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml -o $(CONSTRAINTS)

clean: ## remove what was built; keeps .venv, data/ and runs/
	@rm -rf nbs/_build .pytest_cache .ruff_cache .hypothesis detr_nb/_modidx.py
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
