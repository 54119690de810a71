# `make chat` and `make test` set up a fresh machine. Works with the make 3.81 of macOS.

MODEL = demo
VENV = .venv
PY = $(VENV)/bin/python
CANDIDATES = $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10

# The first Python that is new enough and can create virtual environments.
FIND_PYTHON = for p in $(CANDIDATES); do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo "$$p"; break; }; done

NO_PYTHON = make: no Python 3.10 or newer with venv found; install one (macOS: brew install python; \
	Debian: apt install python3-venv) or name it: make PYTHON=/path/to/python3

# Remove a virtual environment whose Python is gone, for instance after a system upgrade.
GONE := $(shell test -d $(VENV) && ! $(PY) -c '' >/dev/null 2>&1 && rm -rf $(VENV))

.PHONY: help chat test test-fast lint bench vendor clean

help:
	@echo 'make chat       chat with a model (MODEL=demo; MODEL=folder or a Hugging Face id)'
	@echo 'make test       lint, then every test, on every core'
	@echo 'make test-fast  lint, then the tests that are not marked slow'
	@echo 'make lint       ruff and mypy'
	@echo 'make bench      benchmarks beside mlx-lm: a table and plots in bench/ (about an hour)'
	@echo 'make vendor     copy the libraries of the chat page out of their npm packages again (needs npm)'
	@echo 'make clean      remove the virtual environment and the caches'

chat: $(VENV)/runtime.stamp
	@$(PY) -m phi4_mlx.chat --model '$(MODEL)'

# loadfile: the tests of a file share servers and trained models, so they stay in one process.
test: lint
	$(PY) -m pytest -n auto --dist loadfile

test-fast: lint
	$(PY) -m pytest -n auto --dist loadfile -m 'not slow'

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(VENV)/dev.stamp
	$(PY) tests/bench

vendor:
	python3 tests/e2e/page/vendor.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist phi4_mlx.egg-info

# Stamps let a second `make` start at once. They are in the environment and are deleted with it.
$(VENV)/runtime.stamp: setup.py pyproject.toml
	@$(PY) -c 'import pip' >/dev/null 2>&1 && exit 0; \
	python=`$(FIND_PYTHON)`; \
	if test -z "$$python"; then echo '$(NO_PYTHON)' >&2; exit 1; fi; \
	rm -rf $(VENV); "$$python" -m venv $(VENV)
	@echo 'Installing into $(VENV); later runs skip this.'
	@$(PY) -m pip install --disable-pip-version-check --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	@$(PY) -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@
