"""The hostile clients: as many of one kind as they are told to be, in one process that steps back for the good ones.

They share the load client's core and have only the time that nobody else wants there (SCHED_IDLE), so that what the
good ones wait for is the gateway. None heeds a `bye`: who is closed comes back at once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final

import orjson
import uvloop

from bench.orders import obey
from bench.raw_socket import CLOSE, client_frame, upgrade_request
from tidings.identity import issue
from tidings.wire.frames import SUBPROTOCOL

__all__ = ["KINDS"]

_REQUEST: Final = upgrade_request("/v1/ws", SUBPROTOCOL)
_LONG: Final = 100
"""Frames of one write."""
_GOODBYE: Final = client_frame((1000).to_bytes(2, "big"), CLOSE)

KINDS: Final = {
    "silent": "who connect and say nothing",
    "pings": "who ping as fast as they can",
    "acks": "who acknowledge what nobody sent them, as fast as they can",
    "pages": "who ask for pages as fast as they can, and read none",
    "pieces": "who write one byte at a time",
    "connects": "who come and go with a valid token",
    "forged": "who come with a token that is none",
}


class Gang:
    """Everybody of one kind."""

    def __init__(self) -> None:
        self._port = 0
        self._key = ""
        self._tasks: list[asyncio.Task[None]] = []
        self.connections = 0

    async def setup(self, port: int, key: str) -> dict[str, Any]:
        """Where the gateway is, and the key that signs tokens."""
        self._port, self._key = port, key
        return {}

    async def attack(self, kind: str, count: int) -> dict[str, Any]:
        """Begin, with so many at a time."""
        self.connections = 0
        self._tasks = [asyncio.create_task(self._go_on(kind, number)) for number in range(count)]
        return {}

    async def stop(self) -> dict[str, Any]:
        """End, and say how many connections there were."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return {"connections": self.connections}

    async def _go_on(self, kind: str, number: int) -> None:
        act: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] = getattr(self, f"_{kind}")
        token = "forged" if kind == "forged" else issue(self._key, f"mallory-{number}")
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=4096)
            except OSError:
                continue
            self.connections += 1
            try:
                if kind != "silent":
                    writer.write(_REQUEST)
                    await reader.readuntil(b"\r\n\r\n")
                    writer.write(client_frame(orjson.dumps({"t": "hello", "token": token, "device": "d"})))
                    await reader.read(4096)
                await act(reader, writer)
            except (OSError, asyncio.IncompleteReadError):
                continue
            finally:
                writer.transport.abort()

    async def _silent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async def _flood(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
        while not reader.at_eof():
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0)

    async def _pings(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flood(reader, writer, client_frame(b"", 0x89) * _LONG)

    async def _acks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flood(reader, writer, client_frame(b'{"t":"ack","pos":["u1.1"]}') * _LONG)

    async def _pages(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flood(reader, writer, client_frame(b'{"t":"inbox","ref":1,"limit":200}') * _LONG)

    async def _pieces(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in client_frame(b'{"t":"ping","pad":"%b"}' % (b"x" * 60_000)):
            writer.write(bytes((byte,)))
            await asyncio.sleep(0)
            if reader.at_eof():
                return

    async def _connects(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_GOODBYE)
        await reader.read(4096)

    async def _forged(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The answer was read already."""


async def _main() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    gang = Gang()
    orders: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
        "setup": gang.setup,
        "attack": gang.attack,
        "stop": gang.stop,
    }
    await obey(orders)


if __name__ == "__main__":
    uvloop.run(_main())
