# Every target sets up .venv on its own; a second run does nothing but its job.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
NATIVE := $(sort $(shell find csrc -type f))

.PHONY: demo test test-packaging bench cuda-all lint format setup clean

demo: setup
	$(BIN)/mimnet-fast demo

# Two workers share the cores: a thread that spins while it waits takes them from the other.
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist worksteal --durations 20

test-packaging: setup
	$(BIN)/pytest -m packaging

bench: setup
	$(BIN)/python -m bench.compare --render

# Every kernel for every architecture that is served, with its registers and shared memory.
cuda-all: setup
	$(BIN)/python tests/compiled.py triton 80 90 100
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/compiled.py cuda 80 86 89 90 100 120

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy mimnet_fast
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

setup: .venv/installed

# Python changes need no new install; changes of the native sources and of the build do.
.venv/installed: .venv/torch pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	$(PIP) --no-build-isolation --editable ".[dev,test]"
	touch $@

# torch first and pinned: whatever asks for it later finds it there.
.venv/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mimnet_fast needs Python 3.10 or newer, got $$($(PYTHON) --version 2>&1):" \
	    "run make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) setuptools cmake ninja pybind11
	touch $@

clean:
	rm -rf .venv build dist mimnet_fast.egg-info mimnet_fast/_build_info.json mimnet_fast/_*.so
