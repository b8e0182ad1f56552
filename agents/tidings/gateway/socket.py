"""One device's WebSocket: frames out by plain writes, frames in by callback.

aiohttp does the handshake, the parsing and the closing. Two things are done here, because they are the hot path: a
complete server frame is written straight to the transport (a send costs little more than the system call), and once a
session is attached, a client frame is handled in the turn that read it, where aiohttp would queue it and wake a
task. The queue that is replaced is not public in aiohttp, hence the upper bound in pyproject.toml and
``tests/integration/test_socket.py``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from aiohttp import WSCloseCode, WSMessage, WSMsgType, web
from aiohttp._websocket.reader import WebSocketDataQueue, WebSocketReader
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_websocket import WebSocketWriter
from aiohttp.web_protocol import RequestHandler

from tidings.wire import codes
from tidings.wire.codes import Close
from tidings.wire.frames import SUBPROTOCOL, bye, error

from .meter import GRACE_S, Limits, Meter

__all__ = ["Socket", "Turns", "encode"]

_PING: Final = b"\x89\x00"
_SMALL: Final = 126
_MEDIUM: Final = 65_536
_CLOSE_WAIT_S: Final = 2.0
_SPREAD_MS: Final = 1000
_QUEUE_BYTES: Final = 65_536
_OURS: Final = {
    WSCloseCode.MESSAGE_TOO_BIG: codes.FRAME_TOO_LARGE,
    WSCloseCode.PROTOCOL_ERROR: codes.BAD_FRAME,
    WSCloseCode.INVALID_TEXT: codes.BAD_FRAME,
    WSCloseCode.UNSUPPORTED_DATA: codes.BAD_FRAME,
}
"""aiohttp's verdicts on a broken frame, as our catalogue says them."""
_TOO_MANY: Final = WSMessage(WSMsgType.ERROR, None, codes.TOO_MANY_REQUESTS.name)
"""What the reader says when it reads no more."""
_GULP: Final = 1024
"""Bytes of one client that are read at once: some 60 of the smallest frames, half a millisecond."""
_GULPS: Final = 2
"""Of all clients that sent more than a gulp at once, in one turn of the loop."""

Closed = Callable[[int, str], None]
"""Told of each close frame: its code, and who sent it first, ``gateway`` or ``client``."""

log = logging.getLogger("tidings.gateway")


class _Frames(WebSocketDataQueue):
    """aiohttp's queue of frames, which hands text frames to a function instead, as soon as there is one."""

    handle: Callable[[str], None] | None = None
    whole = 0
    """Frames that came whole."""
    signals = 0
    """Of these, pings and pongs that nobody has counted yet."""

    def feed_data(self, data: Any, size: int) -> None:
        self.whole += 1
        if self.handle is not None and data.type is WSMsgType.TEXT:
            self.handle(data.data)
            return
        if data.type is WSMsgType.PING or data.type is WSMsgType.PONG:
            self.signals += 1
        else:
            # It ends the conversation: whatever text follows in the same segment is not heard.
            self.handle = None
        super().feed_data(data, size)


