# make demo, make test: each complete on a fresh machine that has Python >= 3.11, a C++ compiler and make.
# They create .venv here if it is missing, install torch, the build tools and the package into it, build, and run.

# The torch to install; any requirement pip understands, for example TORCH_SPEC="torch==2.11.0".
TORCH_SPEC ?= torch==2.13.0

# Test processes side by side, one thread each.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.levi_fast-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
NATIVE_SOURCES := CMakeLists.txt setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

# The first of these that is new enough; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v $$p; break; }; done)

.PHONY: help
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "levi_fast needs Python >= 3.11 with the venv module, and found none among python3.13, python3.12," >&2; \
		echo "python3.11, python3 and python. Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; \
		exit 1; \
	fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "levi_fast needs Python >= 3.11; PYTHON=$(PYTHON) is older or cannot be run." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# A changed TORCH_SPEC installs again too: the file below is touched only when the text differs.
TORCH_STAMP := $(VENV)/.levi_fast-torch-spec
.PHONY: torch-spec
$(TORCH_STAMP): torch-spec | $(BIN)/python
	@echo '$(TORCH_SPEC)' | cmp -s - $@ || echo '$(TORCH_SPEC)' > $@

# torch first: the native library is built against the very torch it will run with, so without build isolation.
$(STAMP): $(NATIVE_SOURCES) $(TORCH_STAMP) | $(BIN)/python
	$(PIP) install "$(TORCH_SPEC)"
	$(PIP) install "setuptools>=77" wheel "cmake>=3.24" ninja "pybind11>=2.13"
	$(PIP) install --no-build-isolation -e ".[dev,demo]" "$(TORCH_SPEC)"
	@touch $@

.PHONY: install
install: $(STAMP)  ## create .venv and install everything into it

# Not installed by default: 700 MB unpacked, and without a GPU only the GPU kernels' own tests use it. (The interpreter
# of Triton 3.6 does not take numpy 2.4.)
TRITON_SPEC ?= triton==3.7.1
.PHONY: triton
triton: $(STAMP)  ## Triton, so that the tests run its kernels in its interpreter and compile them for four GPUs
	$(PIP) install --no-deps "$(TRITON_SPEC)"

.PHONY: demo
demo: $(STAMP)  ## the whole method on a small synthetic data set, beside its baselines
	$(BIN)/levi-fast demo

.PHONY: lint
lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: test
test: lint  ## lint, types and all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

.PHONY: test-slow
test-slow: $(STAMP)  ## the slow tests: wheels, fresh environments, training runs
	$(BIN)/python -m pytest -m slow

# A driver of its own around the kernels: no Python, so that the sanitizers see our code alone.
KERNEL_TEST_CMAKE = $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN)/ninja)" -DLEVI_FAST_KERNEL_TESTS=ON -S .
.PHONY: asan
asan: $(STAMP)  ## the C++ kernels under AddressSanitizer and UBSan
	$(KERNEL_TEST_CMAKE) -B build/asan -DLEVI_FAST_SANITIZE=ON
	$(BIN)/cmake --build build/asan
	build/asan/levi_fast_kernel_tests

# Needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu qemu-user).
.PHONY: neon
neon: $(STAMP)  ## the C++ kernels for AArch64, on an emulated CPU
	$(KERNEL_TEST_CMAKE) -B build/neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build build/neon
	qemu-aarch64 build/neon/levi_fast_kernel_tests

.PHONY: cuda-compile
cuda-compile: $(STAMP)  ## the CUDA kernels by nvcc for three GPUs, none needed; fails on spills and warnings
	$(BIN)/python tests/kernels/cuda_build.py --jobs $(JOBS)

BENCH := $(BIN)/levi-fast bench
BENCH_OUT ?= benchmarks/results
BENCH_PLOTS ?= docs/performance
# A folder of MovieLens: its epochs and the time to a target are measured too, 4 minutes more.
MOVIELENS ?=
SWEPT := --peers hidden-states,lora --output $(BENCH_OUT)/steps_cpu.json --plots $(BENCH_PLOTS)
.PHONY: bench
bench: $(STAMP)  ## the CPU's part of the benchmarks, under half an hour on two idle cores; JSON and charts
	$(BENCH) kernels --device cpu --peers all --output $(BENCH_OUT)/kernels_cpu.json --plots $(BENCH_PLOTS)
	$(BENCH) step --device cpu --output $(BENCH_OUT)/steps_cpu.json --plots $(BENCH_PLOTS)
	$(BENCH) step --device cpu --backbone minilm,bert-base,t5-base --batch-size 2,8 --length 32,128 $(SWEPT)
	$(BENCH) step --device cpu --backbone llama-1b --batch-size 1,4 --length 32,128 $(SWEPT)
	$(BENCH) step --device cpu --backbone vit-b16 --batch-size 1,8 $(SWEPT)
	$(BENCH) memory --device cpu --peers hidden-states,linear-probe,side-network,lora,full \
		--output $(BENCH_OUT)/memory_cpu.json --plots $(BENCH_PLOTS)
	$(BENCH) growth --output $(BENCH_OUT)/growth_cpu.json --plots $(BENCH_PLOTS)
	$(BENCH) epoch --output $(BENCH_OUT)/epochs_cpu.json --plots $(BENCH_PLOTS)
ifneq ($(MOVIELENS),)
	$(BENCH) epoch --task-name movielens --data "$(MOVIELENS)" --parts uncached,cached,target \
		--output $(BENCH_OUT)/epochs_cpu.json --plots $(BENCH_PLOTS)
endif
	$(BENCH) package --build --output $(BENCH_OUT)/package_cpu.json
	@test ! -d benchmarks || $(BIN)/python benchmarks/targets.py

.PHONY: guard-refresh
guard-refresh: $(STAMP)  ## store this checkout's counts, bytes and ratios, which make test compares with
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/guard.py --refresh

.PHONY: clean
clean:  ## remove what was built, but not .venv
	rm -rf build dist *.egg-info levi_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(STAMP)
