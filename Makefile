# Every target makes its own .venv from nothing but python3 and pip; nothing has to be activated.
#   make quickstart    a real model made smaller and faster: variants, report, export, an answer
#   make test          all tests but the slow ones: no download    make test ARGS="tests/compose/planning -k keys"
#   make test-slow     the slow ones: the real model, all chains, killed runs, other engines
#   make check         format, lint, types, imports
#   make sanitize      the compiled kernels over odd sizes, under AddressSanitizer and UndefinedBehaviorSanitizer
#   make wheels        wheels for Linux with compiled kernels, for x86-64 and Arm, and the source distribution, in dist
#   make arm           the compiled kernels over odd sizes on three kinds of Arm processors, emulated
#   make gpu-interpreted  the kernels for GPUs: in Triton's interpreter, and compiled without a card
#   make peers-test    the environments of other engines, made once (minutes), and their tests
#   make repeatability  equal runs against each other, then planted differences (half an hour)
#   make side-by-side FOLDER=DIR  a model against its copy, then 5 % slower (20 minutes)
#   make docs          the documentation as a site in build/site; a broken link is an error
#   make figures       tables and figures of README and docs anew, from reports/published
#   make publish RUN=runs/peers    a run's results beside the code, in reports/published: NAME=peers
#   make stale         what has changed since each published run, in what it measured
#   make fuzz       mutated pipelines, gates, GGUF files, results: make fuzz SECONDS=1800 ARGS="--target gguf"
#   make chaos      runs that are killed, starved of disk, damaged, stopped, and resumed: ARGS="--kills 5"
#   make mutants       mutation testing of the files whose numbers are published: docs/mutants.md
#   make bench         a larger matrix     make bench PIPELINE=pipelines/from-scratch.yaml
#   make clean         removes the environment, caches, runs and exports made here
# PYTHON names the interpreter that makes the environment: make test PYTHON=python3.12

PYTHON   ?= python3
VENV     ?= .venv
PIPELINE ?= pipelines/smollm2-matrix.yaml
QUESTION ?= What is the capital of France?
ARGS     ?=
export QUESTION

BIN := $(VENV)/bin

.PHONY: help quickstart test test-slow check sanitize arm gpu-interpreted wheels fuzz chaos peers-test docs figures publish stale mutants repeatability side-by-side bench clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   /  /p' Makefile

# Four stamps in one chain, so that `make -j` never runs two installs in one environment.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, " + sys.argv[1] + " is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)' '$(PYTHON)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.created pyproject.toml
	@echo 'Installing into $(VENV): a few minutes, most of it torch'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[compress,eval,report,serve]'
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[docs]'
	@touch $@

$(VENV)/.dev: $(VENV)/.docs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	@touch $@

quickstart: $(VENV)/.run
	$(BIN)/gateskip compress smollm2-135m-instruct --to exports/quickstart
	$(BIN)/gateskip generate exports/quickstart "$$QUESTION" --stats
	@echo 'To serve the model over HTTP: $(BIN)/gateskip serve exports/quickstart'
	@echo 'Not part of this: gates, which skip layers of prompts. pipelines/reading.yaml measures what that saves and costs.'

# Each test runs in one of the two. A file stays in one process, and the next free one takes the next file.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 40

test: $(VENV)/.dev
	$(PYTEST) -m 'not slow' $(ARGS)

# Engines whose environments are made where they are missing. The larger ones are for peers-test.
ENGINES ?= compressed-tensors
# A third process for two cores: slow tests spend a quarter of their time waiting for other processes.
test-slow: $(VENV)/.dev
	GATESKIP_BUILD_PEERS=$(ENGINES) $(PYTEST) -n 3 -m slow $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Needs a C++ compiler with its sanitizers, and nothing of Python. The stack that finds uses after return has no
# 64-byte alignment, so it is off.
KERNELS := gateskip/kernels/src
sanitize:
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -march=native -ffp-contract=off -fopenmp -fsanitize=address,undefined \
	  -fno-sanitize-recover=all -I$(KERNELS) tests/gateskip/kernels/*.cpp $(KERNELS)/*.cpp $(KERNELS)/*/*.cpp -o build/odd_sizes
	ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=0 build/odd_sizes