class Turns:
    """The clients of a gateway that sent more than a gulp at once: they are read by turns, a gulp each.

    One read of the network may bring 65,536 bytes of a client. If each of a hundred such clients were read a gulp in
    every turn of the loop, all others would wait for 50 ms.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Reader] = deque()
        self._loop = asyncio.get_running_loop()
        self._due = False

    def join(self, reader: _Reader) -> None:
        """Wait for a turn; nobody waits twice."""
        self._waiting.append(reader)
        self._go_on()

    def _go_on(self) -> None:
        if self._waiting and not self._due:
            self._due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        waiting = self._waiting
        self._due = False
        try:
            for _ in range(min(_GULPS, len(waiting))):
                reader = waiting.popleft()
                if reader.go_on():
                    waiting.append(reader)
        finally:
            # Whoever failed, the others are read.
            self._go_on()


class _Reader(WebSocketReader):
    """aiohttp's parser of frames, which reads a little of each client in turn, and none of one that sends too much.

    Counted here is what is no text frame: bytes, pings, pongs, and reads that bring only a piece of a frame.
    """

    def __init__(
        self, frames: _Frames, protocol: RequestHandler, frame_max_bytes: int, limits: Limits, turns: Turns
    ) -> None:
        super().__init__(frames, frame_max_bytes, compress=False, decode_text=True)
        self.meter = Meter(limits)
        self._turns = turns
        self._frames = frames
        self._protocol = protocol
        self._now = asyncio.get_running_loop().time
        self._waiting = b""
        """Read from the network, and not yet looked at."""
        self._done = False

    def feed_data(self, data: bytes | bytearray | memoryview) -> tuple[bool, bytes]:
        if self._done:
            return False, b""
        if self._waiting:
            # Nothing, where aiohttp goes on with what it put aside.
            self._waiting += data
            return False, b""
        size = len(data)
        if size and self.meter.bytes(self._now(), size) > 0:
            self._refuse()
            return False, b""
        if size <= _GULP:
            return self._read(data)
        self._waiting = bytes(data)
        self._set_reading(False)
        self._turns.join(self)
        return False, b""

    def feed_eof(self) -> None:
        while self._waiting and not self._done:
            self._gulp()
        self._done = True
        super().feed_eof()

    def _gulp(self) -> bool:
        """Read a little of what waits; whether that was the end of the conversation."""
        data, self._waiting = self._waiting[:_GULP], self._waiting[_GULP:]
        ended, _ = self._read(data)
        return ended

    def _read(self, data: bytes | bytearray | memoryview) -> tuple[bool, bytes]:
        frames = self._frames
        whole = frames.whole
        answer = WebSocketReader.feed_data(self, data)
        if frames.signals or (data and whole == frames.whole):
            count = frames.signals + (whole == frames.whole)
            frames.signals = 0
            if self.meter.frames(self._now(), count) > GRACE_S:
                self._refuse()
        return answer

    def go_on(self) -> bool:
        """Its turn to read has come; whether there is more to read after it."""
        if self._done or not self._waiting:
            return False
        if self._gulp():
            self._done = True
            self._protocol.close()
            return False
        if self._waiting:
            return not self._done
        self._set_reading(True)
        return False

    def _refuse(self) -> None:
        if not self._done:
            self.stop()
            self._frames.feed_data(_TOO_MANY, 0)

    def stop(self) -> None:
        """Read nothing more: a flood is left to the kernel, which makes its sender wait."""
        self._done, self._waiting = True, b""
        self._set_reading(False)

    def _set_reading(self, on: bool) -> None:
        transport, paused = self._protocol.transport, self._protocol._reading_paused
        if transport is None or transport.is_closing():
            return
        if not on:
            transport.pause_reading()
        elif not paused:
            transport.resume_reading()


def encode(payload: bytes) -> bytes:
    """A text frame (RFC 6455, section 5.2; a server does not mask)."""
    size = len(payload)
    if size < _SMALL:
        head = bytes((0x81, size))
    elif size < _MEDIUM:
        head = struct.pack("!BBH", 0x81, 126, size)
    else:
        head = struct.pack("!BBQ", 0x81, 127, size)
    return head + payload


class _Response(web.WebSocketResponse):
    """aiohttp's WebSocket, closing with our codes where the client broke the protocol."""

    frames: _Frames
    reader: _Reader
    limits: Limits
    turns: Turns
    told: Closed | None = None
    dismissed = False
    """A close frame was sent already, by `Socket`."""

    def _post_start(self, request: web.BaseRequest, protocol: str | None, writer: WebSocketWriter) -> None:
        # As aiohttp's own, less its timers, with our queue.
        self._ws_protocol = protocol
        self._writer = writer
        self.frames = self._reader = _Frames(request.protocol, _QUEUE_BYTES, loop=asyncio.get_running_loop())
        self._parser = self.reader = _Reader(self.frames, request.protocol, self._max_msg_size, self.limits, self.turns)
        request.protocol.set_parser(self._parser)
        request.protocol.keep_alive(False)

    async def close(self, *, code: int = WSCloseCode.OK, message: bytes = b"", drain: bool = True) -> bool:
        if self.dismissed:
            return False
        verdict = _OURS.get(code)  # type: ignore[call-overload]
        if verdict is not None:
            code, message = verdict.code, verdict.name.encode()
            if self.told is not None:
                self.told(code, "gateway")
        # The client's answer says that it has read all; aiohttp would wait without a limit for it to read.
        return await super().close(code=code, message=message, drain=False)


