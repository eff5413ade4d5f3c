# Every command of the project. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
DEMO_VENV := .venv-demo
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup console demo test coverage check format train fit bench image-test up clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## make .venv with everything for development and training

# pip, not uv: it takes a CPU build of torch where the machine is configured to offer one.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[train,dev]'
	@touch $@

$(DEMO_VENV)/.ready: pyproject.toml
	@echo "Setting up $(DEMO_VENV) (once, about half a minute) ..."
	@$(PYTHON) -m venv $(DEMO_VENV)
	@$(DEMO_VENV)/bin/pip install --quiet --disable-pip-version-check -e .
	@touch $@

CONSOLE := service/console/dist/index.html
NPM := $(shell command -v npm 2> /dev/null)

console: ## build the live page at / (needs Node.js 20.19 or later)
ifeq ($(NPM),)
	@echo "npm is not on this machine: the service serves its plain table. The live page needs Node.js 20.19 or later."
else
	@$(MAKE) --no-print-directory $(CONSOLE)
endif

console/node_modules/.ready: console/package-lock.json console/package.json
	cd console && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

$(CONSOLE): console/node_modules/.ready console/index.html console/vite.config.js console/tsconfig.json $(wildcard console/src/*)
	cd console && npm run --silent build -- --logLevel=warn

demo: $(DEMO_VENV)/.ready ## score this machine's own readings live, disturb it, see the onset (no torch, no Docker)
	@$(MAKE) --no-print-directory console || echo "The live page could not be built; the demo goes on with the plain table."
	@$(DEMO_VENV)/bin/python -m service demo

# Files of tests that run side by side: one more than two processors, because tests also wait for servers. Each worker starts its own
# servers, so a file's tests stay together; tests/conftest.py has the longest files begin first.
WORKERS ?= 3
# The demo watches this very machine: beside others, which keep it busy, it would find nothing to see.
ALONE := tests/e2e/test_demo.py::test_the_demo_flags_the_disturbance_and_leaves_nothing_running
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --deselect $(ALONE)
test: setup console ## all tests, against a real store, a real model and real HTTP
	$(PYTEST)
	$(BIN)/python -m pytest $(ALONE)

coverage: setup console ## the same with branch coverage, which is much slower; fails below what pyproject.toml asks for
	$(PYTEST) --cov --cov-report=term
	$(BIN)/python -m pytest $(ALONE)

check: setup ## ruff, mypy --strict, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports

format: setup ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

train: setup ## build the shipped default detector again, from its recorded command
	$(BIN)/python -m training default --out out/default

PROCESSES ?= 1
fit: setup ## train on your own streams: make fit DATA=history/ OUT=models/ PROCESSES=4
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m training fit --data $(DATA) --out $(OUT)

BENCHES := engine http peers memory recovery rollout overload sources remote gpu step
bench: setup ## all benchmarks, each with its baselines in the same run (about half an hour; each alone: python -m bench.NAME)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	@mkdir -p out/bench
	for name in $(BENCHES); do $(BIN)/python -m bench.$$name --json out/bench/$$name.json || exit 1; done

image-test: ## build the container image for real and run it once (needs root and dockerd)
	bash scripts/image_test.sh

up: ## service and redis in containers
	docker compose up --build

clean: ## remove what the commands above made
	rm -rf $(VENV) $(DEMO_VENV) console/node_modules service/console/dist out .coverage .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
