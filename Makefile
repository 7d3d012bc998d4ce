# Everything a newcomer needs: `make demo`. Plain pip, one virtual environment, state in $TUNELOOM_HOME (.tuneloom).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

TORCH := $(shell grep '^torch==' requirements.lock)
READY := $(VENV)/.ready

.PHONY: venv up down demo parts test test-cloud check conformance

venv: $(READY)

# torch first, alone: the package index has a build with CUDA (gigabytes) and may be joined by one with the CPU build;
# set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to choose. The lock names every package, so there is nothing to resolve.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tuneloom needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch (about 190 MB)"
	$(PIP) install -c requirements.lock $(TORCH)
	@echo "installing the other packages (about 600 MB on disk)"
	$(PIP) install --no-deps -r requirements.lock
	$(PIP) install --no-deps -e .
	$(PIP) check
	@touch $@

up: venv
	$(BIN)/tuneloom up

down:
	@if [ -x $(BIN)/tuneloom ]; then $(BIN)/tuneloom down; else echo "nothing is installed here, so nothing runs"; fi

demo: up
	@exports=$$($(BIN)/tuneloom env) && eval "$$exports" && $(BIN)/python -u examples/headlines.py

# Two at a time: one begins with tests/e2e, the other with the rest. `make test IN_PARALLEL=` runs one after another.
IN_PARALLEL ?= -n 2 --no-loadscope-reorder

# The real servers that tests talk to: installed here if they are missing, started and ended by the tests.
parts: venv
	$(BIN)/python -m tests.parts

test: parts
	$(BIN)/python -m pytest -q --durations=30 $(IN_PARALLEL)

# Only the cloud parts (Firestore, Cloud Storage, Firebase Auth, Redis) and what several owners need: keys, limits, usage,
# webhooks, drafting. Part of `make test`.
test-cloud: parts
	$(BIN)/python -m pytest -q -m cloud --durations=15 $(IN_PARALLEL)

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# Against what `make up` has started, or the server that OPENAI_BASE_URL and OPENAI_API_KEY (an admin's) name.
conformance: venv
	@if [ -z "$$OPENAI_BASE_URL" ]; then exports=$$($(BIN)/tuneloom env) && eval "$$exports"; fi && \
	  $(BIN)/python -m tests.conformance
