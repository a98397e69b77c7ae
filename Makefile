PYTHON ?= python3.11
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

# Without bytecode every process compiles NeMo anew, which takes longer than importing it.
unexport PYTHONDONTWRITEBYTECODE

# The environment of vLLM and llama.cpp.
SERVING := .venv-serving

.PHONY: setup demo test test-thorough test-serving lint clean

setup: $(STAMP)

# The pins in requirements.txt are the full closure, so pip has nothing left to resolve. Python compiles what it imports;
# compiling all of it here would double the time.
$(STAMP): requirements.txt setup.py
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or pass PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) tools/install.py requirements.txt
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
	@echo "done; to see it work: make demo; to use it: source $(VENV)/bin/activate"

# Without any: the built-in base learns its own task. BASE=smollm2: a real language model, fetched once. DATA=rows.jsonl:
# what it learns.
demo: setup
	$(PY) tools/demo.py $(if $(BASE),'BASE=$(BASE)') $(if $(DATA),'DATA=$(DATA)')

# Tests read and write UTF-8.
test test-thorough test-serving: export LC_ALL = C.UTF-8

test: setup lint
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not thorough"

# An hour: all layouts with all methods, hundreds of kills, adapters served by vLLM and llama.cpp.
test-thorough: setup lint test-serving
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-serving: setup $(SERVING)/.installed
	SERVING_PYTHON=$(SERVING)/bin/python SERVING_RESULTS=docs/serving.json $(PY) -m pytest -v tests/serving

# What is uninstalled was built for another torch: with it vLLM cannot import Llama.
$(SERVING)/.installed: tests/serving/requirements.txt
	@echo "setting up $(SERVING): 3.5 GB"
	@$(PYTHON) -m venv $(SERVING)
	@$(SERVING)/bin/python -m pip install -qq --disable-pip-version-check -r tests/serving/requirements.txt
	@$(SERVING)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(SERVING) build *.egg-info
