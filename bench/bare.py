"""The yardstick of a broadcast: what it costs to write one frame to so many sockets, with nothing around it.

A process on uvloop, as the gateway is one: whoever connects gets each frame by a plain ``transport.write``, in slices
of as many a turn of the loop as the gateway writes. One JSON object a line on standard input, each answered with one.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import uvloop

from bench.orders import obey
from tidings.gateway.socket import encode

__all__ = ["Writer"]

_SLICE: Final = 64
_FLUSH_S: Final = 0.02


class _Reader(asyncio.Protocol):
    """Somebody who connected."""

    def __init__(self, connected: list[asyncio.Transport]) -> None:
        self._connected = connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connected.append(cast(asyncio.Transport, transport))


class Writer:
    """Writes to all who connected."""

    def __init__(self) -> None:
        self._connected: list[asyncio.Transport] = []

    async def open(self) -> dict[str, Any]:
        """Let others connect, and say where."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Reader(self._connected), "127.0.0.1", 0, backlog=4096)
        return {"port": server.sockets[0].getsockname()[1]}

    async def write(self, size: int, rounds: int, every_s: float) -> dict[str, Any]:
        """Write a frame with a payload of `size` bytes to everybody, so often; the CPU of each write in µs."""
        frame = encode(b"x" * size)
        gc.freeze()
        used = 0.0
        for _ in range(rounds):
            began = time.process_time()
            for at in range(0, len(self._connected), _SLICE):
                for transport in self._connected[at : at + _SLICE]:
                    transport.write(frame)
                await asyncio.sleep(0)
            # uvloop writes at the end of a turn what was given to it in there.
            await asyncio.sleep(_FLUSH_S)
            used += time.process_time() - began
            await asyncio.sleep(every_s)
        return {"us": 1e6 * used / (rounds * len(self._connected))}


async def _main() -> None:
    writer = Writer()
    orders: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {"open": writer.open, "write": writer.write}
    await obey(orders)


if __name__ == "__main__":
    uvloop.run(_main())
