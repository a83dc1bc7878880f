# What people type in a checkout: `make demo`, `make test`, `make build`.
#
# Needs cargo, and python3 (3.11 to 3.13) with its venv module. Everything else is fetched once, with hashes, and lies below
# .cache; after that no step needs the network. Stamps say what is done and are touched last, so that whatever was interrupted
# is done again.

PYTHON ?= python3

# A checkout in continuous integration is a new folder each time; what was compiled for the one before is kept.
ifdef CI
ifndef CARGO_TARGET_DIR
export CARGO_TARGET_DIR := $(HOME)/.cache/lookalike/target
endif
endif
LOOKALIKE := $(or $(CARGO_TARGET_DIR),target)/release/lookalike

# One environment: first what the demo needs, and for the tests more on top of it.
VENV := .cache/venv
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all:

.DEFAULT_GOAL := help
.PHONY: help build demo test clean

help:
	@echo "make demo    build, fetch 2,624 pictures of solar cells (once, 170 MB with what reads them), and find the defective ones"
	@echo "make test    format, lints, documentation, and all tests"
	@echo "make build   build the program: $(LOOKALIKE)"
	@echo "make clean   remove what was built and fetched: target and .cache"

build:
	cargo build --release --locked

demo: build .cache/demo/images.stamp
	@LOOKALIKE="$(LOOKALIKE)" pipelines/demo/run.sh

test: .cache/venv/test.stamp .cache/demo/images.stamp
	cargo fmt --check
	cargo clippy --release --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps --document-private-items --locked
	ORT_DYLIB_PATH="$$(ls "$(CURDIR)"/.cache/onnxruntime/libonnxruntime.*)" \
	LOOKALIKE_TEST_PYTHON="$(CURDIR)/$(VENV)/bin/python" \
	LOOKALIKE_TEST_CELLS="$(CURDIR)/.cache/demo/images" \
	cargo test --release --locked

clean:
	cargo clean
	rm -rf .cache

# .cache/onnxruntime is one of the places where the program looks for the library.
.cache/venv/demo.stamp: tests/python/requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "this needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	@echo "fetching ONNX Runtime, pyarrow and elpv-dataset into $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP_INSTALL) --no-deps -r $<
	@rm -rf .cache/onnxruntime && mkdir .cache/onnxruntime
	@cd .cache/onnxruntime && ln -s ../venv/lib/python3.*/site-packages/onnxruntime/capi/libonnxruntime.* .
	@touch $@

.cache/venv/test.stamp: tests/python/requirements.txt .cache/venv/demo.stamp
	@echo "fetching what the tests' Python scripts need into $(VENV)"
	@$(PIP_INSTALL) -r $<
	@touch $@

.cache/demo/images.stamp: pipelines/demo/cells_table.py .cache/venv/demo.stamp
	@$(VENV)/bin/python $< .cache/demo/images
	@touch $@
