# Every target does its own set-up: a virtual environment in .venv, installed once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A machine with a card may have PyTorch and no way to install anything: the GPU targets take what is there.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

RUNS ?=

# Compiled modules are kept whatever the machine says: the tests start more than a hundred processes, and each would
# compile all of ours.
TESTING := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --dist loadscope --no-loadscope-reorder

.PHONY: help demo test check lint coverage gpu-test gpu-bench bench compiled screenshots docs clean
help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(VENV)/.base            ## serve and simulate one workload under two policies, side by side
	$(BIN)/diptych demo

test: $(VENV)/.dev             ## every check and every test
	$(MAKE) lint
	$(TESTING) -n 3

check: $(VENV)/.dev            ## the fast tier, under two minutes
	$(MAKE) lint
	$(TESTING) -n 3 -m "not slow" -x

lint: $(VENV)/.dev             ## style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

coverage: $(VENV)/.dev         ## which branches of policies and simulator their own tests take; at least 95 %
	$(TESTING) -n 3 tests/policies tests/simulator --cov=policies --cov=simulator --cov-branch \
		--cov-report=term-missing:skip-covered --cov-report=json:build/coverage.json
	$(BIN)/python -m tests.branch_coverage build/coverage.json

gpu-test:        ## the tests that need a CUDA card, and those of the kernels, on this machine's
	$(GPU_PYTHON) -m benchmarks.gpu.run_tests

gpu-bench:       ## serving on a CUDA card beside vLLM's figures; the tables go into docs/performance.md
	$(GPU_PYTHON) -m benchmarks.gpu.serving; status=$$?; $(GPU_PYTHON) -m benchmarks.gpu.report || status=1; \
	$(GPU_PYTHON) -m benchmarks.tensor_parallel --cards-only && exit $$status

bench: $(VENV)/.base           ## the benchmarks that need no GPU
	$(BIN)/python -m benchmarks.plan_time
	$(BIN)/python -m benchmarks.load_generator
	$(BIN)/python -m benchmarks.eviction

compiled: $(VENV)/.dev         ## the simulator compiled, in build/compiled, for PYTHONPATH; needs a C compiler, a minute
	$(BIN)/python -m experiments.compiling build/compiled

screenshots: $(VENV)/.dev      ## pictures of the dashboard for docs/, over recorded runs or those of RUNS=FOLDER; needs a Chromium
	$(BIN)/python -m benchmarks.screenshots $(RUNS)

docs: $(VENV)/.dev             ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:           ## remove the environment and every generated file
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
