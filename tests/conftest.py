"""Fixtures of every suite that needs a mesh."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from support.cassandra import cql_server
from support.cql import new_keyspace
from support.mesh import Mesh, running_mesh


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    """nats-server, topology and store; the test starts the agents that it needs."""
    async with running_mesh(tmp_path) as running:
        yield running


@pytest.fixture(scope="session")
def cql_url() -> Iterator[str]:
    """A keyspace of this run on the real CQL server, which is started once a run, when it is first needed."""
    with cql_server() as server:
        yield asyncio.run(new_keyspace(server.contact_point))
