"""The driver's connections on the application's own event loop.

The driver brings reactors that run in a thread of their own, from where each answer has to be handed to the event
loop: a wake-up and a fight for the interpreter's lock a request. `Connection` is made to be subclassed, so this one
runs where its answers are needed. What the driver does blocking (connecting, reconnecting, preparing on a new node) it
does in threads of its own, and those may call every method here.

TLS is asyncio's too: a Python TLS socket cannot be handed to a loop. The driver connects the plain socket, and the
handshake is made where the loop takes it over. So no TLS session is resumed, which costs a full handshake a connection;
there are a few for each node, which stay.

A connection also carries the writes of `express`, whose answers it reads itself.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from struct import Struct
from typing import Any, ClassVar, Final, cast

from cassandra.connection import Connection, ConnectionShutdown

from tidings.runtime.tls import ClientTls

from .express import Group, Write

__all__ = ["LoopConnection", "connection_class"]

_HEADER: Final = Struct(">BBhBi")
_RESULT: Final = 0x08

_HIGH_WATER: Final = 16 * 1024 * 1024
"""Bytes that wait for a server that does not read, before its connection is given up."""


class _Timer:
    """The driver's timer on the loop; may be made and cancelled in any thread."""

    __slots__ = ("_cancelled", "_handle", "_loop", "_thread")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, thread: int, delay_s: float, callback: Callable[[], Any]
    ) -> None:
        self._loop = loop
        self._thread = thread
        self._cancelled = False
        self._handle: asyncio.TimerHandle | None = None
        if threading.get_ident() == thread:
            self._handle = loop.call_later(delay_s, callback)
        else:
            loop.call_soon_threadsafe(self._begin, delay_s, callback)

    def _begin(self, delay_s: float, callback: Callable[[], Any]) -> None:
        if not self._cancelled:
            self._handle = self._loop.call_later(delay_s, callback)

    def cancel(self) -> None:
        self._cancelled = True
        if threading.get_ident() == self._thread:
            self._end()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


class _Protocol(asyncio.Protocol):
    """Hands what comes to the driver's parser."""

    def __init__(self, connection: LoopConnection) -> None:
        self._connection = connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no instances of asyncio's.
        self._connection.attached(cast(asyncio.Transport, transport))

    def data_received(self, data: bytes) -> None:
        self._connection.received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.lost(exc)


