# Two commands set everything up: `make demo` and `make test`. Each makes the environment it needs;
# `make test-runtimes` adds the readers that are slow to install.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Without an NVIDIA driver the CPU build of torch is pinned: an unpinned one brings gigabytes of CUDA libraries.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS)
PYTEST_FLAGS ?=
# Two processes of one thread each; a file's tests stay together, as its fixtures do.
PARALLEL := -n 2 --dist loadfile

.PHONY: demo test test-runtimes test-gpu lint clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "eqat needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints-cpu.txt | $(BIN)/python
	@echo "installing eqat into $(VENV) (a few minutes the first time)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints-cpu.txt | $(BIN)/python
	@echo "installing eqat and its test tools into $(VENV) (a few minutes the first time)"
	$(INSTALL) -e '.[dev,gptq,compressed-tensors,gguf,mlx,onnx,auto-round,eval]' onnxruntime-genai
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-runtimes: $(VENV)/.installed-dev
	@echo "installing llama-cpp-python, which compiles llama.cpp (some 11 CPU minutes)"
	$(INSTALL) -e '.[llama-cpp]'
	@touch $@

demo: $(VENV)/.installed  ## train, export and verify the demo model: about a minute on two CPU cores
	mkdir -p demo-run
	cd demo-run && ../$(BIN)/eqat train --bits 2 --group 64 --force
	cd demo-run && ../$(BIN)/eqat export --to gptq --force
	cd demo-run && ../$(BIN)/eqat verify

test: $(VENV)/.installed-dev lint  ## the whole suite on a CPU
	$(BIN)/python -m pytest -m "not gpu and not runtimes" $(PARALLEL) $(PYTEST_FLAGS)

test-runtimes: $(VENV)/.installed-runtimes  ## the readers that are slow to install: llama.cpp
	$(BIN)/python -m pytest -m "runtimes and not gpu" $(PYTEST_FLAGS)

test-gpu: $(VENV)/.installed-dev  ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev  ## style, names and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy formats eqat_train eqat_export

clean:
	rm -rf $(VENV) demo-run build dist *.egg-info
