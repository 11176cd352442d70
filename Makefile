# Every target sets up its own .venv: nothing but Python 3.11+, pip and make is needed beforehand.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c deploy/constraints.txt
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED := 0
# Tests start hundreds of processes, which would each compile all modules again.
unexport PYTHONDONTWRITEBYTECODE
# Plugins of pytest that libraries bring along take each of its processes five seconds.
PYTEST := PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/python -m pytest -p xdist.plugin -p _hypothesis_pytestplugin

FAULTS := tests/faults tests/extraction/test_extract.py tests/query/test_load.py tests/workers/test_driver.py \
	tests/docs/test_sae_page.py tests/docs/test_probes_page.py tests/integrations/test_saelens_training.py \
	tests/patching/estimates/test_smollm2.py

.PHONY: demo test faults mutants check bench clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: $(BIN)/python pyproject.toml deploy/constraints.txt
	$(PIP) torch
	$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(VENV)/.user  ## Extract the activations of a bundled model, read them back, draw one picture
	$(BIN)/actstore demo

test: $(VENV)/.dev  ## The whole test suite
	$(PYTEST) -n 3 --dist loadgroup --no-loadscope-reorder

faults: $(VENV)/.dev  ## Kills, races, faulty storage and flipped bits, by the hundred; SOAK_S=180 keeps the server busy for longer
	$(PYTEST) -n 4 --dist worksteal -m "faults and not alone and not soak" $(FAULTS) --durations=15
	$(PYTEST) -m "faults and alone" tests/faults -s

mutants: $(VENV)/.dev  ## Deliberate faults that tests must notice, one after the other; ONLY=store for a part
	$(BIN)/python -m tests.mutants.run

check: $(VENV)/.dev  ## Lint, types, and which package imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.dev  ## The benchmark table, into tests/benchmarks/RESULTS.md; ROWS="loader query" measures a part
	$(BIN)/python -m tests.benchmarks.run $(ROWS)

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache actstore-demo
