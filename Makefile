# The only verbs: setup demo test lint bench docs gpu-check
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# A build folder remembers its compilers: another compiler, or another Python, gets another folder.
TOOLCHAIN := $(shell { $(PYTHON) -VV; $${CXX:-c++} --version; nvcc --version; echo $$FORESHOCK_CUDA; } \
	2>/dev/null | cksum | cut -d' ' -f1)
BUILD := build/$(TOOLCHAIN)
SOURCES := CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: setup demo test lint bench docs gpu-check
.DELETE_ON_ERROR:

setup: $(BUILD)/.installed

$(VENV)/.dependencies: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt scikit-build-core pybind11 cmake ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
		--config-settings=wheel.cmake=false --editable '.[triton,test,bench,lint,docs]'
	touch $@

$(BUILD)/.installed: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps \
		--config-settings=build-dir=$(BUILD) --config-settings=cmake.define.FORESHOCK_WERROR=ON \
		--editable .
	touch $@

demo: setup
	$(BIN)/foreshock demo

# Threads that wait without spinning, since two processes share the cores.
test: setup
	FORESHOCK_STRICT=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*/*)
	$(BIN)/pybind11-stubgen foreshock._kernels --output-dir $(BUILD)/stubs
	diff $(BUILD)/stubs/foreshock/_kernels.pyi src/foreshock/_kernels.pyi

bench: setup
	$(BIN)/python -m pytest benchmarks/calibrated_scores.py benchmarks/health_scan.py benchmarks/power_iteration.py \
		benchmarks/rolling_zscore.py benchmarks/soft_assign.py benchmarks/spikes.py \
		benchmarks/spectral_risk.py benchmarks/recorder.py benchmarks/surprise.py benchmarks/gates.py \
		benchmarks/overhead.py benchmarks/snapshots.py --benchmark-only -q -W default
	$(BIN)/python -m benchmarks.ood.digits --store
	$(BIN)/python -m benchmarks.ood.ablate --store
	$(BIN)/python -m benchmarks.tables

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gpu-check:
	$(PYTHON) -m benchmarks.gpu_check
