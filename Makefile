# A virtual environment of its own, made once; every target needs Python 3.10+ and make, nothing else.
PYTHON ?= python3
# Any from 2.11 to 2.15 works; other Tritons spill registers in a few kernels whose tests count them.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV ?= .venv
# Processes that run tests, a core each.
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test test-gpu lint clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo/run.py

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m gpu

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)" "$(TRITON)"
	$(BIN)/python -m pip install -q -e ".[test,quantize]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info demo-output
