# Thin: each target is what you would type. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
IMAGE ?= sandboxd
PLATFORMS ?= linux/amd64,linux/arm64
BASE_IMAGE ?= ubuntu:22.04

.DEFAULT_GOAL := help
.PHONY: help run test soak bench build clean install docker-build docker-buildx docker-push docker-run

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/tox:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv $(VENV); }
	$(BIN)/pip install --quiet --upgrade pip tox

$(BIN)/twistd: $(BIN)/tox pyproject.toml
	$(BIN)/pip install --quiet --editable .
	@touch $@

run: $(BIN)/twistd ## set up, and run the daemon in the foreground
	@secret="$${SANDBOX_SECRET:-$$($(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(24))')}"; \
	[ -n "$$SANDBOX_SECRET" ] || echo "SANDBOX_SECRET is not set; this run's is $$secret"; \
	printf "Try it:\n  curl -H 'Authorization: Bearer %s' -d '{\"cmd\":\"echo hello\"}' http://127.0.0.1:%s/run\n" \
	  "$$( [ -n "$$SANDBOX_SECRET" ] && echo '$$SANDBOX_SECRET' || echo "$$secret" )" "$${PORT:-3030}"; \
	SANDBOX_SECRET="$$secret" exec $(BIN)/twistd --nodaemon --pidfile= sandboxd

test: $(BIN)/tox ## set up, and run the tests, the type checker and the linter
	$(BIN)/tox run

soak: $(BIN)/twistd ## send 20,000 requests, many broken off, and check that the daemon is as before
	$(BIN)/python -m tests.soak --health
	$(BIN)/python -m tests.soak

bench: $(BIN)/twistd ## measure how fast the daemon is; BENCH="--only 'run-*' --json FILE" passes options on
	$(BIN)/python -m benchmarks $(BENCH)

build: $(BIN)/tox ## build the wheel and the source archive into dist/
	$(BIN)/pip install --quiet --upgrade build
	$(BIN)/python -m build

install: ## install the daemon for this user or environment
	$(PYTHON) -m pip install .

clean: ## remove what the other targets made
	rm -rf $(VENV) .tox build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

docker-build: ## build the image for this platform
	docker build --build-arg BASE_IMAGE=$(BASE_IMAGE) -t $(IMAGE) .

docker-buildx: ## build the image for several platforms
	docker buildx build --platform $(PLATFORMS) --build-arg BASE_IMAGE=$(BASE_IMAGE) -t $(IMAGE) .

docker-push: ## build for several platforms and push
	docker buildx build --platform $(PLATFORMS) --build-arg BASE_IMAGE=$(BASE_IMAGE) -t $(IMAGE) --push .

docker-run: docker-build ## build the image and run it; SANDBOX_SECRET comes from the environment
	docker run --rm -p 3030:3030 -p 3031:3031 -e SANDBOX_SECRET=$${SANDBOX_SECRET:?set SANDBOX_SECRET} $(IMAGE)
