"""A TCP proxy whose wire can be cut without anybody being told, as when a phone enters a tunnel."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class Proxy:
    """Forwards to a port of this machine; silent it swallows everything and closes nothing, cut it refuses."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        """Of connections that are being opened, and of each direction of those that are."""
        self._writers: list[asyncio.StreamWriter] = []
        self._silent: set[int] = set()
        self._generation = 0
        self.port = 0

    def go_silent(self) -> None:
        """Nothing passes any more on the connections that are open now; new ones work."""
        self._silent.add(self._generation)
        self._generation += 1

    def cut(self) -> None:
        """Break all connections, and refuse new ones until `mend`."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opening = asyncio.current_task()
        assert opening is not None
        self._tasks.add(opening)
        self._writers.append(writer)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers.append(up_writer)
        for source, sink in ((reader, up_writer), (up_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink, self._generation))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, generation: int) -> None:
        try:
            while data := await source.read(65_536):
                if generation not in self._silent:
                    sink.write(data)
                    await sink.drain()
        except ConnectionError:
            pass
        if generation not in self._silent:
            sink.close()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        await self._server.wait_closed()
