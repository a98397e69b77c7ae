PYTHON ?= python3.11
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

# Without bytecode every process compiles NeMo anew, which takes longer than importing it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-thorough lint clean

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

demo: setup
	$(PY) examples/megatron_gpt_finetuning.py model.peft.peft_scheme=tied_lora

# Tests read and write UTF-8.
test test-thorough: export LC_ALL = C.UTF-8

test: setup lint
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not thorough"

# Half an hour: all layouts with all methods, hundreds of kills.
test-thorough: setup lint
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build *.egg-info
