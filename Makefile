# Everything happens in .venv; nothing global is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help run demo install test test-oldest test-kernels lint format bench lock build clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: $(VENV)/.engine ## install if needed, then serve on 127.0.0.1:8080 with the bundled model
	@$(BIN)/hybridgate serve

demo: $(VENV)/.engine ## watch requests being routed between the bundled model and fake cloud providers
	@$(BIN)/hybridgate demo

install: $(VENV)/.dev ## install everything, tests and linters included

test: $(VENV)/.dev ## run all tests, the slow ones included
	$(BIN)/pytest

test-oldest: $(VENV)/.oldest ## the engine against the oldest transformers that it supports
	@PYTHONPATH=$(VENV)/oldest $(BIN)/python -c "import transformers; print('transformers', transformers.__version__)"
	PYTHONPATH=$(VENV)/oldest $(BIN)/pytest tests/local_engine/test_runner.py

test-kernels: $(VENV)/.kernels ## the engine's GPU kernels in Triton's interpreter and its compiler, on a CPU
	PYTHONPATH=$(VENV)/kernels TRITON_INTERPRET=1 $(BIN)/pytest tests/local_engine/test_paged.py tests/local_engine/test_fused.py
	PYTHONPATH=$(VENV)/kernels $(BIN)/pytest tests/local_engine/test_kernels.py

lint: $(VENV)/.dev ## ruff, mypy, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## let ruff format and sort
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev ## measure against a pass-through and two other gateways (makes their environments in .bench); then limits and stored answers, in memory and in Redis
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.cache --redis
	$(BIN)/python -m tests.bench.ledger --redis
	$(BIN)/python -m tests.bench.replicas

lock: $(VENV)/.dev ## resolve all dependencies anew and write requirements/*.txt
	$(BIN)/python requirements/lock.py

build: $(VENV)/.dev ## build the wheel
	$(PIP) wheel --no-deps --wheel-dir dist .

clean: ## remove the environment and all caches
	rm -rf $(VENV) .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis dist

# Each stamp is newer than what it was made from, so a second `make` installs nothing. The gateway is installed by hash; the engine by version,
# because torch's CPU and CUDA builds have different hashes.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python found: install Python 3.11 or 3.12, or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.gateway: $(VENV)/bin/python requirements/gateway.txt pyproject.toml
	$(PIP) install --quiet --require-hashes -r requirements/gateway.txt
	$(PIP) install --quiet --require-hashes -r requirements/build.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.engine: $(VENV)/.gateway requirements/engine.txt
	@echo "installing the engine (torch, transformers): some minutes the first time"
	$(PIP) install --quiet -r requirements/engine.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.engine requirements/dev.txt requirements/prometheus.sh requirements/network.sh
	$(PIP) install --quiet --require-hashes -r requirements/dev.txt
	requirements/prometheus.sh $(CURDIR)/$(VENV)/prometheus
	requirements/network.sh $(CURDIR)/$(VENV)/network
	@touch $@

# Beside the environment and in front of it: of transformers alone, because torch and the rest are the same.
$(VENV)/.oldest: $(VENV)/.dev requirements/oldest.txt
	rm -rf $(VENV)/oldest
	$(PIP) install --quiet --no-deps --require-hashes --target $(VENV)/oldest -r requirements/oldest.txt
	@touch $@

# In front of it only where the interpreter is wanted: torch for a CPU must not find it.
$(VENV)/.kernels: $(VENV)/.dev requirements/kernels.txt
	rm -rf $(VENV)/kernels
	$(PIP) install --quiet --no-deps --require-hashes --target $(VENV)/kernels -r requirements/kernels.txt
	@touch $@
