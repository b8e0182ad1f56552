"""Copies of the log on a server that can keep one only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidings.runtime.settings import Settings
from tidings.stream import topology
from tidings.stream.connection import connect
from tidings.stream.server import NatsServer
from tidings.wire.errors import BadSettings


async def test_one_server_is_no_cluster(tmp_path: Path) -> None:
    """It says which setting to change, and to what."""
    nats = NatsServer(tmp_path, partitions=2)
    await nats.start()
    settings = Settings(nats_url=nats.url, partitions=2, replicas=3)
    connection = await connect(settings, "test")
    try:
        with pytest.raises(BadSettings, match=r"replicas is 3, .* set TIDINGS_REPLICAS=1"):
            await topology.apply(connection, settings)
    finally:
        await connection.close()
        await nats.stop()
