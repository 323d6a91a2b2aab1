# Set-up and everyday commands; `make` alone lists them. Each target first creates what it needs.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
KERNELS := src/keelnorm/engine/kernels/cpu
CSRC := $(wildcard $(KERNELS)/csrc/*.h $(KERNELS)/csrc/*.cpp)
DRIVER := $(wildcard tests/native/*.h tests/native/*.cpp)
LIBRARY := $(KERNELS)/libkeelnorm.so
WHY_NOT := $(KERNELS)/not_built.txt

ifeq ($(origin CXX),default)
COMPILER := $(shell command -v c++ || command -v g++ || command -v clang++)
else
COMPILER := $(CXX)
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

ifeq ($(KEELNORM_DATA_DIR),)
ifneq ($(wildcard ../shared/data),)
export KEELNORM_DATA_DIR := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo lab claims rules faults test slow coverage fuzz check bench models memory native sanitize arm format clean FORCE
CHECKS := check-format check-lint check-types check-public check-layers check-kernels
.PHONY: $(CHECKS)

help:
	@echo 'make demo     some claims about batch normalization, on real data: verdicts, and keelnorm-demo.html'
	@echo 'make lab      all claims in quick form: verdicts, and keelnorm-lab.html'
	@echo 'make test     run the tests'
	@echo 'make slow     run those that take long: published networks, the laboratory, kernels in an interpreter and on an emulator'
	@echo 'make coverage run the tests, and name the lines and branches of the package that none of them runs'
	@echo 'make fuzz     100,000 random programs through convert, 100,000 bad calls, 20,000 calls of the kernels: fresh seeds'
	@echo 'make check    format, lint, types, layers of imports'
	@echo 'make bench    time the layers and whole networks: tables, and bench-results/bench.html; and the pages of benchmarks/results'
	@echo 'make claims   measure all claims in full form, alone on the machine: the pages in docs/claims; with DATA=FOLDER, which'
	@echo '              holds MNIST and recordings, also those in docs/claims_on_more_data'
	@echo 'make models   convert and fold published architectures: a table, and docs/models.md; then make memory'
	@echo 'make memory   what save_memory saves and costs on them: tables, docs/memory_figures.md, and bench-results/memory.html'
	@echo 'make rules    the page docs/rules.md, from the rules of the doctor'
	@echo 'make faults   what the doctor finds of faults in trained networks: docs/doctor_figures.md; with DATA=FOLDER, which holds CIFAR-10'
	@echo 'make native   check the kernels without torch, on everything that the driver has'
	@echo 'make sanitize check them with address and undefined-behaviour sanitizers, without torch and with it'
	@echo 'make arm      check them on an emulated ARM'
	@echo 'make format   format the sources, and mend what the linter can'
	@echo 'make clean    remove what was built (the virtual environment stays)'
	@echo
	@echo 'ARGS="..." is passed on by demo, lab, claims, test, slow, coverage, bench, models, memory, faults, native, sanitize and arm:'
	@echo '              make test ARGS="tests/docs -x"'
	@echo 'PYTHON ($(PYTHON)), VENV ($(VENV)) and TORCH ($(TORCH)) can be set in the same way.'

demo: $(VENV)/.built
	@$(BIN)/keelnorm demo $(ARGS)

lab: $(VENV)/.built
	@$(BIN)/keelnorm lab run $(ARGS)

# A run that was stopped goes on. The pages are made from what it stored.
claims: $(VENV)/.built
	@mkdir -p bench-results
	@$(BIN)/keelnorm lab run --full --out bench-results/lab.html --json $(ARGS) > bench-results/lab.json
	@$(BIN)/python -m keelnorm.lab.reading.claim_pages bench-results/lab.json docs/claims
ifneq ($(DATA),)
	@$(BIN)/keelnorm lab run --full --data-dir $(DATA) --out bench-results/more.html --json $(ARGS) > bench-results/more.json
	@$(BIN)/python -m keelnorm.lab.reading.claim_pages bench-results/more.json docs/claims_on_more_data
endif

# An hour on two cores. DATA=FOLDER holds cifar10/train, cifar10/test and fsdd. A run that was stopped goes on.
faults: $(VENV)/.built
	@$(BIN)/python -m benchmarks.doctor.published --data $(DATA)
	@$(BIN)/python -m benchmarks.doctor --data $(DATA) --published bench-results/doctor_published.json \
		--page docs/doctor_figures.md $(ARGS)

rules: $(VENV)/.built
	@$(BIN)/python -m keelnorm.doctor.rules_page docs/rules.md

# Two processes of torch's own threads: waiting ones are not to keep a core busy. ARGS="-n 0" runs all in one process.
test: $(VENV)/.built
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

slow: $(VENV)/.built
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

# Fails below what pyproject.toml asks for, which a part of the tests does not reach: --cov-fail-under=0 in ARGS lets it.
coverage: $(VENV)/.built
	@mkdir -p build
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal --cov=keelnorm \
		--cov-report=term-missing:skip-covered $(ARGS)

# An hour on two cores. FUSION_FUZZ_SEED=N, CALL_FUZZ_SEED=N and KERNEL_FUZZ_SEED=N begin at a seed, as a failure names it.
fuzz: $(VENV)/.built
	@FUSION_FUZZ=100000 CALL_FUZZ=200000 KERNEL_FUZZ=40000 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 \
		--dist worksteal -q tests/fusion/test_program_fuzz.py tests/nn/test_bad_calls.py tests/kernels/test_kernel_fuzz.py \
		-k fresh $(ARGS)

# The page is drawn even if a result was wrong, and says so. ARGS goes to the benchmark of layers.
bench: $(VENV)/.built
	@status=0; \
	$(BIN)/keelnorm bench run --batch 16 --pages both --rounds 3 --out bench-results/layers.json $(ARGS) || status=1; \
	$(BIN)/python -m benchmarks.networks --batch 8 --rounds 3 --out bench-results/networks.json || status=1; \
	$(BIN)/keelnorm bench page bench-results/layers.json bench-results/networks.json --out bench-results/bench.html \
		|| status=1; \
	for result in benchmarks/results/gpu-*.json; do \
		[ ! -e "$$result" ] || $(BIN)/keelnorm bench page "$$result" --out "bench-results/$$(basename "$$result" .json).html" \
			|| status=1; \
	done; \
	exit $$status

models: $(VENV)/.built
	@$(BIN)/python -m benchmarks.zoo --out bench-results/models.json --page docs/models.md $(ARGS)
	@$(MAKE) --no-print-directory memory

# Half an hour on two cores. A run that was stopped goes on. The pages are drawn from what it stored.
memory: $(VENV)/.built
	@$(BIN)/python -m benchmarks.memory --out bench-results/memory.json --page docs/memory_figures.md \
		--html bench-results/memory.html $(ARGS)

# tests/native/build_driver.py says what is built, and how.
native: $(VENV)/.installed
	@$(BIN)/python tests/native/build_driver.py native $(ARGS)

arm:
	@$(PYTHON) tests/native/build_driver.py arm --quick $(ARGS)

# The second half runs tests that call the operators through torch, which itself is not built with sanitizers: the
# library's allocations and its stack are watched, and ASan's malloc puts red zones around tensors. Faults are left to
# the system, because some tests cause them.
sanitize: ARGS = tests/kernels/test_memory.py tests/kernels/test_mixed_layouts.py tests/kernels/test_random_views.py \
	tests/kernels/test_masked_operators.py tests/kernels/test_unaligned.py tests/kernels/test_bool_bytes.py
sanitize: $(VENV)/.installed
	@$(BIN)/python tests/native/build_driver.py sanitize --quick
	@ASAN_OPTIONS=detect_leaks=0:handle_segv=0 UBSAN_OPTIONS=print_stacktrace=1 KEELNORM_NATIVE=1 \
		LD_PRELOAD="$$($(COMPILER) -print-file-name=libasan.so)" KEELNORM_LIBRARY=$(abspath build/sanitize/libkeelnorm.so) \
		PYTHONPATH=src $(BIN)/python -m pytest -n 2 --dist worksteal -p no:cacheprovider $(ARGS)

check: $(VENV)/.built
	@$(MAKE) --no-print-directory --keep-going $(CHECKS)

check-format:
	@echo 'ruff format'
	@$(BIN)/ruff format --quiet --check --diff

check-lint:
	@echo 'ruff check'
	@$(BIN)/ruff check --quiet

check-types:
	@echo 'mypy'
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/mypy --no-error-summary --config-file tests/mypy.toml

check-public:
	@echo 'pyright'
	@$(BIN)/python tests/packaging/public_types.py

check-layers:
	@echo 'lint-imports'
	@$(BIN)/lint-imports > $(VENV)/.layers 2>&1 || { cat $(VENV)/.layers; exit 1; }

check-kernels:
	@echo 'clang-format'
	@$(BIN)/clang-format --dry-run -Werror $(CSRC) $(DRIVER)

format: $(VENV)/.installed
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix
	@$(BIN)/clang-format -i $(CSRC) $(DRIVER)

clean:
	@rm -rf build dist src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -f $(LIBRARY) $(WHY_NOT) $(VENV)/.built

# ---- the virtual environment: one empty file in it for each step that is done

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'keelnorm needs Python 3.10 or newer: make PYTHON=... names one' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
		{ echo 'Python cannot create virtual environments: install python3-venv (on Debian and Ubuntu)' >&2; exit 1; }
	@echo 'creating $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: requirements/dev.txt $(VENV)/.torch
	@echo 'installing $(TORCH) and requirements/dev.txt; the first time this takes minutes'
	@$(PIP) install --quiet --requirement requirements/dev.txt '$(TORCH)'
	@touch $@

# Building is repeated when a kernel's source or the way to build changed, when what it leaves is gone, and when the
# kernels are required (KEELNORM_NATIVE=1) but were left out.
LEFT := $(wildcard $(LIBRARY) $(if $(filter 1,$(KEELNORM_NATIVE)),,$(WHY_NOT)))

$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(CSRC) $(VENV)/.compiler $(if $(LEFT),,FORCE)
	@echo 'building the native kernels'
	@KEELNORM_OBJECTS=build/objects $(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@test ! -f $(WHY_NOT) || echo "left out, the reference back end will run: $$(cat $(WHY_NOT))" >&2
	@touch $@

# Two files that change only when what they say does.
$(VENV)/.torch: WORDS = $(TORCH)
$(VENV)/.compiler: WORDS = $(COMPILER) $(CXXFLAGS) $(LDFLAGS) $(filter 0,$(KEELNORM_NATIVE))
$(VENV)/.torch $(VENV)/.compiler: FORCE | $(VENV)/.created
	@echo '$(WORDS)' | cmp -s - $@ || echo '$(WORDS)' > $@

FORCE:
