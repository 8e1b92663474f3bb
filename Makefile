# Thin: each target is what you would type. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
IMAGE ?= sandboxd
TARGET ?= root
PLATFORMS ?= linux/amd64,linux/arm64
BASE_IMAGE ?= ubuntu:22.04
RECORD = --chart docs/images --history benchmarks/history
PREFIX ?= /opt/sandboxd
UNITS ?= /etc/systemd/system
CONFIG ?= /etc/sandboxd
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' sandboxd/__init__.py)
REVISION = $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
BUILD_ARGS = --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION)

.DEFAULT_GOAL := help
.PHONY: help run console check test test-all release soak fuzz bench screenshots build clean install install-systemd lock docker-build docker-buildx docker-push docker-run

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/tox:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv $(VENV); }
	$(BIN)/pip install --quiet --upgrade pip tox

$(BIN)/twistd: $(BIN)/tox pyproject.toml
	$(BIN)/pip install --quiet --editable .
	@touch $@

console: ## get xterm.js, of which the console's terminal is made, by its hashes; builds and "make run" do it
	$(PYTHON) deploy/console/fetch.py

run: $(BIN)/twistd ## set up, and run the daemon in the foreground
	-@$(PYTHON) deploy/console/fetch.py
	@secret="$${SANDBOX_SECRET:-$$($(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(24))')}"; \
	[ -n "$$SANDBOX_SECRET" ] || echo "SANDBOX_SECRET is not set; this run's is $$secret"; \
	printf "Try it:\n  curl -H \"Authorization: Bearer %s\" -d '{\"cmd\":\"echo hello\"}' http://127.0.0.1:%s/run\n" \
	  "$$( [ -n "$$SANDBOX_SECRET" ] && echo '$$SANDBOX_SECRET' || echo "$$secret" )" "$${PORT:-3030}"; \
	SANDBOX_SECRET="$$secret" exec $(BIN)/twistd --nodaemon --pidfile= sandboxd

check: $(BIN)/tox ## set up, and run the linter, the type checker and the fast tests, for each save
	$(BIN)/tox run -e lint,types,fast

test: $(BIN)/tox ## set up, and run the linter, the type checker and all tests on one Python
	$(BIN)/tox run -e lint,types,py

test-all: $(BIN)/tox ## what "make test" leaves out: other Pythons, made-up requests, MCP, frameworks, the browser, images, units
	$(BIN)/tox run -e lowest,py312,newest,api,mcp,agent-sandbox,deepagents,inspect,openai-agents,harbor,browser,system

soak: $(BIN)/twistd ## takes long: measure /health under load, send 20,000 requests, some with faults, 100,000 short commands
	$(BIN)/python -m tests.soak --health
	$(BIN)/python -m tests.soak
	$(BIN)/python -m tests.soak --faults 5
	SHORT_COMMANDS=100000 TEST_DEADLINE=3600 $(BIN)/tox run -e py -- tests/test_short_commands.py

fuzz: $(BIN)/tox ## make up 5,000 examples for each test that is given made-up data; FUZZ=tests/test_x.py runs those of one
	$(BIN)/tox run -e fuzz -- $(FUZZ)

bench: $(BIN)/twistd ## measure how fast the daemon is, draw that, keep it as this version's; BENCH="--only 'run-*'": just measure
	$(BIN)/python -m benchmarks $(or $(BENCH),$(RECORD))

screenshots: $(BIN)/tox ## make the pictures of the console and of sandboxctl in docs/images anew
	SCREENSHOTS=$(CURDIR)/docs/images $(BIN)/tox run -e browser -- tests/browser/test_screenshots.py

release: $(BIN)/tox ## make a release of VERSION=x.y.z: changelog, packages built and checked, commit, tag
	$(BIN)/pip install --quiet --upgrade build twine
	PYTHON=$(BIN)/python .ci/release "$(VERSION)"

build: $(BIN)/tox console ## build the wheel and the source archive into dist/
	$(BIN)/pip install --quiet --upgrade build
	$(BIN)/python -m build

install: ## install the daemon for this user or environment
	$(PYTHON) -m pip install .

install-systemd: ## as root: install the daemon in /opt/sandboxd, its systemd units, and a secret if there is none
	$(PYTHON) -m venv $(PREFIX)
	$(PREFIX)/bin/pip install --quiet --require-hashes -r deploy/lock/runtime.txt
	$(PREFIX)/bin/pip install --quiet --no-deps .
	$(PREFIX)/bin/python -c "from twisted.plugin import IPlugin, getPlugins; list(getPlugins(IPlugin))"
	install -d $(UNITS) $(CONFIG)
	install -m 0644 deploy/systemd/*.service deploy/systemd/*.socket $(UNITS)
	install -m 0644 deploy/systemd/sandboxd.service $(UNITS)/sandboxd@.service
	[ -e $(CONFIG)/sandboxd.secret ] || \
	  (umask 077; $(PREFIX)/bin/python -c 'import secrets; print(secrets.token_urlsafe(32))' > $(CONFIG)/sandboxd.secret)
	[ ! -d /run/systemd/system ] || systemctl daemon-reload

lock: $(BIN)/tox ## pin what the image is built from anew
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile -q --universal --python-version 3.10 --generate-hashes --no-emit-index-url --no-header \
	  --no-annotate --upgrade pyproject.toml -o deploy/lock/runtime.txt
	echo 'hatchling>=1.25' | $(BIN)/uv pip compile -q --universal --python-version 3.10 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --upgrade - -o deploy/lock/build.txt

clean: ## remove what the other targets made
	rm -rf $(VENV) .tox build dist sandboxd/console/vendor *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

docker-build: ## build the image for this platform; TARGET=nonroot or TARGET=slim for the others
	docker build $(BUILD_ARGS) --target $(TARGET) -t $(IMAGE) .

docker-buildx: ## build the image for several platforms
	docker buildx build --platform $(PLATFORMS) $(BUILD_ARGS) --target $(TARGET) -t $(IMAGE) .

docker-push: ## build for several platforms and push
	docker buildx build --platform $(PLATFORMS) $(BUILD_ARGS) --target $(TARGET) -t $(IMAGE) --push .

docker-run: docker-build ## build the image and run it; SANDBOX_SECRET comes from the environment
	docker run --rm -p 3030:3030 -p 3031:3031 -e SANDBOX_SECRET="$${SANDBOX_SECRET:?set SANDBOX_SECRET}" $(IMAGE)
