# `make demo` and `make test` do all the set-up on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BROWSER := $(VENV)/.browser

.PHONY: demo test test-all test-oldest test-newest check sanitize format docs dist clean

demo: $(READY)
	$(BIN)/gossamer train --config digits-chase --overwrite

test: $(READY) $(BROWSER)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow and not gpu"

test-all: $(READY) $(BROWSER)
	$(BIN)/python -m pytest

# With the oldest versions that pyproject.toml allows, and with the newest there are, on PYTHON: each
# downloads gigabytes, since PyTorch comes with CUDA. Other versions warn of other things.
test-oldest: RESOLUTION = lowest-direct
test-newest: RESOLUTION = highest
test-oldest test-newest: test-%:
	test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)-$*/bin/uv pip install --quiet --python $(VENV)-$*/bin/python --resolution $(RESOLUTION) -e ".[dev]"
	$(VENV)-$*/bin/python -m pytest -n auto --maxprocesses 4 -m "not slow and not gpu" \
		-W ignore::DeprecationWarning -W ignore::FutureWarning

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The sparse kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize:
	$(MAKE) -C csrc sanitize

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/mkdocs build --strict
	@echo "open site/index.html"

dist: $(READY)
	$(BIN)/python -m build --no-isolation

# torch first and pinned: a plain `torch` would bring gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

# Tried once: where there is none to be had, the tests that want one are skipped.
$(BROWSER): | $(READY)
	$(BIN)/python tests/browser.py
	touch $(BROWSER)

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist site .pytest_cache .mypy_cache .ruff_cache
