# make demo      what the package buys, on a real model: plots, tables, a fine-tuned adapter (under 15 minutes on 2 cores)
# make test      every test this machine can run
# make gpu       the one entry for a GPU host: doctor, correctness, sanitizer, benchmark; PARTS="sm90 sweep" runs some of it
# make sanitize  the CPU kernel under AddressSanitizer and UBSan
# make cuda      the CUDA library, compiled on any machine that has nvcc; fails where a kernel spills registers
# make support   the README's table of models, from the parity suite's results
# make bench     attention and model benchmarks on this machine
# make memory    on a GPU host: memory and speed of long training steps beside the ledger, per model
# make lint      ruff and clang-format, checking only      make format   the same, rewriting
#
# Where PYTHON (default python3) already has a torch that sees a GPU, that Python is used as it is and the package is built
# in place, with CUDA where nvcc is (FLASHMLA_BUILD=auto): no network is needed if CUTLASS's headers are there. Everywhere
# else a pinned .venv is made first, and the package built for the CPU alone: CUDA kernels take minutes to compile and could
# not run there. `make cuda` compiles them all the same.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The older Transformers release the integration is also tested on, and what it needs that differs from requirements.txt.
OLDER_TRANSFORMERS := 5.17.0
OLDER_PACKAGES := transformers==$(OLDER_TRANSFORMERS) huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0

HAS_GPU := $(shell $(PYTHON) -c "import torch; print(int(torch.cuda.is_available()))" 2>/dev/null)
VENV := .venv
ifeq ($(HAS_GPU),1)
  RUN := PYTHONPATH=$(CURDIR) $(PYTHON)
  TORCH_READY :=
  READY := build/in-place.stamp
else
  RUN := $(VENV)/bin/python
  TORCH_READY := $(VENV)/requirements.stamp
  READY := $(VENV)/package.stamp
endif
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-older-transformers support gpu sanitize cuda bench memory lint format clean
demo: $(READY)
	$(RUN) scripts/demo.py

test: $(READY)
	$(RUN) -m pytest tests

test-older-transformers: $(READY) build/transformers-$(OLDER_TRANSFORMERS).stamp
	PYTHONPATH=$(CURDIR)/build/transformers-$(OLDER_TRANSFORMERS) $(RUN) -m pytest tests/test_hf_*.py

support: $(READY)
	FLASHMLA_SUPPORT_JSON=tests/support.json $(RUN) -m pytest tests/test_hf_parity.py
	$(RUN) tests/support_table.py

gpu: $(READY)
	$(RUN) tests/gpu_suite.py $(PARTS)

bench: $(READY)
	$(RUN) benchmarks/bench_attention.py --time_budget 600
	$(RUN) benchmarks/bench_model.py

# On a GPU host; each file is a model, SHAPES="llama-8b" runs one. Run again, it measures only what is still missing.
SHAPES ?= llama-8b llama-1b-full mistral-7b llama-8b-window llama-1b-full-window
memory: $(READY)
	for shape in $(SHAPES); do $(RUN) scripts/memory_report.py --config scripts/configs/memory/$$shape.yaml || exit 1; done
	$(RUN) benchmarks/render_results.py

sanitize:
	$(PYTHON) csrc/cpu/sanitize.py

# Leaves flashmla_hf/libflashmla_sm90.so in place: it may be carried to a GPU host that has no nvcc.
cuda: $(TORCH_READY)
	$(RUN) csrc/sm90/check_build.py

lint: $(VENV)/requirements.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/requirements.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info flashmla_hf/*.so flashmla_hf/_build.json

$(VENV)/requirements.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "flashmla_hf: Python 3.10 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q '$(TORCH)'
	$(VENV)/bin/pip install -q -r requirements.txt
	touch $@

$(VENV)/package.stamp: $(VENV)/requirements.stamp $(SOURCES)
	FLASHMLA_BUILD=$(or $(FLASHMLA_BUILD),cpu) $(VENV)/bin/pip install -q --no-build-isolation --no-deps -e .
	touch $@

build/in-place.stamp: $(SOURCES)
	$(PYTHON) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

build/transformers-$(OLDER_TRANSFORMERS).stamp: $(VENV)/requirements.stamp
	$(VENV)/bin/pip install -q --no-deps --target build/transformers-$(OLDER_TRANSFORMERS) $(OLDER_PACKAGES)
	touch $@
