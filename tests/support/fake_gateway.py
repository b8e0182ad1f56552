"""A gateway that does what a test tells it, frame by frame: a real WebSocket server with no mesh behind it."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

from tidings.wire.frames import SUBPROTOCOL
from tidings.wire.position import Position

from .clock import PATIENCE_S

Frame = dict[str, Any]


def at(number: int) -> str:
    """A position."""
    return str(Position(1, number))


def item(number: int, *, attempt: int = 1, id: str | None = None, **event: Any) -> Frame:
    """A notification at a position, with an id of its own unless told."""
    base = {"specversion": "1.0", "id": id or f"n{number}", "source": "test", "type": "test.made", "data": number}
    return {"pos": at(number), "try": attempt, "n": {**base, **event}}


class Peer:
    """The gateway's side of one connection. Whatever the client sends is kept in order, to be expected."""

    def __init__(self, socket: web.WebSocketResponse, request: web.Request) -> None:
        self.hello: Frame = {}
        self.request = request
        self.close_code: int | None = None
        self._socket = socket
        self._frames: list[Frame] = []
        self._news = asyncio.Condition()
        self.over = asyncio.Event()
        """The connection has ended."""

    @property
    def unexpected(self) -> list[Frame]:
        """What came and was not expected yet."""
        return self._frames

    async def read(self) -> None:
        async for message in self._socket:
            async with self._news:
                self._frames.append(json.loads(message.data))
                self._news.notify_all()
        self.close_code = self._socket.close_code
        self.over.set()

    async def next(self) -> Frame:
        """The client's next frame."""
        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(lambda: self._frames)
            return self._frames.pop(0)

    async def expect(self, kind: str, **members: Any) -> Frame:
        """The client's next frame, which must be this."""
        frame = await self.next()
        assert frame["t"] == kind, frame
        assert {name: frame.get(name) for name in members} == members
        return frame

    async def expect_acks(self, *numbers: int) -> None:
        """The client's next frame acknowledges exactly these, in any order."""
        frame = await self.expect("ack")
        assert sorted(frame.get("pos", [])) == sorted(at(number) for number in numbers), frame

    async def welcome(self, *, heartbeat: float = 25, pos: str | None = at(0), window: int = 64, **more: Any) -> None:
        device = self.hello.get("device", "given-by-gateway")
        ready = {"session": "s", "user": "alice", "device": device, "unread": 0}
        await self.send({"t": "welcome", **ready, "pos": pos, "window": window, "heartbeat": heartbeat, **more})

    async def send(self, *frames: Frame | str) -> None:
        for frame in frames:
            await self._socket.send_str(frame if isinstance(frame, str) else json.dumps(frame))

    async def push(self, *items: Frame) -> None:
        """Notifications, in one frame."""
        await self.send({"t": "n", "items": list(items)})

    async def answer(self, kind: str, **members: Any) -> Frame:
        """Expect a request and answer it with `ok`."""
        request = await self.expect(kind)
        await self.send({"t": "ok", "ref": request["ref"], **members})
        return request

    async def close(self, code: int) -> None:
        await self._socket.close(code=code)

    def end(self) -> None:
        """The gateway's process dies: its kernel ends the connection without a WebSocket close."""
        assert self.request.transport is not None
        self.request.transport.close()

    async def gone(self) -> int | None:
        """Wait for the client to end the connection; returns its close code."""
        async with asyncio.timeout(PATIENCE_S):
            await self.over.wait()
        return self.close_code


class FakeGateway:
    """Accepts connections and hands them to the test, one by one, after their first frame."""

    def __init__(self, *, protocols: tuple[str, ...] = (SUBPROTOCOL,)) -> None:
        self._protocols = protocols
        self._peers: asyncio.Queue[Peer] = asyncio.Queue(maxsize=100)
        self._runner: web.AppRunner | None = None
        self.url = ""
        self.handshakes = 0
        self.refuse_with: int | None = None
        """An HTTP status instead of the next handshakes."""

    async def accepted(self) -> Peer:
        """The next connection, with its hello read."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._peers.get()

    async def welcomed(self, **members: Any) -> Peer:
        """The next connection, welcomed."""
        peer = await self.accepted()
        await peer.welcome(**members)
        return peer

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.handshakes += 1
        if self.refuse_with is not None:
            return web.Response(status=self.refuse_with)
        socket = web.WebSocketResponse(protocols=self._protocols, compress=False, timeout=1)
        await socket.prepare(request)
        peer = Peer(socket, request)
        first = await socket.receive()
        if first.type is aiohttp.WSMsgType.TEXT:
            peer.hello = json.loads(first.data)
            assert peer.hello["t"] == "hello", peer.hello
            self._peers.put_nowait(peer)
            await peer.read()
        return socket

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/v1/ws", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"ws://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()
