"""A device of a test: a plain WebSocket client that keeps every frame and acknowledges as it is told."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import aiohttp

from tidings.wire.frames import SUBPROTOCOL

from .clock import PATIENCE_S

Frame = dict[str, Any]


class Device:
    """Connects with `connect`, reads in the background, and answers `ack` for what it got if `auto_ack`.

    `cut` drops the TCP connection without a goodbye, `leave` says goodbye, `connect` may follow either.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        device: str | None = None,
        auto_ack: bool = True,
        trust: ssl.SSLContext | None = None,
        **hello: Any,
    ) -> None:
        self.url = url
        self._trust = trust
        self.auto_ack = auto_ack
        self.frames: list[Frame] = []
        self.items: list[Frame] = []
        """Every item of every notification frame, over all connections, in order of arrival."""
        self.welcome: Frame = {}
        self.close_code: int | None = None
        self._hello = {"t": "hello", "token": token, **({"device": device} if device else {}), **hello}
        self._http: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._reader: asyncio.Task[None] | None = None
        self._news = asyncio.Condition()
        self._ref = 0

    @property
    def ids(self) -> list[str]:
        """Ids of the notifications that came, in order, duplicates included."""
        return [item["n"]["id"] for item in self.items]

    async def connect(self, **hello: Any) -> Frame:
        """Connect, say hello, return the welcome (or the first frame, when it is another)."""
        await self._end_reader()
        self._give_back()
        self._http = self._http or aiohttp.ClientSession()
        self._socket = await self._http.ws_connect(
            self.url, protocols=(SUBPROTOCOL,), max_msg_size=0, ssl=self._trust or True
        )
        self.close_code = None
        await self._socket.send_json({**self._hello, **hello})
        start = len(self.frames)
        self._reader = asyncio.create_task(self._read(self._socket))
        await self.until(lambda: len(self.frames) > start or self.close_code is not None, "a welcome")
        self.welcome = self.frames[start] if len(self.frames) > start else {}
        return self.welcome

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            frame = json.loads(message.data)
            self.frames.append(frame)
            if frame["t"] == "n":
                self.items.extend(frame["items"])
                if self.auto_ack:
                    await self.ack(*(item["pos"] for item in frame["items"]))
            async with self._news:
                self._news.notify_all()
        self.close_code = socket.close_code
        async with self._news:
            self._news.notify_all()

    async def until(self, condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
        """Wait until `condition` holds; looked at after each frame and at the close."""
        try:
            async with asyncio.timeout(patience_s), self._news:
                await self._news.wait_for(lambda: bool(condition()))
        except TimeoutError:
            last = self.frames[-3:]
            raise AssertionError(f"not within {patience_s:g} s: {what}; last frames: {last}") from None

    async def expect(self, *ids: str, patience_s: float = PATIENCE_S) -> None:
        """Wait until all these notifications have come."""
        await self.until(lambda: set(ids) <= set(self.ids), f"{sorted(set(ids) - set(self.ids))[:5]}", patience_s)

    async def expect_frame(self, kind: str, **members: Any) -> Frame:
        """Wait for a frame of a type with these members."""

        def found() -> Frame | None:
            return next(
                (f for f in self.frames if f["t"] == kind and all(f.get(k) == v for k, v in members.items())), None
            )

        await self.until(found, f"a {kind} frame with {members}")
        frame = found()
        assert frame is not None
        return frame

    async def closed(self) -> int | None:
        """Wait for the close; returns its code."""
        await self.until(lambda: self.close_code is not None, "a close")
        return self.close_code

    async def send(self, frame: Frame | str | bytes) -> None:
        assert self._socket is not None
        if isinstance(frame, bytes):
            await self._socket.send_bytes(frame)
        else:
            await self._socket.send_str(frame if isinstance(frame, str) else json.dumps(frame))

    async def ack(self, *positions: str) -> None:
        if positions:
            await self.send({"t": "ack", "pos": list(positions)})

    async def ask(self, kind: str, **members: Any) -> Frame:
        """A request and its answer (`ok` or `error`)."""
        self._ref += 1
        ref = self._ref
        await self.send({"t": kind, "ref": ref, **members})

        def answered() -> Frame | None:
            return next((f for f in self.frames if f.get("ref") == ref and f["t"] in ("ok", "error")), None)

        await self.until(answered, f"an answer to {kind}")
        answer = answered()
        assert answer is not None
        return answer

    async def cut(self) -> None:
        """Drop the connection without a closing handshake, as a dying network does (with a reset)."""
        assert self._socket is not None
        transport = self._socket.get_extra_info("socket")
        assert transport is not None
        connection = self._socket._response.connection
        if connection is not None and connection.transport is not None:
            connection.transport.abort()
        await self._end_reader()

    def pause(self) -> None:
        """Read nothing more from the socket."""
        self._transport().pause_reading()

    def resume(self) -> None:
        self._transport().resume_reading()

    def _transport(self) -> asyncio.Transport:
        assert self._socket is not None
        connection = self._socket._response.connection
        assert connection is not None
        assert isinstance(connection.transport, asyncio.Transport)
        return connection.transport

    async def leave(self) -> None:
        """Say goodbye (close code 1000)."""
        assert self._socket is not None
        await self._socket.close()
        await self._end_reader()

    def _give_back(self) -> None:
        """The session closes its connections, but one that nobody gave back complains when it is collected.

        That may be in the middle of any other test, which then fails for it.
        """
        if self._socket is not None:
            self._socket._response.close()

    async def _end_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.wait([reader])

    async def close(self) -> None:
        """Release everything; safe at any time."""
        await self._end_reader()
        self._give_back()
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
