"""The client side of RFC 6455, as cheap as a client can be: what all load clients have in common.

No HTTP library and no SDK: an `asyncio.Protocol` that finds frames in the bytes it is given, and masks with a key of
zeros, which the RFC allows and which costs nothing.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, cast

__all__ = ["CLOSE", "WebSocket", "client_frame", "upgrade_request"]

_TEXT: Final = 0x81
CLOSE: Final = 0x88
_PING: Final = 0x89
_PONG: Final = 0x8A
_ACCEPT: Final = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""The answer to the key of the request, from RFC 6455, section 1.3."""


def upgrade_request(path: str, subprotocol: str | None = None) -> bytes:
    """The HTTP request that opens a connection."""
    protocol = f"Sec-WebSocket-Protocol: {subprotocol}\r\n" if subprotocol else ""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{protocol}\r\n"
    ).encode()


def client_frame(payload: bytes, first: int = _TEXT) -> bytes:
    """One masked frame with a mask of zeros."""
    size = len(payload)
    if size < 126:
        return bytes((first, 0x80 | size)) + b"\0\0\0\0" + payload
    return bytes((first, 0xFE)) + size.to_bytes(2, "big") + b"\0\0\0\0" + payload


class WebSocket(asyncio.Protocol):
    """One connection. Subclasses say what is asked for and what the texts mean."""

    __slots__ = ("_rest", "_shaken", "problem", "transport")

    def __init__(self) -> None:
        self._rest = b""
        self._shaken = False
        self.transport: asyncio.Transport
        self.problem = ""
        """Why the connection ended, as far as the server said so."""

    def request(self) -> bytes:
        """What opens the connection; see `upgrade_request`."""
        raise NotImplementedError

    def opened(self) -> None:
        """The handshake is done."""
        raise NotImplementedError

    def text(self, payload: bytes, now: int) -> None:
        """A text frame came, at this time of the monotonic clock in ns."""
        raise NotImplementedError

    def read(self) -> None:
        """All frames of one read have been given to `text`."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have all the methods and none of asyncio's base classes.
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request())

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not self._shaken:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._rest = data
                return
            if not self._shake_hands(data[:end]):
                return
            data = data[end + 4 :]
        at, size = 0, len(data)
        while at + 2 <= size:
            length, head = data[at + 1], at + 2
            if length >= 126:
                wide = 2 if length == 126 else 8
                # Where the length itself is cut short, `head` lies past the end, and the rest is waited for.
                length, head = int.from_bytes(data[head : head + wide], "big"), head + wide
            end = head + length
            if end > size or head > size:
                break
            if data[at] == _TEXT:
                self.text(data[head:end], now)
            else:
                self._control(data[at], data[head:end])
            at = end
        if at < size:
            self._rest = data[at:]
        self.read()

    def _shake_hands(self, head: bytes) -> bool:
        if not head.startswith(b"HTTP/1.1 101") or _ACCEPT not in head:
            self.problem = head.partition(b"\r\n")[0].decode(errors="replace")
            self.transport.abort()
            return False
        self._shaken = True
        self.opened()
        return True

    def _control(self, first: int, payload: bytes) -> None:
        if first == _PING:
            self.transport.write(client_frame(payload, _PONG))
        elif first == CLOSE:
            code = int.from_bytes(payload[:2], "big")
            self.problem = self.problem or f"closed by the server with {code}"
            self.transport.write(client_frame(payload[:2], CLOSE))
        elif first != _PONG:
            raise RuntimeError(f"the server sent a frame that starts with {first:#x}: no server of ours does")
