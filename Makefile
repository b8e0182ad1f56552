# make install   a virtual environment in .venv with `tidings` in it
# make dev       everything on this machine: NATS, agents, a page (ARGS="--port 9000" for its options)
# make test      every check, one tox environment each
# make lint      style and types only
# make fuzz      100,000 hostile frames and bodies (FUZZ=n for another number, SEED=x to repeat a run)
# make bench     what a device and a notification cost (make bench-stores: the inbox on each store;
#                make bench-peers: beside what else you could take)
# make load      Locust against a running `make dev`, for a minute (ARGS="-f locustfiles/storm.py" for another scenario)
# make clean     forget all of it, the state folder .tidings excepted

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: install dev test lint fuzz bench bench-peers bench-stores load clean
.DEFAULT_GOAL := install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@infra/make-venv "$(PYTHON)" $(VENV)
	$(PIP) install --editable '.[dev]'
	@touch $@

$(VENV)/.tox-installed: $(VENV)/.installed
	$(PIP) install 'tox>=4.25,<5'
	@touch $@

dev: install
	@$(BIN)/tidings dev $(ARGS)

# The page is tested in a real browser, the CQL store on a real Apache Cassandra (or on TIDINGS_TEST_CQL=host:port).
test: $(VENV)/.tox-installed
	@command -v chromium >/dev/null || infra/apt-install chromium
	@test -n "$$TIDINGS_TEST_CQL" || { command -v java && command -v mvn; } >/dev/null || \
		infra/apt-install openjdk-17-jre-headless maven
	$(BIN)/tox run

lint: $(VENV)/.tox-installed
	$(BIN)/tox run -e lint,types

# `make test` runs a few thousand of them.
fuzz: install
	$(PIP) install --editable '.[test]'
	TIDINGS_TEST_FUZZ_CASES=$(or $(FUZZ),100000) TIDINGS_TEST_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -s -o faulthandler_timeout=0 tests/fuzz

bench: install
	$(BIN)/python -m bench $(ARGS)

# What bench/README.md says about the peers' own programs: ARGS="--centrifugo PATH".
bench-peers: install
	@command -v redis-server >/dev/null || infra/apt-install redis-server
	$(PIP) install --editable '.[dev,bench]'
	$(BIN)/python -m bench.peers $(ARGS)

# The inbox on SQLite and on CQL.
bench-stores: install
	$(BIN)/python -m pip install --quiet --editable '.[dev,cql]'
	$(BIN)/python -m bench.stores $(ARGS)

# Later options win: ARGS may say otherwise. Exit status 1 when a delivery is missing; see locustfiles/README.md.
load: install
	$(PIP) install --editable '.[dev,load]'
	$(BIN)/locust -f locustfiles/everyday.py --headless --only-summary --users 110 --spawn-rate 20 --run-time 60s $(ARGS)

clean:
	rm -rf $(VENV) .tox dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find agents tests bench locustfiles -name __pycache__ -type d -prune -exec rm -rf {} +
