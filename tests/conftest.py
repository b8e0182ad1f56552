"""Fixtures of every suite that needs a mesh."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest

from support.cassandra import ADDRESS_VARIABLE, CA_VARIABLE, CqlServer, cql_server, own_cql_server
from support.cql import new_keyspace
from support.mesh import Mesh, running_mesh

_SERVER = pytest.StashKey[CqlServer]()


def pytest_configure(config: pytest.Config) -> None:
    """Where workers share the tests (``-n``), they share the CQL server too: they get its address."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell script's background job ignores Ctrl-C, and so would every command that the tests start and stop.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        stack = ExitStack()
        config.add_cleanup(stack.close)
        config.stash[_SERVER] = stack.enter_context(cql_server())
        os.environ[ADDRESS_VARIABLE] = config.stash[_SERVER].contact_point
        if (ca := config.stash[_SERVER].ca) is not None:
            os.environ[CA_VARIABLE] = str(ca)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A shared CQL server that died fails many tests, none of which can say why."""
    server = config.stash.get(_SERVER, None)
    if server is not None and server.child is not None and (words := server.child.last_words()):
        terminalreporter.write_line(words, red=True)


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    """nats-server, topology and store; the test starts the agents that it needs."""
    async with running_mesh(tmp_path) as running:
        yield running


@pytest.fixture(scope="session")
def cql() -> Iterator[CqlServer]:
    """The real CQL server, which is started once a run, when it is first needed."""
    with cql_server() as server:
        yield server


@pytest.fixture(scope="session")
def cql_url(cql: CqlServer) -> str:
    """A keyspace of this run on it."""
    return asyncio.run(new_keyspace(cql.contact_point))


@pytest.fixture(scope="session")
def tls_cql(cql: CqlServer) -> Iterator[CqlServer]:
    """One that speaks TLS as well: that server, or where it was given and does not, one of our own."""
    with nullcontext(cql) if cql.ca is not None else own_cql_server() as server:
        yield server
