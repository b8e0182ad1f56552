"""One WebSocket connection to a gateway: frames in, frames out, and whether anybody is still there."""

from __future__ import annotations

import ssl
from typing import Any, Final, Self

import aiohttp
import orjson

from tidings.wire.errors import ConnectionLost
from tidings.wire.frames import SUBPROTOCOL

__all__ = ["BREACH", "GONE", "Frame", "Link"]

Frame = dict[str, Any]

GONE: Final = aiohttp.WSCloseCode.GOING_AWAY
BREACH: Final = aiohttp.WSCloseCode.POLICY_VIOLATION

_MAX_FRAME_BYTES: Final = 8 * 1024 * 1024
"""The largest a gateway sends is an inbox page: 200 notifications of 16 KiB."""
_HEARTBEAT_S: Final = 25.0
_PONG_S: Final = 10.0
_CLOSE_WAIT_S: Final = 1.0


class Link:
    """A connected socket. aiohttp answers the gateway's pings; `receive` finds out whether they stopped coming."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self.heartbeat_s = _HEARTBEAT_S
        self.close_code: int | None = None
        """Of the gateway's close frame; None when the connection ended without one."""

    @classmethod
    async def open(cls, http: aiohttp.ClientSession, url: str, tls: ssl.SSLContext | None = None) -> Self:
        """Shake hands; raises `ConnectionLost` when nobody is there, or somebody else.

        `tls` is for a gateway that not the system's authorities vouch for.
        """
        try:
            socket = await http.ws_connect(
                url,
                ssl=tls or True,
                protocols=(SUBPROTOCOL,),
                compress=0,
                max_msg_size=_MAX_FRAME_BYTES,
                timeout=aiohttp.ClientWSTimeout(ws_receive=None, ws_close=_CLOSE_WAIT_S),
            )
        except aiohttp.WSServerHandshakeError as error:
            raise ConnectionLost(f"the server refuses the WebSocket: {error.status} {error.message}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(str(error) or type(error).__name__) from None
        if socket.protocol != SUBPROTOCOL:
            await socket.close(code=BREACH)
            raise ConnectionLost(f"what answers does not speak {SUBPROTOCOL}")
        return cls(socket)

    async def receive(self) -> Frame | None:
        """The next frame; None after a close. Raises `ConnectionLost` when the gateway is silent or talks nonsense."""
        message = await self._next()
        if message.type is aiohttp.WSMsgType.CLOSE:
            # Not `socket.close_code`, where aiohttp also puts its own verdict on a connection that just ended.
            self.close_code = message.data
            return None
        if message.type is not aiohttp.WSMsgType.TEXT:
            return None
        try:
            frame = orjson.loads(message.data)
        except orjson.JSONDecodeError as error:
            raise ConnectionLost(f"the gateway sent what is not JSON: {error}") from None
        if not isinstance(frame, dict):
            raise ConnectionLost("the gateway sent what is no frame")
        return frame

    async def _next(self) -> aiohttp.WSMessage:
        """Any message. After two heartbeats without as much as a ping the gateway is asked whether it lives."""
        try:
            return await self._socket.receive(2 * self.heartbeat_s)
        except TimeoutError:
            await self.send({"t": "ping"})
        try:
            return await self._socket.receive(min(_PONG_S, self.heartbeat_s))
        except TimeoutError:
            raise ConnectionLost("the gateway does not answer") from None

    async def send(self, frame: Frame) -> None:
        """Write one frame; raises `ConnectionLost` when the connection has ended."""
        try:
            await self._socket.send_str(orjson.dumps(frame).decode())
        except (ConnectionError, aiohttp.ClientError) as error:
            raise ConnectionLost(str(error) or type(error).__name__) from None

    async def close(self, code: int) -> None:
        """Say goodbye; a second time changes nothing."""
        await self._socket.close(code=code)
