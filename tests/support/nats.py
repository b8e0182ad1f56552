"""A real nats-server of a test's own, with the topology applied."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tidings.runtime.settings import Settings
from tidings.stream import topology
from tidings.stream.connection import Connection, connect
from tidings.stream.server import NatsServer


@dataclass(frozen=True, slots=True)
class RunningNats:
    """The server, which is started again when it is killed, and a connection of the test's own."""

    server: NatsServer
    settings: Settings
    connection: Connection

    @property
    def url(self) -> str:
        return self.server.url

    async def counts(self) -> list[int]:
        """How many messages each partition's stream has had."""
        return [
            (await self.connection.api(f"STREAM.INFO.{topology.notify_stream(number)}"))["state"]["last_seq"]
            for number in range(self.settings.partitions)
        ]

    async def stored(self) -> dict[tuple[str, int], Any]:
        """Every message of the personal plane, as JSON, by stream and sequence."""
        found = {}
        for number, last in enumerate(await self.counts()):
            stream = topology.notify_stream(number)
            for seq in range(1, last + 1):
                body = await self.connection.ask(f"$JS.API.DIRECT.GET.{stream}", orjson.dumps({"seq": seq}))
                found[stream, seq] = orjson.loads(body)
        return found

    async def limit(self, partition: int, **config: Any) -> None:
        """Change the configuration of one partition's stream."""
        stream = topology.notify_stream(partition)
        current = (await self.connection.api(f"STREAM.INFO.{stream}"))["config"]
        await self.connection.api(f"STREAM.UPDATE.{stream}", {**current, **config})


@asynccontextmanager
async def running_nats(
    folder: Path, partitions: int = 4, *, apply: bool = True, **settings: Any
) -> AsyncIterator[RunningNats]:
    """Start nats-server in `folder`, with a mapping for so many partitions; without `apply` it has no streams."""
    server = NatsServer(folder / "nats", partitions=partitions)
    await server.start()
    try:
        chosen = Settings(nats_url=server.url, partitions=partitions, replicas=1, **settings)
        connection = await connect(chosen, "test")
        try:
            if apply:
                await topology.apply(connection, chosen)
            yield RunningNats(server, chosen, connection)
        finally:
            await connection.close()
    finally:
        await server.stop()
