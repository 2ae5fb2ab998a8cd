# Every target that runs something depends on `setup`, and prints the plain command it runs.
# Variables: make TARGET NAME=value. `make help` lists targets and variables.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Bring your own build: TORCH="torch==2.11.0 torchvision==0.26.0 --index-url https://..."
TORCH ?= torch==2.15.0 torchvision==0.29.2

DATA ?= imagenet
DATA_ROOT ?=
SPLIT ?= train
RECIPE ?= $(if $(filter imagenet,$(DATA)),imagenet_256,small)
CKPT ?= outputs/tokenizer/$(DATA)
TOKENS ?= outputs/tokens/$(DATA)/train
MODEL ?= b
AR_CKPT ?= outputs/ar/$(MODEL)
SAMPLING ?= $(if $(filter b l xl,$(MODEL)),+sampling=$(MODEL))
RUN ?= outputs/eval/$(notdir $(CKPT))
ARGS ?=

PY := $(VENV)/bin/python
READY := $(VENV)/.ready-$(shell echo '$(TORCH)' | cksum | cut -d' ' -f1)
ROOT := $(if $(DATA_ROOT),data.root='$(DATA_ROOT)')

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18
	@echo
	@echo 'variables: DATA=digits|folder|imagenet|webdataset DATA_ROOT=FOLDER SPLIT=train|val CKPT=TOKENIZER'
	@echo '           TOKENS=SHARDS MODEL=tiny|b|l|xl AR_CKPT=AR_RUN RUN=RESULTS ARGS="key=value ..." TORCH="..."'

.PHONY: setup
setup: $(READY)  ## make .venv: PyTorch, the three packages (editable) and the development tools

$(READY): pyproject.toml constraints.txt $(wildcard packages/*/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@echo 'installing $(TORCH) (some GB, a few minutes)'
	@$(PY) -m pip install --quiet $(TORCH)
	@echo 'installing the packages and the development tools'
	@$(PY) -m pip install --quiet -c constraints.txt -e packages/tokenizer -e packages/ar -e packages/eval --group dev
	@rm -f $(VENV)/.ready-*
	@touch $@

.PHONY: demo
demo: setup  ## the whole pipeline on built-in digits (or DATA_ROOT=FOLDER of class folders), CPU, minutes
	@PYTHON='$(PY)' DATA_ROOT='$(DATA_ROOT)' tools/demo.sh

.PHONY: test
test: setup  ## everything CI runs: format, lint, types, import contracts, tests, wheels
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 $(ARGS)

.PHONY: format
format: setup  ## format the code and mend what the linter can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

.PHONY: train-tokenizer
train-tokenizer: setup  ## train a tokenizer: DATA, DATA_ROOT, RECIPE=small|imagenet_128|imagenet_256|web_...
	$(VENV)/bin/accelerate launch --quiet -m tokenizer.train recipe=$(RECIPE) data=$(DATA) $(ROOT) out=$(CKPT) $(ARGS)

.PHONY: tokenize
tokenize: setup  ## turn images into index shards: DATA, DATA_ROOT, SPLIT, CKPT
	$(VENV)/bin/accelerate launch --quiet -m tokenizer.encode ckpt=$(CKPT) data=$(DATA) $(ROOT) data.split=$(SPLIT) out=outputs/tokens/$(DATA)/$(SPLIT) $(ARGS)

.PHONY: train-ar
train-ar: setup  ## train the auto-regressive model on index shards: MODEL, TOKENS
	$(VENV)/bin/accelerate launch --quiet -m ar.train +model=$(MODEL) data.shards=$(TOKENS) out=$(AR_CKPT) $(ARGS)

.PHONY: sample
sample: setup  ## sample from AR_CKPT and decode with CKPT into outputs/samples
	$(VENV)/bin/accelerate launch --quiet -m ar.sample $(SAMPLING) ckpt=$(AR_CKPT) out=outputs/samples/$(notdir $(AR_CKPT))/tokens $(ARGS)
	$(VENV)/bin/accelerate launch --quiet -m tokenizer.decode tokens=outputs/samples/$(notdir $(AR_CKPT))/tokens ckpt=$(CKPT) out=outputs/samples/$(notdir $(AR_CKPT))/images format=folder

.PHONY: eval
eval: setup  ## measure the reconstructions of CKPT: DATA, DATA_ROOT, RUN
	$(PY) -m eval.rfid ckpt=$(CKPT) data=$(DATA) $(ROOT) out=$(RUN) $(ARGS)

.PHONY: report
report: setup  ## write RUN/report.html from the results in RUN
	$(PY) -m eval.report run=$(RUN) $(ARGS)

.PHONY: clean
clean:  ## delete caches and built wheels (outputs/ and .venv stay)
	rm -rf dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find packages tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
