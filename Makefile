# `make chat` and `make test` set up a fresh machine. Works with the make 3.81 of macOS.

MODEL = demo
VENV = .venv
PY = $(VENV)/bin/python
CANDIDATES = $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10

# Without its dependencies, whose pins conflict with ours: an extra of setup.py cannot say so.
LEADERBOARD = bfcl-eval==2026.3.23

# The first Python that is new enough and can create virtual environments.
FIND_PYTHON = for p in $(CANDIDATES); do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo "$$p"; break; }; done

NO_PYTHON = make: no Python 3.10 or newer with venv found; install one (macOS: brew install python; \
	Debian: apt install python3-venv) or name it: make PYTHON=/path/to/python3

# Installs a package into $(VENV), which it creates if it has no pip, with one line of progress on standard error that is
# replaced in place on a terminal. The tools' output is kept in memory, as the disk may be full, and shown if they fail.
define INSTALLER
import os, re, shutil, subprocess, sys

live = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"

def show(text, end="\n"):
    text = text[: shutil.get_terminal_size().columns - 1]
    print("\r\033[K" + text if live else text, end="" if live else end, file=sys.stderr, flush=True)

def run(*command):
    output = []
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    for line in tool.stdout:
        output.append(line)
        if live:
            show("Installing into $(VENV), once: " + re.sub(r"(-[\w.]+){3}\.whl| \(from .*", "", line.strip()))
    if tool.wait():
        show("", end="")
        sys.exit("".join(output) + "make: not installed, for the reason above; this needs the Python package index "
                 "(PIP_INDEX_URL names a mirror) and 1 GB on the disk")

show("Installing into $(VENV), once ...")
try:
    if subprocess.call("$(PY) -c 'import pip' >/dev/null 2>&1", shell=True):
        shutil.rmtree("$(VENV)", ignore_errors=True)
        run(sys.executable, "-m", "venv", "$(VENV)")
    run("$(PY)", "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *sys.argv[1:])
except KeyboardInterrupt:
    sys.exit("\nmake: stopped; the next make goes on")
show("", end="")
endef
export INSTALLER

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
	@python=`$(FIND_PYTHON)`; \
	if test -z "$$python"; then echo '$(NO_PYTHON)' >&2; exit 1; fi; \
	"$$python" -c "$$INSTALLER" -e .
	@touch $@
	@echo 'Installed. To run the commands of README.md: source $(VENV)/bin/activate' >&2

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	@$(PY) -c "$$INSTALLER" -e '.[dev,interop]'
	@$(PY) -c "$$INSTALLER" --no-deps $(LEADERBOARD)
	@touch $@
