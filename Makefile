# Two commands do everything on a machine with Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The newest Python found beside the first; `make test-all` runs the tests there too.
NEWEST ?= $(shell for version in 3.14 3.13 3.12; do \
  for python in python$$version $$HOME/.pyenv/versions/$$version*/bin/python3; do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { command -v $$python; break 2; }; \
  done; done)

.PHONY: demo test test-quick test-all test-newest mutants lint docs lock clean

demo: $(VENV)/.installed
	$(BIN)/fineline demo --out demo-out

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 8 --dist loadfile --durations 10 $(PYTEST)

# The inner loop: what takes no more than seconds. `make test-quick PYTEST=--lf`: what failed last time, first of all.
test-quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow and not medium" -n logical --maxprocesses 8 --dist loadfile $(PYTEST)

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST)
	$(MAKE) test-newest

test-newest:
ifeq ($(NEWEST),)
	@echo "no Python newer than 3.11 found: set NEWEST=/path/to/python to test there too"
else
	$(MAKE) test VENV=.venv-newest PYTHON=$(NEWEST) EXTRA=check
endif

# Every slip of tests/mutants/*.tsv in a copy of the tree, one at a time: do the tests notice it?
mutants: $(VENV)/.installed-test
	$(BIN)/python tests/mutants $(MUTANTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site of docs/, in site/; a warning is an error. The variable silences mkdocs-material's note on its successor.
docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# test: with torch, the oracle of the parity tests; check: without it, and they skip.
EXTRA ?= test

$(VENV)/.installed: setup.py pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[$(EXTRA)]'
	touch $@

# The pins for every supported Python, with markers; names no host.
lock: pyproject.toml
	$(PYTHON) -m pip install --quiet uv
	$(PYTHON) -m uv pip compile pyproject.toml --extra test --extra plan --universal --python-version 3.11 \
	  --no-header --no-annotate --no-emit-index-url --output-file requirements.lock

clean:
	rm -rf $(VENV) .venv-newest demo-out build *.egg-info
