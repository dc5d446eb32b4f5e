# Everything that people and CI run. `make` alone says what there is.
#
# The environment is `.venv` here, built from requirements.lock by plain pip; every target that needs it builds it.
# With an environment of your own: make VENV=/path/to/venv ...

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup lock check docs format test campaign campaign-stores campaign-batch chaos fuzz package demo up bench bench-stream bench-fleet bench-stores bench-batch bench-objects bench-scale clean

VENV ?= .venv
STAMP := $(VENV)/.headrace-setup
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
export PYTHONUNBUFFERED := 1

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## build .venv from requirements.lock (done by every other target as needed)

$(STAMP): requirements.lock pyproject.toml
	@found=; \
	for candidate in $${HEADRACE_PYTHON:-python3.12 python3.11 python3}; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then \
	        found="$$candidate"; break; \
	    fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "make setup: no Python 3.11 or 3.12 with venv was found. Install one (Debian: apt-get install python3 python3-venv)" \
	        "or name it: make setup HEADRACE_PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "make setup: $(VENV) from $$("$$found" --version), once; this takes a minute or two"; \
	"$$found" -m venv --clear $(VENV)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

LOCK_OPTIONS := --extra postgres --universal --python-version 3.11 --generate-hashes --no-header \
    --no-emit-index-url --annotation-style line --quiet

lock: ## resolve both locks anew from pyproject.toml, after a change there (needs uv)
	uv pip compile pyproject.toml --group dev --extra spark $(LOCK_OPTIONS) --output-file requirements.lock
	uv pip compile pyproject.toml --constraints requirements.lock $(LOCK_OPTIONS) --output-file requirements-runtime.lock

check: setup ## formatting, lint, types, import directions, links of the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml
	$(BIN)/pre-commit validate-config
	$(BIN)/zensical build --clean --strict
	$(BIN)/hadolint Dockerfile

docs: setup ## write the reference from the code, and serve the documentation on http://127.0.0.1:8000 while it is edited
	$(PYTHON) -m tests.reference
	$(BIN)/zensical serve --dev-addr 127.0.0.1:8000

format: setup ## format the code and apply the linter's safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup ## all tests, on real servers (options: make test ARGS="-k ledger")
	$(PYTHON) -m pytest -n 3 --dist worksteal $(ARGS)

campaign: setup ## 200,000 events through a real Kafka, once in peace and once with ten kill -9 (about three minutes)
	HEADRACE_REQUIRE_ALL=1 HEADRACE_TEST_KILLS=10 HEADRACE_TEST_EVENTS=200000 \
	    $(PYTHON) -m pytest -s tests/streaming/test_kafka.py -k "every_event or kill_9" $(ARGS)
	HEADRACE_REQUIRE_ALL=1 HEADRACE_TEST_KILLS=10 HEADRACE_TEST_EVENTS=20000 \
	    $(PYTHON) -m pytest -s tests/streaming/test_objects.py -k kill_9 $(ARGS)
	HEADRACE_REQUIRE_ALL=1 HEADRACE_TEST_LOGINS=all $(PYTHON) -m pytest tests/streaming/test_security.py $(ARGS)

chaos: setup ## everything goes wrong at once, 160 kill -9 and more, on two sets of stores, and one by one (about 75 minutes)
	HEADRACE_REQUIRE_ALL=1 HEADRACE_TEST_CAMPAIGN=1 HEADRACE_TEST_CHAOS_ROUNDS=20 HEADRACE_TEST_CHAOS_ROUND_SECONDS=60 \
	    $(PYTHON) -m pytest -s tests/streaming/test_chaos.py tests/streaming/test_outages.py $(ARGS)

campaign-stores: setup ## property tests and crash mixes of the stores, 2,000 examples each, 100 of Spark; audits of a million keys (two hours)
	HEADRACE_REQUIRE_ALL=1 HEADRACE_TEST_EXAMPLES=2000 HEADRACE_TEST_KEYS=1000000 $(PYTHON) -m pytest --timeout 7200 tests/headrace $(ARGS)

campaign-batch: setup ## kill -9 at every step of every batch task, in three ways, and 100 histories of dirty days a database (several hours)
	HEADRACE_REQUIRE_ALL=1 HEADRACE_TEST_KILL_EVERY=1 HEADRACE_TEST_EXAMPLES=100 \
	    $(PYTHON) -m pytest --timeout 14400 tests/batch/test_kills.py tests/batch/test_days.py $(ARGS)

fuzz: setup ## a million hostile records, JSON and Avro, through real workers, against an independent reading (about ten minutes)
	HEADRACE_REQUIRE_ALL=1 HEADRACE_TEST_FUZZ=1000000 $(PYTHON) -m pytest -s tests/streaming/test_fuzz.py $(ARGS)

demo: setup ## the whole path once: broker, database, worker, batch chain, then a table that says whether all agrees
	@$(PYTHON) -m demo.run

up: setup ## the same, and stay: Luigi on 8082, worker pages on 6066, feast serve on 6566, feast ui on 8888
	@$(PYTHON) -m demo.up

bench: setup ## the benchmarks, short: the stream, and a few rows of the stores and the batch chain (about two minutes)
	$(PYTHON) -m benchmarks.stream --only valkey stock --runs 1 --scale 0.05
	$(PYTHON) -m benchmarks.stores --only materialize-redis retrieve --runs 1 --scale 0.02
	$(PYTHON) -m benchmarks.batch --runs 1 --scale 0.02

bench-stream: setup ## the benchmark of the stream and its peers in full, into docs/explanation/benchmarks.md (about 15 minutes)
	$(PYTHON) -m benchmarks.stream --write docs/explanation/benchmarks.md

bench-fleet: setup ## many workers that come and go, hot partitions, 200 views in one worker, into docs/explanation/benchmarks.md (about seven minutes)
	$(PYTHON) -m benchmarks.fleet --write docs/explanation/benchmarks.md

bench-stores: setup ## the benchmark of both stores in full, into docs/explanation/benchmarks.md (about 25 minutes)
	$(PYTHON) -m benchmarks.stores --write docs/explanation/benchmarks.md

bench-batch: setup ## the benchmark of the batch chain on a real PostgreSQL in full, into docs/explanation/benchmarks.md (about 15 minutes)
	$(PYTHON) -m benchmarks.batch --write docs/explanation/benchmarks.md

bench-objects: setup ## the history in an object store beside a local folder in full, into docs/explanation/benchmarks.md (about five minutes)
	$(PYTHON) -m benchmarks.objects --write docs/explanation/benchmarks.md

bench-scale: setup ## what an event costs, and the model that plans larger loads by it, into docs/scale.md (about six minutes)
	$(PYTHON) -m benchmarks.scale --write docs/scale.md

package: setup ## build the wheel and the source archive into dist/
	rm -rf build dist
	$(PYTHON) -c "import setuptools.build_meta as build; build.build_sdist('dist'); build.build_wheel('dist')"

clean: ## remove the environment, the caches and what the demonstration wrote
	rm -rf .venv .cache data build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -rf *.egg-info streaming-data .luigi-locks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
