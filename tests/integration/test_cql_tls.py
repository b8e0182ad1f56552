"""TLS to the CQL store, through our own reactor, against a real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from support.cassandra import CqlServer
from support.certificates import Authority
from support.cql import new_keyspace
from tidings.store.cql import CqlStore, parse_url
from tidings.store.cql.database import Database
from tidings.store.port import InboxRow
from tidings.wire.errors import BadSettings, StoreUnavailable
from tidings.wire.position import Position


@pytest.fixture(scope="module")
def keyspace(tls_cql: CqlServer) -> str:
    """The address of a keyspace of this module's, without TLS."""
    return asyncio.run(new_keyspace(tls_cql.contact_point))


async def refused(url: str) -> str:
    """What a store says that does not open."""
    database = Database(parse_url(url))
    with pytest.raises(StoreUnavailable) as caught:
        await database.connect()
    return str(caught.value)


def ciphers_of(database: Any) -> list[Any]:
    """Of each connection of the driver's; None for one in the clear."""
    pools = database.session._pools.values()
    connections = [connection for pool in pools for connection in pool._connections.values()]
    connections.append(database.session.cluster.control_connection._connection)
    return [connection._transport.get_extra_info("cipher") for connection in connections]


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_store_over_tls(tls_cql: CqlServer, keyspace: str, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Everything goes over TLS: schema, the driver's own requests, and a thousand writes that are frames of our own."""

    async def use() -> None:
        store = CqlStore(parse_url(f"{keyspace}&tls=on&ca={tls_cql.ca}"))
        await store.open()
        try:
            rows = [
                InboxRow("alice", Position(1, number), f"n{number}", "test.made", None, time.time_ns(), b"x" * 2000)
                for number in range(1, 1001)
            ]
            await store.append(rows)
            found = await store.between("alice", Position(1, 0), Position(1, 2000), 2000)
            assert [item.position.sequence for item in found] == list(range(1, 1001))
            assert len(ciphers_of(store._database)) >= 2
            assert None not in ciphers_of(store._database)
        finally:
            await store.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(use())


async def test_which_nodes_are_trusted(tls_cql: CqlServer, tmp_path: Path) -> None:
    """A node of another authority is refused, and one whose certificate is for somebody else; a common name will do."""
    url = f"cql://{tls_cql.contact_point}/system?timeout_s=10&tls=on"
    assert "unable to get local issuer" in await refused(url)
    stranger = Authority(tmp_path / "stranger")
    assert "certificate verify failed" in await refused(f"{url}&ca={stranger.ca}")
    assert "Hostname mismatch" in await refused(f"{url}&ca={tls_cql.ca}&name=other.test")
    database = Database(parse_url(f"{url}&ca={tls_cql.ca}&name=cql.test"))
    await database.connect()
    try:
        assert None not in ciphers_of(database)
    finally:
        await database.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("tls=yes", "its tls is 'yes'; use on or off"),
        ("ca=/ca.pem", "its ca is for TLS: add tls=on"),
        ("tls=on&key=/key.pem", "its certificate and key belong together"),
    ],
)
def test_options_of_the_address(options: str, words: str) -> None:
    """What does not fit together is said, with what to do."""
    with pytest.raises(BadSettings, match=words):
        parse_url(f"cql://127.0.0.1/system?{options}")


async def test_a_ca_that_is_not_there() -> None:
    """A file that is missing is named with its option, before anything is connected."""
    with pytest.raises(BadSettings, match=r"the option ca of store_url is /none\.pem, which cannot be read"):
        await Database(parse_url("cql://127.0.0.1:1/system?tls=on&ca=/none.pem")).connect()
