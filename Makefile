# One virtual environment, made by whichever target comes first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
TORCH := torch==2.13.0
SOURCES := server kernels adapters loadtest demo tests
HAS_NVIDIA := $(shell command -v nvidia-smi 2>/dev/null)

.PHONY: demo test check format soak gpu train clean

demo: $(VENV)/ready ## serve the embedded base with all its adapters, take the tour, keep serving
	$(BIN)/heddle demo

test: $(VENV)/ready ## the tests
	$(BIN)/python -m pytest

check: $(VENV)/ready ## linter, formatter and types, as CI runs them
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)

format: $(VENV)/ready ## let ruff rewrite what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

soak: $(VENV)/ready ## the long proofs and the benchmarks, about two hours; results in results/
	$(BIN)/python -m pytest -m slow --timeout 1200 --json-results results/soak.json
	$(BIN)/heddle bench adapters --json results/bench_adapters.json
	$(BIN)/heddle bench eviction --served --json results/bench_eviction.json
	$(BIN)/heddle-loadtest selfcheck --streams 1000
	$(BIN)/heddle bench load punica
	$(BIN)/heddle bench load punica --base qwen2.5-0.5b
	$(BIN)/heddle bench load slora
	$(BIN)/heddle bench load cold
	$(BIN)/heddle bench load cold --base qwen2.5-0.5b
	$(BIN)/heddle bench load sweep
	$(BIN)/heddle bench load sweep --base qwen2.5-0.5b

# In the machine's own Python, with its own torch and triton: nothing is installed, nothing is fetched.
gpu: ## on a machine with an NVIDIA GPU: every kernel tested and measured, 8 minutes at most; loadtest/results/*.json
	@PYTHONPATH="server:kernels:adapters:loadtest:demo:$$PYTHONPATH" $(PYTHON) -m heddle_demo.bench.gpu_run $(GPU_FLAGS)

train: $(VENV)/ready ## make the embedded base and its adapters again (about half an hour)
	$(BIN)/python -m heddle_demo.train

# Without an NVIDIA driver the CPU build of torch is installed: from the configured indexes if they have it, else from
# PyTorch's own index; where neither can be reached, the ordinary build works too, it is only larger.
ifeq ($(HAS_NVIDIA),)
INSTALL_TORCH := $(PIP) install --quiet "$(TORCH)+cpu" 2>/dev/null \
  || $(PIP) install --quiet --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "$(TORCH)+cpu" 2>/dev/null \
  || $(PIP) install --quiet "$(TORCH)"
else
INSTALL_TORCH := $(PIP) install --quiet "$(TORCH)"
endif

$(VENV)/ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@$(PIP) install --quiet --upgrade pip
	@echo "installing torch ($(if $(HAS_NVIDIA),CUDA,CPU) build; a minute or two) ..."
	@$(INSTALL_TORCH)
	@echo "installing heddle and its tools ..."
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@$(BIN)/python -m heddle_kernels.cpu_kernels
	@touch $@

clean:
	rm -rf $(VENV) results .pytest_cache .mypy_cache .ruff_cache