class Socket:
    """An accepted WebSocket. 14 KB, nearly all of it aiohttp's; no timer and no task but aiohttp's own handler."""

    __slots__ = (
        "_closing",
        "_drain",
        "_ending",
        "_limit",
        "_over",
        "_reading",
        "_response",
        "_secured",
        "_transport",
        "heard",
        "may_return",
        "paging",
        "pinged",
        "stalled",
    )

    def __init__(
        self, frame_max_bytes: int, write_buffer_bytes: int, limits: Limits, turns: Turns, told: Closed | None = None
    ) -> None:
        self._response = _Response(
            autoping=False,
            compress=False,
            protocols=(SUBPROTOCOL,),
            max_msg_size=frame_max_bytes,
            timeout=_CLOSE_WAIT_S,
        )
        self._response.limits = limits
        self._response.turns = turns
        self._response.told = told
        self._limit = write_buffer_bytes
        self._secured = False
        self._transport: asyncio.WriteTransport | None = None
        self._drain: AbstractStreamWriter | None = None
        self._closing = False
        self._ending: asyncio.Future[None] | None = None
        self._reading = False
        self._over: asyncio.Future[None] | None = None
        """Where a dismissal waits for whoever reads to come to the end of the connection."""
        self.may_return = True
        """Whether a client that has gone may come back: unless it said goodbye (1000; 1001 is a page that reloads), or
        was told to stay away."""
        self.heard = True
        """Something came since the last heartbeat."""
        self.pinged = False
        self.stalled = False
        """Somebody waits for `drained`."""
        self.paging = asyncio.Lock()
        """Pages of the inbox are read and sent one after the other: each waits until those before it were read."""

    async def accept(self, request: web.Request) -> web.WebSocketResponse:
        """Shake hands. aiohttp answers what is no WebSocket request with 400."""
        self._drain = await self._response.prepare(request)
        transport: Any = request.transport
        if transport is None:
            raise ConnectionResetError("the client left during the handshake")
        if transport.get_extra_info("ssl_object") is not None:
            # Below TLS is a second buffer, which takes over what waits above it and is not counted.
            self._limit //= 2
            self._secured = True
            transport.set_read_buffer_limits(high=_QUEUE_BYTES)
        transport.set_write_buffer_limits(high=self._limit)
        self._transport = transport
        return self._response

    @property
    def meter(self) -> Meter:
        """What this client has sent: first its own, and its user's when that is known."""
        return self._response.reader.meter

    @meter.setter
    def meter(self, meter: Meter) -> None:
        self._response.reader.meter = meter

    @property
    def unread_bytes(self) -> int:
        """What waits here to be sent."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._closing and not self._transport.is_closing()

    def congested(self) -> bool:
        """More than the limit waits to be sent: send nothing until `drained` returns."""
        return self.stalled or (self._transport is not None and self._transport.get_write_buffer_size() > self._limit)

    def send(self, payload: bytes) -> None:
        """Write one text frame. Lost when the socket is gone."""
        transport = self._transport
        # uvloop's transports raise once they are closed, where asyncio's say nothing.
        if transport is None or self._closing or transport.is_closing():
            return
        transport.write(encode(payload))

    def send_encoded(self, frame: bytes) -> None:
        """Write what `encode` made: one frame for many sockets."""
        if self._transport is not None and not self._closing and not self._transport.is_closing():
            self._transport.write(frame)

    def ping(self) -> None:
        if self._transport is not None and self.open:
            self.pinged = True
            self._transport.write(_PING)

    async def drained(self, timeout_s: float) -> bool:
        """Wait until the client has read enough; False when it does not within the time."""
        if self._drain is None:
            return False
        try:
            async with asyncio.timeout(timeout_s):
                # aiohttp has one future for everybody who waits: cancelled, it would fail all who do so later.
                await asyncio.shield(self._drain.drain())
        except (TimeoutError, ConnectionError):
            return False
        finally:
            self.stalled = False
        return True

    async def receive(self, timeout_s: float | None = None) -> str | bytes | None:
        """The next data frame; None when the connection has ended. Pings are answered on the way.

        Once the client is dismissed nothing but its end is waited for.
        """
        self._reading = True
        try:
            while True:
                message = await self._response.receive(timeout_s)
                self.heard = True
                self.pinged = False
                if message.type is WSMsgType.TEXT or message.type is WSMsgType.BINARY:
                    if not self._closing:
                        return message.data  # type: ignore[no-any-return]
                elif message.type is WSMsgType.PING:
                    if self.open:
                        await self._response.pong(message.data)
                elif message is _TOO_MANY:
                    self.turn_away()
                elif message.type is not WSMsgType.PONG:
                    told = self._response.told
                    if told is not None and not self._closing and message.type is WSMsgType.CLOSE:
                        told(message.data, "client")
                    if not self._closing and message.type is WSMsgType.CLOSE and message.data == codes.NORMAL.code:
                        self.may_return = False
                    self._forget_problem()
                    return None
        finally:
            self._reading = False
            if self._over is not None and not self._over.done():
                self._over.set_result(None)

    def _forget_problem(self) -> None:
        """aiohttp keeps what broke the connection, and the tracebacks of that would keep the connection."""
        problem = self._response.exception()
        while problem is not None:
            problem = problem.with_traceback(None).__context__

    async def serve(self, handle: Callable[[str], None]) -> None:
        """Hand each text frame to `handle`, which must not raise, until the connection ends or is dismissed.

        What has come since the hello is handled first, here.
        """
        frames = self._response.frames

        def heard(text: str) -> None:
            self.heard = True
            self.pinged = False
            if not self._closing:
                handle(text)

        other: str | bytes | None = ""
        while frames._buffer and isinstance(other, str):
            other = await self.receive()
            if isinstance(other, str):
                heard(other)
        if isinstance(other, str):
            frames.handle = heard
            try:
                other = await self.receive()
            finally:
                # The queue, this socket and whoever handles its frames would hold each other for ever.
                frames.handle = None
        if other is not None:
            self.dismiss(codes.BAD_FRAME, error("bad_frame", "frames are text, not binary"))

    def dismiss(self, reason: Close, farewell: bytes | None = None) -> None:
        """Say why and close, without waiting: the first reason given is the one that counts.

        The client has two seconds to answer, and an unread buffer no more than that.
        """
        if self._ending is None:
            if farewell is not None:
                self.send(farewell)
            if self.open and self._transport is not None:
                if self._response.told is not None:
                    self._response.told(reason.code, "gateway")
                # Not aiohttp's: that waits for an unread buffer, and drops a connection that somebody reads from.
                body = struct.pack("!H", reason.code) + reason.name.encode()
                self._transport.write(bytes((0x88, len(body))) + body)
            if self.open:
                self.may_return = reason.reconnect
            self._closing = self._response.dismissed = True
            self._ending = asyncio.ensure_future(self._see_off())

    def turn_away(self) -> None:
        """The client sent more than it may: say so, and when it may come back."""
        owed_s = self.meter.owed_s(asyncio.get_running_loop().time())
        text = f"more was sent than a user's devices may: come back in {owed_s:.0f} s, and send less"
        self.send(error(codes.TOO_MANY_REQUESTS.name, text))
        self.dismiss(codes.TOO_MANY_REQUESTS, bye(int(owed_s * 1000) + secrets.randbelow(_SPREAD_MS)))
        self._response.reader.stop()

    async def gone(self) -> None:
        """Wait until a dismissal is through. A handler that returned before would close with a reason of its own."""
        if self._ending is not None:
            await asyncio.shield(self._ending)
        elif self._transport is not None and (self._secured or self._transport.get_write_buffer_size()):
            # It waits for a client that has said goodbye to read the rest, and may do so for ever.
            asyncio.get_running_loop().call_later(_CLOSE_WAIT_S, self._transport.abort)

    async def close(self, reason: Close, farewell: bytes | None = None) -> None:
        """`dismiss`, and wait."""
        self.dismiss(reason, farewell)
        await self.gone()

    async def _see_off(self) -> None:
        """Give the client the time to read the reason and to answer, and drop the connection."""
        try:
            async with asyncio.timeout(_CLOSE_WAIT_S):
                if self._reading:
                    self._over = asyncio.get_running_loop().create_future()
                    await self._over
                elif self._transport is not None and not self._transport.is_closing():
                    await self.receive()
        except TimeoutError:
            log.debug("a client did not answer a close frame in time")
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop the connection without a word."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()
