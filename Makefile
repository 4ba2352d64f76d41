# make demo    train a small GPT on English text and print its gradient noise scale, layer by layer
# make test    format, lint, types and tests
# make test-more    several ranks through Inductor, and more kinds of sharding
# make test-models    whole models of the transformers library against per-example autograd
# make bench    the tables of benchmarks/results that time something; wants an idle machine. make bench-peers: other libraries
# All create .venv the first time; set PYTHON to choose the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS := benchmarks/results

.DEFAULT_GOAL := help
.PHONY: help demo test test-more test-models lint bench bench-peers clean
.SECONDARY:

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(MAKEFILE_LIST)

demo: $(VENV)/installed-demo
	$(BIN)/python examples/train_gpt.py $(ARGS)

test: lint
	@$(BIN)/python -m tests.triton.releases
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not more" $(ARGS)

test-more: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m more $(ARGS)

test-models: $(VENV)/installed-test $(VENV)/installed-models
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/transformers $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/step_time.py --out $(RESULTS)/step_time
	$(BIN)/python benchmarks/memory.py --out $(RESULTS)/memory
	$(BIN)/python benchmarks/compile_time.py --out $(RESULTS)/compile_time
	$(BIN)/python benchmarks/scaling.py --out $(RESULTS)/scaling
	$(BIN)/python benchmarks/host_time.py
	$(BIN)/python -m benchmarks.paths --modelled --out $(RESULTS)/paths

bench-peers: $(VENV)/installed-test $(VENV)/installed-peers
	$(BIN)/python benchmarks/step_time.py --peers --variants eager all --out $(RESULTS)/peers

clean:
	rm -rf $(VENV)

# One stamp per extra: nothing is installed again until the requirements change.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[$*]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
