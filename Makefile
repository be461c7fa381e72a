# make demo: trains on real data with the pair and with FusedSGDR, and draws build/digits.png.
# make test: the tests of every behaviour, a few minutes. make test-all: every test, those marked
# "exhaustive" too: bugs planted in the CUDA kernels, all architectures, full products of options.
# make sanitize: memory errors and data races, found by GCC's sanitizers.
# make examples: all examples, some minutes. make docs: the documentation as a site.
# make benchmark: all measurements, under 15 minutes on 2 idle cores; make readme: writes them into the README and
# the pages.
# make dist: the source distribution, and a wheel with the native backend for $(TORCH), in dist/.
# make gpu-package: what a machine with a GPU needs to run tests and benchmark, in .gpu/.
# Each makes its own virtual environment first, and again only when something was changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
EXTRAS ?= demo,test,lint
BIN := $(VENV)/bin
# The packages; the native backend; what the documentation needs more.
STAMP := $(VENV)/installed
BUILT := $(VENV)/built
SOURCES := $(shell find csrc -type f) $(wildcard sgdr_fused/building/*.py)
DOCS_STAMP := $(VENV)/installed-docs
SITE := docs/_build/html
# Without the native backend, which sgdr-fused build compiles.
INSTALL := SGDR_FUSED_NATIVE=0 $(BIN)/pip install --disable-pip-version-check --no-build-isolation

.PHONY: install demo examples test test-all sanitize benchmark readme dist gpu-package docs lint format clean

install: $(BUILT)

demo: $(BUILT)
	$(BIN)/python examples/digits.py

examples: demo
	$(BIN)/python examples/bfloat16.py
	$(BIN)/python examples/paper.py
	$(BIN)/python examples/cuda_graph.py

test: $(BUILT)
	$(BIN)/pytest -m "not exhaustive"

test-all: $(BUILT)
	$(BIN)/pytest

sanitize: $(BUILT)
	BIN=$(BIN) tests/sanitize/run address
	BIN=$(BIN) tests/sanitize/run thread

# Prints its progress; each part saves its results as it goes.
benchmark: $(BUILT)
	$(BIN)/python -m benchmarks.steps
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.backward_memory

readme: $(BIN)/python
	$(BIN)/python docs/tables.py

# The wheel is built from the source distribution, and tried outside the source tree.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/pip install --disable-pip-version-check --quiet build
	SGDR_FUSED_NATIVE=1 $(BIN)/python -m build --no-isolation
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --target dist/check dist/*.whl
	cd dist/check && SGDR_FUSED_CACHE=none $(abspath $(BIN))/python -m sgdr_fused doctor
	rm -r dist/check

gpu-package:
	tests/gpu/package

docs: $(BUILT) $(DOCS_STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going docs $(SITE)
	@echo "The site: file://$(CURDIR)/$(SITE)/index.html"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' 'benchmarks/*.cpp')

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' 'benchmarks/*.cpp')

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; this is " \
	  + sys.version.split()[0] + ": make PYTHON=python3.12, for example")'
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python setup.py pyproject.toml
	$(BIN)/pip install --disable-pip-version-check "setuptools>=77" numpy "$(TORCH)"
	$(INSTALL) -e ".[$(EXTRAS)]"
	touch $(STAMP)

# What cannot be built is tried again the next time; the reference path works without it.
$(BUILT): $(STAMP) $(SOURCES)
	@$(BIN)/sgdr-fused build && touch $(BUILT) || [ "$$SGDR_FUSED_NATIVE" != 1 ]

$(DOCS_STAMP): $(STAMP)
	$(INSTALL) -e ".[docs]"
	touch $(DOCS_STAMP)

clean:
	rm -rf build dist .gpu docs/_build *.egg-info sgdr_fused/*.so sgdr_fused/_native.json $(BUILT)
