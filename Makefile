# Every target makes .venv and installs the pinned requirements when they are missing, and re-uses it when there.
PYTHON ?= python3
WORKERS ?= 2
BENCH ?=

VENV := .venv
BIN := $(VENV)/bin
TORCH := $(VENV)/.torch-installed
READY := $(VENV)/.requirements-installed
BUILT := $(VENV)/.package-built
PACKAGE := $(VENV)/.package-installed
SOURCES := setup.py pyproject.toml $(wildcard kernels/*/__init__.py csrc/*.py) \
           $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' 2>/dev/null)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# neighbours to one worker: they share processes, folders and imports
SIDE_BY_SIDE := -n $(WORKERS) --dist worksteal
HAS_TRITON = $(BIN)/python -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('triton'))"

# Python compiles what is imported, when it is, and keeps it: pip would compile all of torch and transformers.
PIP := $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-interpreter test-compile compile-all test-emulated emulate-all compile-ptxas host-time wheel test-wheel test-oldest bench docs lint format sanitize clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(PACKAGE)  ## the environment and the package in it, with the C++ extension where it builds

demo: $(BUILT)  ## train a small decoder on real text, then print what is proved about it (3 minutes)
	$(BIN)/python -m examples.demo

test: $(PACKAGE)  ## everything below, one process each; says how long each took
	@took=""; for part in test-unit test-interpreter test-compile test-emulated; do \
	  start=$$(date +%s); $(MAKE) --no-print-directory $$part || exit 1; \
	  took="$$took $$part $$(( $$(date +%s) - start )) s;"; done; echo "took:$$took"

test-unit: $(PACKAGE)  ## the unit suite
	$(PYTEST) $(SIDE_BY_SIDE)

test-interpreter: $(PACKAGE)  ## the Triton kernels on CPU tensors, in Triton's interpreter
	@if [ ! -d tests/interpreter ]; then echo "no tests/interpreter: nothing to run"; \
	elif ! $(HAS_TRITON); then echo "tests/interpreter needs Triton, which is not installed: not run"; \
	else TRITON_INTERPRET=1 $(PYTEST) $(SIDE_BY_SIDE) tests/interpreter; fi

test-compile: $(PACKAGE)  ## Triton kernels compiled offline for sm_90, one for its siblings: registers, spills, budgets
	@if [ ! -d tests/compile ]; then echo "no tests/compile: nothing to run"; \
	elif ! $(HAS_TRITON); then echo "no Triton: its kernels are not compiled"; \
	  $(PYTEST) tests/compile/test_cuda_sources.py; \
	else $(PYTEST) $(SIDE_BY_SIDE) tests/compile; fi

# FLASHMARK_COMPILE_TARGETS=sm_90 make test-compile: every launch, for one target (20 minutes)
compile-all: $(PACKAGE)  ## every launch, for sm_80, sm_89, sm_90, sm_100 and gfx942 (hours)
	FLASHMARK_COMPILE_TARGETS=sm_80,sm_89,sm_90,sm_100,gfx942 $(PYTEST) $(SIDE_BY_SIDE) tests/compile

compile-ptxas: $(PACKAGE)  ## the block-sparse kernels through the ptxas of nvidia-cuda-nvcc, where that is installed
	@ptxas=$$(ls $(VENV)/lib/python3*/site-packages/nvidia/cu*/bin/ptxas 2>/dev/null | tail -1); \
	if [ -z "$$ptxas" ]; then echo "nvidia-cuda-nvcc is not installed: its ptxas compiles nothing"; \
	else TRITON_PTXAS_PATH="$$PWD/$$ptxas" $(PYTEST) $(SIDE_BY_SIDE) tests/compile/test_block_sparse_kernels.py \
	  tests/compile/test_hopper_forms.py; fi

host-time: $(PACKAGE)  ## microseconds of a call on the host, through Triton's launcher and a driver without a GPU
	$(BIN)/python -m tests.compile.driver.host_time

EMULATED = $(PYTEST) $(SIDE_BY_SIDE) tests/interpreter --device emulated
TRITON36 := build/triton-3.6.0

test-emulated: $(PACKAGE)  ## compiled kernels run without a GPU, race-checked: every kernel, and the emulator's own tests
	@if $(HAS_TRITON); then $(PYTEST) $(SIDE_BY_SIDE) tests/emulator; else echo "no Triton: nothing to emulate"; fi

emulate-all: $(PACKAGE)  ## all of the kernels' tests for sm_80 and sm_90, and the table under Triton 3.7.1 and 3.6.0 (hours)
	$(PYTEST) $(SIDE_BY_SIDE) tests/emulator
	for arch in 80 90; do $(EMULATED) --arch $$arch || exit 1; done
	$(BIN)/python -m tests.emulator.table
	test -d $(TRITON36) || $(BIN)/python -m pip install --quiet --no-deps --target $(TRITON36) triton==3.6.0
	PYTHONPATH=$(TRITON36) $(BIN)/python -m tests.emulator.table

# The libraries of torch stay torch's own; build/wheel holds what auditwheel has not seen yet.
WHEEL_CPU ?= all
wheel: $(READY)  ## dist/: a wheel for any x86-64 Linux (AVX2 and AVX-512), and the source archive
	rm -rf build/wheel build/lib.* dist && mkdir -p dist
	FLASHMARK_BUILD_EXT=1 FLASHMARK_CPU=$(WHEEL_CPU) $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation \
	  --wheel-dir build/wheel .
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	  --exclude libgomp.so.1 --wheel-dir dist build/wheel/flashmark-*.whl
	$(BIN)/python setup.py --quiet sdist --dist-dir dist
	ls -l dist

test-wheel: wheel  ## the wheel in a new environment with no compiler on its path: the self-check of the kernels
	tests/try_wheel.sh $(BIN)/python dist/flashmark-*.whl

# The checkout's files in a folder of their own: a build for another torch would replace that of .venv. The suite runs
# on CPUs, so that no CUDA source is built, whatever compilers there are.
OLDEST := build/oldest
test-oldest:  ## the unit suite on the oldest torch that is supported, in an environment of its own
	rm -rf $(OLDEST)/source && mkdir -p $(OLDEST)/source
	git ls-files -co --exclude-standard | tar -cT - | tar -xC $(OLDEST)/source
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet torch==2.11.0 'setuptools>=77,<82' $$(grep -vE '^(torch|setuptools|#)' requirements-torch.txt)
	grep -v '^triton' requirements-dev.txt > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --no-build-isolation -r $(OLDEST)/requirements.txt
	CUDA_HOME=none FLASHMARK_BUILD_EXT=1 $(OLDEST)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable $(OLDEST)/source
	cd $(OLDEST)/source && OMP_NUM_THREADS=1 ../bin/python -m pytest $(SIDE_BY_SIDE)

bench: $(PACKAGE)  ## speed and peak memory against PyTorch's own attention; BENCH="masks --quick" for a part
	$(BIN)/python -m bench $(BENCH)

docs: $(PACKAGE)  ## the documentation, to build/site; a warning is an error
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

lint: $(PACKAGE)  ## ruff: rules and format; first lines of docstrings; mypy: types; the pins agree
	$(BIN)/python -m pip check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/lint_docstrings.py
	$(BIN)/mypy

format: $(PACKAGE)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sanitize: $(PACKAGE)  ## the tests of the C++ kernels under the address and undefined-behaviour sanitizers
	@if [ ! -x csrc/sanitize.sh ]; then echo "no csrc/sanitize.sh: nothing to run"; else csrc/sanitize.sh $(BIN)/python; fi

clean:  ## remove what was built, .venv included
	rm -rf $(VENV) build dist python/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch first: with build isolation pip would fetch a second torch to build the extension against.
$(TORCH): requirements-torch.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-torch.txt
	touch $@

$(READY): $(TORCH) requirements-dev.txt
	$(PIP) --no-deps --no-build-isolation -r requirements-dev.txt
	touch $@

$(BUILT): $(TORCH) $(SOURCES)
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# The compiler need not wait for the other packages.
$(PACKAGE): requirements-torch.txt requirements-dev.txt $(SOURCES)
	@$(MAKE) --no-print-directory -j2 $(READY) $(BUILT)
	touch $@
