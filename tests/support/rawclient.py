"""A client that keeps to no protocol: it writes what it is told, byte by byte if need be."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any, Final, Self

from .clock import PATIENCE_S

TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA
UPGRADE: Final = (
    b"GET /v1/ws HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Protocol: tidings.v1.json\r\n\r\n"
)


def frame(payload: bytes | str, opcode: int = TEXT, *, final: bool = True, reserved: int = 0) -> bytes:
    """One frame of a client (RFC 6455, section 5.2), with a mask of zeros."""
    body = payload.encode() if isinstance(payload, str) else payload
    head = bytes(((0x80 if final else 0) | reserved << 4 | opcode,))
    if len(body) < 126:
        head += bytes((0x80 | len(body),))
    elif len(body) < 65_536:
        head += b"\xfe" + len(body).to_bytes(2, "big")
    else:
        head += b"\xff" + len(body).to_bytes(8, "big")
    return head + bytes(4) + body


class RawClient:
    """Opened as a context; `read` reads one frame of the server, `ended` all there are, up to the end."""

    def __init__(self, port: int, *, read_limit: int = 65_536) -> None:
        self._port = port
        self._read_limit = read_limit
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self.frames: list[dict[str, Any]] = []
        self.close_code: int | None = None
        self._finished = False

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=self._read_limit)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.transport.abort()

    def send(self, data: bytes) -> None:
        """Hand these bytes to the system, whether there is room or not."""
        if not (self._finished or self._writer.transport.is_closing()):
            self._writer.write(data)

    @property
    def unsent(self) -> int:
        """Bytes that the server does not take."""
        return self._writer.transport.get_write_buffer_size()

    def finish(self) -> None:
        """Say that nothing more comes."""
        if not self._writer.transport.is_closing():
            self._finished = True
            self._writer.write_eof()

    async def upgrade(self) -> None:
        self.send(UPGRADE)
        async with asyncio.timeout(PATIENCE_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head

    async def hello(self, token: str, **members: Any) -> dict[str, Any]:
        """Upgrade and say hello; returns the answer."""
        await self.upgrade()
        self.send(frame(json.dumps({"t": "hello", "token": token, **members})))
        return await self.read() or {}

    async def read(self) -> dict[str, Any] | None:
        """The next text frame; None at the end."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    first, size = await self._reader.readexactly(2)
                    if size >= 126:
                        size = int.from_bytes(await self._reader.readexactly(2 if size == 126 else 8), "big")
                    body = await self._reader.readexactly(size)
                    if first & 0xF == TEXT:
                        self.frames.append(json.loads(body))
                        return self.frames[-1]
                    if first & 0xF == CLOSE:
                        self.close_code = int.from_bytes(body[:2], "big")
                        self.send(frame(body[:2], CLOSE))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def ended(self) -> int | None:
        """Read up to the end; returns the close code, None where there was none."""
        while await self.read() is not None:
            pass
        return self.close_code

    async def answered(self) -> bytes:
        """Everything that comes, up to the end: of what is no WebSocket yet."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._reader.read(-1)
        except ConnectionError:
            return b""

    async def until(self, kind: str) -> dict[str, Any]:
        """Read up to a frame of this type."""
        while (found := await self.read()) is not None:
            if found["t"] == kind:
                return found
        raise AssertionError(f"no {kind} came: {self.frames[-3:]}, close code {self.close_code}")
