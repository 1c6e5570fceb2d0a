# make help lists the targets. The environment in .venv holds the exact versions of requirements.lock.
#   PYTHON=...        Python (3.12 to 3.14) to build the environment with (default: the first one found)
#   EXTRA=cuda13      further extras of pyproject.toml to install, separated by commas
#   ARGS=...          further arguments of `seer-jax demo` or pytest

PYTHON ?=
EXTRA ?=
ARGS ?=

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
PIP := $(BIN)/python -m pip --disable-pip-version-check
comma := ,
ENVIRONMENT := .venv/.installed$(if $(EXTRA),-$(subst $(comma),-,$(EXTRA)))

.PHONY: help demo test test-slow test-mesh test-kernels test-gpu check format lock clean environment browser
.DELETE_ON_ERROR:

help:
	@echo "make demo        make the environment and run the main job on the bundled model"
	@echo "make test        make the environment and run the tests (9 to 10 minutes on 2 cores)"
	@echo "make test-slow   run the longer tests of all but meshes and kernels (18 to 21 minutes on 2 cores)"
	@echo "make test-mesh   run the longer tests of several devices (6 minutes on 2 cores)"
	@echo "make test-kernels run every test of the kernels (10 minutes on 2 cores)"
	@echo "make test-gpu    run all tests on an NVIDIA GPU"
	@echo "make browser     install Chromium for the tests of pages where there is none (apt-get, as root)"
	@echo "make check       lint, format and types"
	@echo "make format      let ruff format the code and fix what it can"
	@echo "make environment make the environment alone"
	@echo "make lock        resolve requirements.lock anew"
	@echo "make clean       remove the environment and everything built"
	@echo "On a machine with an NVIDIA GPU: make demo EXTRA=cuda13"

demo: $(ENVIRONMENT)
	$(BIN)/seer-jax demo $(ARGS)

test: $(ENVIRONMENT)
	$(PYTEST) -n 2 --dist worksteal $(ARGS)

test-slow: $(ENVIRONMENT)
	$(PYTEST) -n 2 --dist worksteal -m "slow and not mesh" --ignore=tests/pallas_kernels $(ARGS)

test-mesh: $(ENVIRONMENT)
	$(PYTEST) -n 2 --dist worksteal -m "slow and mesh" $(ARGS)

# At last the suites that XLA's own backends inherit, compiled as users' programs are: before, most optimizations are left out.
test-kernels: $(ENVIRONMENT)
	$(PYTEST) -n 2 --dist worksteal -m "" tests/pallas_kernels $(ARGS)
	SEER_JAX_TEST_OPTIMIZED=1 $(PYTEST) -n 2 --dist worksteal -m "" -k TestXla tests/pallas_kernels $(ARGS)

# The GPU comes first; its host's CPU is there for the tests about arrays of several devices.
test-gpu: .venv/.installed-cuda13
	SEER_JAX_TEST_PLATFORM=cuda,cpu $(PYTEST) -m "" $(ARGS)

browser:
	@command -v chromium-headless-shell || command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell; }

check: $(ENVIRONMENT)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright

format: $(ENVIRONMENT)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

environment: $(ENVIRONMENT)

# A changed lock gives a new environment, a changed pyproject.toml only installs the package anew.
.venv/.created: requirements.lock
	python=$$(.ci/find-python "$(PYTHON)") && "$$python" -m venv --clear .venv
	$(PIP) install --quiet -c requirements.lock setuptools
	@touch $@

.venv/.installed: .venv/.created pyproject.toml
	@echo "Installing seer-jax and what it needs into .venv (1.5 GB, once)"
	$(PIP) install -c requirements.lock --no-build-isolation -e ".[train,plot,dev]"
	@touch $@

.venv/.installed-%: .venv/.installed
	$(PIP) install -c requirements.lock --no-build-isolation -e ".[train,plot,dev,$(EXTRA)]"
	@touch $@

lock:
	directory=$$(mktemp -d) && trap 'rm -rf "$$directory"' EXIT && python=$$(.ci/find-python "$(PYTHON)") \
	  && "$$python" -m venv "$$directory" && "$$directory/bin/pip" install --quiet --upgrade pip \
	  && "$$directory/bin/python" .ci/lock.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