# Needs g++, and for Arm's wheel Debian's g++-aarch64-linux-gnu. libgomp is left out, because torch brings it: two OpenMP
# libraries in one process do not share threads.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM     := CXX=$(ARM_CXX) _PYTHON_HOST_PLATFORM=linux-aarch64
wheels: $(VENV)/.dev
	rm -rf build/wheels
	GATESKIP_PREBUILT=1 $(BIN)/python -m build --outdir build/wheels
	if command -v $(ARM_CXX); then GATESKIP_PREBUILT=1 $(ARM) $(BIN)/python -m build --outdir build/wheels; \
	  else echo 'No wheel for Arm: $(ARM_CXX) is not installed'; fi
	for wheel in build/wheels/*.whl; do \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude libgomp.so.1 --wheel-dir dist $$wheel || exit; done
	cp build/wheels/*.tar.gz dist

# Needs Debian's g++-aarch64-linux-gnu and qemu-user, and nothing of Python. What the kernels gave stays in build/arm, a file for
# each kind: without products of bytes, with those of signed ones, and with bytes of both kinds and bfloat16.
QEMU    ?= qemu-aarch64
arm:
	mkdir -p build/arm
	set -e; for kind in armv8-a/cortex-a72 armv8.2-a+dotprod/neoverse-n1 armv8.2-a+dotprod+i8mm+bf16/max; do \
	  level=$$(dirname $$kind); \
	  $(ARM_CXX) -std=c++17 -O2 -march=$$level -ffp-contract=off -fopenmp -static -I$(KERNELS) \
	    tests/gateskip/kernels/*.cpp $(KERNELS)/*.cpp $(KERNELS)/*/*.cpp -o build/arm/$$level; \
	  $(QEMU) -cpu $$(basename $$kind) build/arm/$$level build/arm/$$level.outputs; \
	done

# Triton takes a gigabyte, so that make test skips these tests where it is missing.
$(VENV)/.gpu: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[gpu]'
	@touch $@

gpu-interpreted: $(VENV)/.gpu
	$(BIN)/python -m pytest tests/gateskip/kernels/gpu

# llama.cpp is compiled here, which needs a C++ compiler; the others are installed.
peers-test: $(VENV)/.dev
	GATESKIP_BUILD_PEERS=all $(BIN)/python -m pytest tests/compose/bench/test_peers.py tests/compose/artifacts/test_readers.py $(ARGS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

figures: $(VENV)/.run
	$(BIN)/python -m reports.documents

NAME ?= $(notdir $(patsubst %/,%,$(RUN)))
publish: $(VENV)/.run
	$(BIN)/python -m reports.documents.publish $(RUN) $(NAME)
	$(BIN)/python -m reports.documents

stale: $(VENV)/.run
	$(BIN)/python tools/stale.py

SECONDS ?= 60
fuzz: $(VENV)/.run
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz.py --seconds $(SECONDS) $(ARGS)

# A full disk is a tmpfs, so that part asks for root, and is skipped by name without it.
chaos: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tools/chaos.py $(ARGS)

repeatability: $(VENV)/.run
	$(BIN)/python tools/repeatability.py $(ARGS)

side-by-side: $(VENV)/.run
	$(BIN)/python tools/side_by_side.py $(FOLDER) $(ARGS)

# One thread a process: mutants run in forks of a process that has imported everything.
# make mutants MUTANTS="gateskip.model.compute*" runs those of one file
mutants: $(VENV)/.dev
	mkdir -p build/tiny
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 GATESKIP_TINY_MODELS=$(abspath build/tiny) \
	  $(BIN)/mutmut run $(MUTANTS)
	$(BIN)/python tools/mutants.py

bench: $(VENV)/.run
	$(BIN)/gateskip run $(PIPELINE)

clean:
	rm -rf $(VENV) runs exports build mutants dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find compose gateskip reports tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
