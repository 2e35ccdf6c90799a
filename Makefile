# Everything runs in .venv, which `make install` sets up. PYTHON=/path/to/python chooses another interpreter.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
WORKERS ?= 2

.PHONY: help install demo test slow peers check sanitize sanitized corruptions neon bench clean

help: ## Show this list.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13

install: $(STAMP) ## Set up .venv with secateur and all that its tests need.

# The candidates are run, not only looked up: a version manager leaves names on PATH that do not start.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*.h)
	@set -e; \
	for candidate in $(or $(PYTHON),python3.11 python3 python3.12 python3.13); do \
		if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			found=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "make: no Python 3.11 or newer with its venv module was found (tried $(or $(PYTHON),python3.11 python3 python3.12 python3.13))." >&2; \
		echo "make: install one (Debian: apt-get install python3.11 python3.11-venv) or say make PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	echo "using $$found ($$($$found --version))"; \
	$$found -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Derive a Python sub-model of a small real model, and print it beside its parent.
	$(BIN)/python benchmarks/demo.py

test: $(STAMP) ## Run all tests but the slow ones.
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

slow: $(STAMP) ## Run the tests that need a real model or the network.
	$(BIN)/python -m pytest -m 'slow and not peers'

peers: $(STAMP) ## Install llama.cpp (minutes), and run the tests of files that are written for it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,peers]'
	$(BIN)/python -m pytest -m peers

check: $(STAMP) ## Lint, format, types and the direction of imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The drivers of the native code, each with a main of its own: built with all of csrc, run, and to exit with 0.
DRIVERS := $(patsubst tests/native/%.cpp,%,$(wildcard tests/native/*.cpp))
NATIVE_SOURCES := $(wildcard csrc/*.cpp)
NATIVE_HEADERS := $(wildcard csrc/*.h tests/native/*.h)
NATIVE_FLAGS := -std=c++17 -Wall -Wextra -Wno-psabi -Icsrc -pthread
SANITIZED := build/sanitized
SANITIZE := $(NATIVE_FLAGS) -fPIC -O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED_LIBRARY := $(SANITIZED)/package/secateur/runtime/_kernels.so
ARM := build/arm
ARM_CXX ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64

$(SANITIZED)/%.o: csrc/%.cpp $(NATIVE_HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -c $< -o $@

$(SANITIZED)/%: tests/native/%.cpp $(NATIVE_SOURCES:csrc/%.cpp=$(SANITIZED)/%.o) $(NATIVE_HEADERS)
	$(CXX) $(SANITIZE) $(filter-out %.h,$^) -o $@

# A copy of the package with the library in its place. Nothing that is installed can be told to load another library.
$(SANITIZED_LIBRARY): $(NATIVE_SOURCES:csrc/%.cpp=$(SANITIZED)/%.o) $(shell find src/secateur -name '*.py')
	@mkdir -p $(SANITIZED)/package
	cp -R src/secateur $(SANITIZED)/package/
	$(CXX) $(SANITIZE) -shared $(filter %.o,$^) -o $@

sanitized: $(SANITIZED_LIBRARY) ## Build the Python package with its native code under sanitizers.

corruptions: $(STAMP) ## Damage small checkpoints 1,000 times for each kind of values, under sanitizers; minutes.
	$(BIN)/python -m tests.runtime.sanitized

sanitize: $(DRIVERS:%=$(SANITIZED)/%) ## Run the native code on random and damaged input under sanitizers; needs no .venv.
	@set -e; for driver in $^; do echo $$driver; $$driver; done

$(ARM)/%.o: csrc/%.cpp $(NATIVE_HEADERS)
	@mkdir -p $(@D)
	$(ARM_CXX) $(NATIVE_FLAGS) -O2 -c $< -o $@

$(ARM)/%: tests/native/%.cpp $(NATIVE_SOURCES:csrc/%.cpp=$(ARM)/%.o) $(NATIVE_HEADERS)
	$(ARM_CXX) $(NATIVE_FLAGS) -O2 -static $(filter-out %.h,$^) -o $@

# One processor with dot products of bytes, one without; a quarter of the rounds.
neon: $(DRIVERS:%=$(ARM)/%) ## The same without sanitizers for ARM, under emulation (g++-aarch64-linux-gnu, qemu-user).
	@set -e; for driver in $^; do for cpu in max cortex-a72; do \
		echo $$driver on $$cpu; $(QEMU) -cpu $$cpu $$driver 25; \
	done; done

bench: $(STAMP) ## Measure what a derivation costs, on an idle machine.
	$(BIN)/python benchmarks/derive_cost.py demo

clean: ## Remove .venv, the demo's output, and everything that tools have left.
	rm -rf $(VENV) demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf src/*.egg-info src/secateur/runtime/_kernels.so
