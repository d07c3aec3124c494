# Two jobs for a fresh clone with Python 3.11+ and make: `make demo` and `make test`. Both are safe to repeat.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUNS   ?= runs

# An unpinned torch may bring gigabytes; the constraints pin the build that the project is tested with.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint unit smoke docs clean

demo: $(VENV)/.package
	$(BIN)/torchfolio demo -o demo

test: lint unit smoke docs

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# Two workers with one thread each: tests are small, and threads that fight over two cores are slower than none.
unit: $(VENV)/.test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

smoke: $(VENV)/.test
	$(BIN)/torchfolio run --all --scale smoke --jobs 2 --out $(RUNS)/smoke
	$(BIN)/torchfolio report $(RUNS)/smoke --output $(RUNS)/smoke/report.html

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(INSTALL) -e ".[test,ray,tensorboard,convex,verify,draw,graph,text,diffusion]"
	touch $@

$(VENV)/.docs: $(VENV)/.package
	$(INSTALL) -e ".[docs]"
	touch $@
