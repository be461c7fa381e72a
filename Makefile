# make demo: trains on real data with the pair and with FusedSGDR.
# make test: the tests of every behaviour, a few minutes. make test-all: every test, those marked
# "exhaustive" too: bugs planted in the CUDA kernels, all architectures, full products of options.
# make sanitize: memory errors and data races, found by GCC's sanitizers.
# make examples: all examples, some minutes. make docs: the documentation as a site.
# make gpu-package: what a machine with a GPU needs to run tests and benchmark, in .gpu/.
# Each makes its own virtual environment first, and again only when something was changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
EXTRAS ?= demo,test,lint
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DOCS_STAMP := $(VENV)/installed-docs
SITE := docs/_build/html
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo examples test test-all sanitize benchmark gpu-package docs lint format clean

demo: $(STAMP)
	$(BIN)/python examples/digits.py

examples: demo
	$(BIN)/python examples/bfloat16.py
	$(BIN)/python examples/paper.py

test: $(STAMP)
	$(BIN)/pytest -m "not exhaustive"

test-all: $(STAMP)
	$(BIN)/pytest

sanitize: $(STAMP)
	BIN=$(BIN) tests/sanitize/run address
	BIN=$(BIN) tests/sanitize/run thread

benchmark: $(STAMP)
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.one_pass
	$(BIN)/python -m benchmarks.backward_memory
	$(BIN)/python -m benchmarks.small_tensors
	$(BIN)/python -m benchmarks.threads

gpu-package:
	tests/gpu/package

docs: $(DOCS_STAMP)
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
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/pip install "setuptools>=77" wheel ninja pybind11 numpy "$(TORCH)"
	$(BIN)/pip install --no-build-isolation -e ".[$(EXTRAS)]"
	touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --no-build-isolation -e ".[docs]"
	touch $(DOCS_STAMP)

clean:
	rm -rf build .gpu docs/_build *.egg-info sgdr_fused/*.so sgdr_fused/_native.json