class LoopConnection(Connection):  # type: ignore[misc]  # the driver is not typed
    """One connection to one node (ScyllaDB: to one shard). Made by the driver, in one of its threads."""

    is_closed: bool
    loop: ClassVar[asyncio.AbstractEventLoop]
    thread: ClassVar[int]
    lost_one: ClassVar[Callable[[LoopConnection], None]]
    tls: ClassVar[ClientTls | None]
    tls_name: ClassVar[str | None]
    """What the certificate must be for; None for the address that is connected to."""
    supports_tls_session_resumption = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._transport: asyncio.Transport | None = None
        self._outbox: list[bytes] = []
        self._inbox = b""
        self._express: dict[int, tuple[Group, Write] | None] = {}
        """By stream id; None for one whose group has given up waiting."""
        self._connect_socket()
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._attaching = asyncio.run_coroutine_threadsafe(self._attach(), self.loop)
        self._send_options_message()

    @classmethod
    def create_timer(cls, timeout: float, callback: Callable[[], Any]) -> _Timer:
        return _Timer(cls.loop, cls.thread, timeout, callback)

    def _wrap_socket_from_context(self) -> socket.socket:
        # The driver would shake hands here, in its thread, with a socket that no loop takes.
        plain: socket.socket = self._socket
        return plain

    def _secured(self) -> dict[str, Any]:
        """What `create_connection` needs for TLS; nothing without it."""
        if self.tls is None:
            return {}
        return {
            "ssl": self.tls.context(),
            "server_hostname": self.tls_name or self.endpoint.address,
            "ssl_handshake_timeout": self.connect_timeout,
        }

    async def _attach(self) -> None:
        try:
            await self.loop.create_connection(lambda: _Protocol(self), sock=self._socket, **self._secured())
        except OSError as error:
            self.defunct(error)

    def attached(self, transport: asyncio.Transport) -> None:
        if self.is_closed:
            transport.abort()
            return
        self._transport = transport
        self._flush()

    # What comes

    def received(self, data: bytes) -> None:
        """Take whole frames; those of the driver's own requests are handed on."""
        if self._inbox:
            data = self._inbox + data
        at, end = 0, len(data)
        while end - at >= 9 and not self.is_closed:
            _, _, stream, opcode, size = _HEADER.unpack_from(data, at)
            behind = at + 9 + size
            if behind > end:
                break
            if stream in self._express:
                entry = self._express.pop(stream)
                with self.lock:
                    self.in_flight -= 1
                    self.request_ids.append(stream)
                if entry is not None:
                    # An error is the driver's business: it gets the write.
                    entry[0].settle(None if opcode == _RESULT else entry[1])
            else:
                self._iobuf.write(data[at:behind])
                self.process_io_buffer()
            at = behind
        self._inbox = data[at:] if at < end else b""
        # For the driver's heartbeat: this connection lives.
        self.msg_received = True

    def reserve(self, group: Group, write: Write) -> int | None:
        """A stream id for a write that is about to be pushed; None when there is none."""
        with self.lock:
            if self.is_closed or self.in_flight >= self.max_request_id:
                return None
            self.in_flight += 1
            stream: int = self.get_request_id()
        self._express[stream] = group, write
        return stream

    def give_up(self, group: Group) -> list[Write]:
        """Wait no longer for the answers to a group's writes, and return them; their ids are free when they come."""
        left = []
        for stream, entry in self._express.items():
            if entry is not None and entry[0] is group:
                self._express[stream] = None
                left.append(entry[1])
        return left

    def lost(self, error: Exception | None) -> None:
        if error is not None:
            self.defunct(error)
        else:
            self.close()

    def push(self, data: bytes) -> None:
        """Send a request; all of one turn of the loop leave in one write."""
        if threading.get_ident() == self.thread:
            self._write(data)
        else:
            self.loop.call_soon_threadsafe(self._write, data)

    def _write(self, data: bytes) -> None:
        if not self._outbox:
            self.loop.call_soon(self._flush)
        self._outbox.append(data)

    def _flush(self) -> None:
        transport = self._transport
        if transport is None or not self._outbox:
            return
        transport.write(b"".join(self._outbox))
        self._outbox.clear()
        if transport.get_write_buffer_size() > _HIGH_WATER:
            self.defunct(ConnectionShutdown(f"{self.endpoint} does not read what it is sent"))

    def close(self) -> None:
        with self.lock:
            if self.is_closed:
                return
            self.is_closed = True
        if self.loop.is_closed():
            self._socket.close()
        elif threading.get_ident() == self.thread:
            self._let_go()
        else:
            self.loop.call_soon_threadsafe(self._let_go)
        if not self.is_defunct:
            self.error_all_requests(ConnectionShutdown(f"the connection to {self.endpoint} was closed"))
            # Whoever waits for the handshake learns it by `is_closed`.
            self.connected_event.set()

    def _let_go(self) -> None:
        self._outbox.clear()
        express, self._express = self._express, {}
        for entry in express.values():
            if entry is not None:
                entry[0].settle(entry[1])
        type(self).lost_one(self)
        if self._transport is not None:
            self._transport.abort()
        # Otherwise it is being attached, and aborted as soon as that is done.


def connection_class(
    loop: asyncio.AbstractEventLoop,
    lost_one: Callable[[LoopConnection], None],
    tls: ClientTls | None = None,
    tls_name: str | None = None,
) -> type[LoopConnection]:
    """A class of connections that run on this loop; to be called in its thread. `lost_one` hears of each that ends."""
    members = {
        "loop": loop,
        "thread": threading.get_ident(),
        "lost_one": staticmethod(lost_one),
        "tls": tls,
        "tls_name": tls_name,
    }
    return type("LoopConnection", (LoopConnection,), members)
