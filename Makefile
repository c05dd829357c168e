PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICK := architecture config direct experts methods_sphere methods_units networks optimizer penalty ppo ranks rollout runs statistics
TORCH ?= torch==2.13.*
# Without a GPU PyTorch's CPU build, where its index is in reach: the default one brings gigabytes of CUDA.
TORCH_FROM ?= $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15)

.PHONY: demo test quick lint bench docs clean

demo: $(VENV)/.installed  ## train with and without SPHERE on two MetaWorld tasks, about five minutes
	$(BIN)/sphere demo

test: $(VENV)/.installed-test  ## every test
	$(BIN)/pytest -n auto --dist worksteal

quick: $(VENV)/.installed-test  ## what matters to an edit, in less than a minute: formulas, steps, configuration, folders
	$(BIN)/ruff check
	$(BIN)/pytest -q -n auto -m 'not slow' $(addprefix tests/test_,$(addsuffix .py,$(QUICK)))

lint: $(VENV)/.installed-test  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed-bench  ## speed, as ratios measured side by side
	$(BIN)/python benchmarks/all.py

docs: $(VENV)/.installed-docs  ## this documentation as a site in site/
	$(BIN)/mkdocs build --strict

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH_FROM) '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[all]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --editable '.[test,bench]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV)
