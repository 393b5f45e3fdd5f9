# make demo, make test: from a fresh clone to the result. Needs Python >= 3.11 and a C++ compiler; everything
# else is installed into .venv. With an NVIDIA GPU, JAX comes with CUDA.

PYTHON ?= python3
# Test processes.
JOBS ?= 2
# Of make train.
CONFIG ?= tiny

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

EXTRAS := test,bench
ifneq ($(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),)
EXTRAS := $(EXTRAS),cuda
endif

BUILD_FILES := pyproject.toml CMakeLists.txt $(wildcard jax_fp8gemm/ffi/*.cc jax_fp8gemm/ffi/*.h)

.PHONY: demo train test bench lint clean

demo: $(INSTALLED)
	$(BIN)/python examples/feed_forward.py
	$(BIN)/python examples/moe_layer.py

# A comparison whose verdict is no leaves a table and a figure, too.
train: $(INSTALLED)
	$(BIN)/python -m examples.deepseek.train --config $(CONFIG) --precision bf16 fp8 --out runs/$(CONFIG) --resume
	-$(BIN)/python -m examples.deepseek.compare runs/$(CONFIG) --out runs/$(CONFIG)

# Test processes share a GPU: none of them may take all of its memory.
test: $(INSTALLED)
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/pytest -q -n $(JOBS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

lint: $(VENV)/.linter
	$(BIN)/ruff check

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable: a change of the Python sources needs no new installation, a change of the files below does.
$(INSTALLED): $(BUILD_FILES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/.linter: | $(BIN)/python
	$(BIN)/python -m pip install --quiet 'ruff>=0.12'
	touch $@
