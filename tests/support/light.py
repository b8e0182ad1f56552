"""A device of which a test can have thousands: it reads what comes, keeps ids and positions, and acknowledges."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import orjson

from tidings.wire.frames import SUBPROTOCOL

from .clock import PATIENCE_S

_TEXT: Final = 0x81
_CLOSE: Final = 0x88
_PING: Final = 0x89
_PONG: Final = 0x8A
_REQUEST: Final = (
    "GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
).encode()


class Light:
    """Connects with `connect`, again and again if need be; what came over all connections is in `ids`, in order."""

    def __init__(self, token: str, **hello: Any) -> None:
        self.ids: list[str] = []
        self.positions: list[str] = []
        self.gaps = 0
        self.lost = asyncio.Event()
        """The connection that was made last is gone."""
        self.byes: list[int] = []
        """The pauses that gateways asked for, in milliseconds."""
        self.codes: list[int] = []
        """Of gateways' close frames."""
        self._asked_ms: int | None = None
        self._hello = _frame(orjson.dumps({"t": "hello", "token": token, **hello}))
        self._wire: _Wire | None = None
        self._wanted: set[str] = set()
        self._complete: asyncio.Event = asyncio.Event()

    async def connect(self, port: int, *, receive_bytes: int | None = None) -> None:
        """Connect and wait for the welcome; an earlier connection is left as it is. A small buffer fills soon."""
        wire = socket.socket()
        wire.setblocking(False)
        if receive_bytes is not None:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE_S):
            try:
                await loop.sock_connect(wire, ("127.0.0.1", port))
            except OSError:
                wire.close()
                raise
            self.lost.clear()
            self._asked_ms = None
            self._wire = _Wire(self, self._hello)
            await loop.create_connection(lambda: cast(_Wire, self._wire), sock=wire)
            await self._wire.welcomed

    async def stay(self, port: Callable[[], int]) -> None:
        """Come back whenever the connection is gone, as the SDKs do, until this is cancelled."""
        while True:
            await self.lost.wait()
            pause_ms = random.uniform(0, 200) if self._asked_ms is None else self._asked_ms
            self._asked_ms = None
            await asyncio.sleep(pause_ms / 1000)
            try:
                await self.connect(port())
            except OSError:
                # Nobody is there, or who is there sent it away.
                self.lost.set()

    def pause(self) -> None:
        """Read nothing more from the socket."""
        assert self._wire is not None
        self._wire.transport.pause_reading()

    def resume(self) -> None:
        assert self._wire is not None
        self._wire.transport.resume_reading()

    def close(self) -> None:
        """Drop the connection, without a goodbye."""
        if self._wire is not None:
            self._wire.transport.abort()

    async def expect(self, ids: Iterable[str], patience_s: float = PATIENCE_S) -> None:
        """Wait until all these notifications have come."""
        self._wanted = set(ids) - set(self.ids)
        self._complete.clear()
        try:
            async with asyncio.timeout(patience_s):
                if self._wanted:
                    await self._complete.wait()
        except TimeoutError:
            raise AssertionError(f"not within {patience_s:g} s: {sorted(self._wanted)[:5]}") from None

    def heard(self, frame: dict[str, Any]) -> list[str]:
        """One frame of the gateway; returns what is to be acknowledged."""
        if frame["t"] == "gap":
            self.gaps += 1
        if frame["t"] == "bye":
            self._asked_ms = frame["after_ms"]
            self.byes.append(frame["after_ms"])
        if frame["t"] != "n":
            return []
        positions = [item["pos"] for item in frame["items"]]
        ids = [item["n"]["id"] for item in frame["items"]]
        self.ids += ids
        self.positions += positions
        if self._wanted:
            self._wanted.difference_update(ids)
            if not self._wanted:
                self._complete.set()
        return positions


class _Wire(asyncio.Protocol):
    """One connection of a device."""

    def __init__(self, device: Light, hello: bytes) -> None:
        self.transport: asyncio.Transport
        self.welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._device = device
        self._hello = hello
        self._rest = b""
        self._shaken = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(_REQUEST)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.welcomed.done():
            self.welcomed.set_exception(ConnectionResetError("the connection ended before its welcome"))
        if self._device._wire is self:
            self._device.lost.set()

    def data_received(self, data: bytes) -> None:
        data, self._rest = self._rest + data, b""
        if not self._shaken:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._rest = head
                return
            assert head.startswith(b"HTTP/1.1 101"), head
            self._shaken = True
            self.transport.write(self._hello)
        at, positions = 0, list[str]()
        while len(data) >= at + 2:
            length, begin = data[at + 1], at + 2
            if length >= 126:
                wide = 2 if length == 126 else 8
                length, begin = int.from_bytes(data[begin : begin + wide], "big"), begin + wide
            end_at = begin + length
            if len(data) < max(begin, end_at):
                break
            if data[at] == _TEXT:
                positions += self._text(orjson.loads(data[begin:end_at]))
            elif data[at] == _CLOSE:
                self._device.codes.append(int.from_bytes(data[begin : begin + 2], "big"))
                self.transport.write(_frame(data[begin : begin + 2], _CLOSE))
            elif data[at] == _PING:
                self.transport.write(_frame(data[begin:end_at], _PONG))
            at = end_at
        self._rest = data[at:]
        if positions:
            self.transport.write(_frame(orjson.dumps({"t": "ack", "pos": positions})))

    def _text(self, frame: dict[str, Any]) -> list[str]:
        if frame["t"] == "welcome" and not self.welcomed.done():
            self.welcomed.set_result(None)
        return self._device.heard(frame)


def _frame(payload: bytes, first: int = _TEXT) -> bytes:
    """A client's frame, with a mask of zeros."""
    size = len(payload)
    head = bytes((first, 0x80 | size)) if size < 126 else bytes((first, 0xFE)) + size.to_bytes(2, "big")
    return head + bytes(4) + payload
