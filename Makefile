# Every command a newcomer needs. `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-slow lint clean
help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY)  ## run the whole DAG on the embedded data set: captioned URLs in, pictures out (about ten minutes)
	$(BIN)/python -m pipelines.run

test: $(READY)  ## lint and pass the tests
	$(BIN)/ruff check --no-cache .
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(READY)  ## the long tests
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(READY)  ## check style
	$(BIN)/ruff check --no-cache .

clean:  ## remove the environment (outputs/ is yours and stays)
	rm -rf $(VENV)

# The environment is remade when what it is made of changes.
$(READY): pyproject.toml infra/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c infra/constraints.txt -e '.[test]'
	touch $@
