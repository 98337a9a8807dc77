# make demo   a fresh clone becomes an environment, a compressed model and a report
# make test   environment, lint, types, quick tests      make slow   the proofs that take minutes
# make clean  what make made

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test slow lint types clean environment

demo: $(VENV)/.demo
	$(BIN)/svlm compress demo -r default -o $(OUT) --overwrite

test: $(VENV)/.test lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .

# mypy wants a folder named as the package: a folder of links to what the package consists of
PACKAGE := __init__.py __main__.py cli.py py.typed calib compress passes recipes
types: $(VENV)/.test
	rm -rf build/types && mkdir -p build/types/svlm
	for name in $(PACKAGE); do ln -s "$(CURDIR)/$$name" build/types/svlm/; done
	MYPYPATH=build/types $(BIN)/mypy -p svlm

# One environment, made once for each state of the files that say what belongs in it; torch first, so that nothing
# that depends on it can choose another build.
environment: $(VENV)/.test

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
