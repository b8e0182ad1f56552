"""The gateway's socket on a real aiohttp server: what it replaces of aiohttp's behaves as aiohttp's does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web
from websockets.asyncio.client import ClientConnection, connect
from websockets.frames import Frame, Opcode

from support.clock import PATIENCE_S, until
from tidings.gateway.socket import Socket
from tidings.wire.frames import SUBPROTOCOL

LIMIT = 4096


class Server:
    """Accepts one client at a time: the first frame is awaited, the others come by callback."""

    def __init__(self) -> None:
        self.sockets: list[Socket] = []
        self.heard: list[str] = []
        self.ended = 0
        self.hold = asyncio.Event()
        """Cleared: after the first frame the server waits, and what comes is queued."""
        self.hold.set()
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        socket = Socket(LIMIT, 65_536)
        self.sockets.append(socket)
        response = await socket.accept(request)
        try:
            first = await socket.receive(PATIENCE_S)
            if isinstance(first, str):
                self.heard.append(first)
                await self.hold.wait()
                await socket.serve(self.heard.append)
        finally:
            await socket.gone()
            self.ended += 1
        return response

    def has_heard(self, *texts: str) -> Callable[[], bool]:
        return lambda: self.heard == list(texts)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    app = web.Application()
    app.router.add_get("/", made.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"ws://127.0.0.1:{runner.addresses[0][1]}/"
    yield made
    await runner.cleanup()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[ClientConnection]:
    options = {"compression": None, "max_size": None, "close_timeout": 1}
    async with connect(server.url, subprotocols=[SUBPROTOCOL], **options) as client:
        await client.send("hello")
        await until(lambda: server.heard, "the hello has come")
        yield client


async def close_code(client: ClientConnection) -> int | None:
    """Wait for the server's close frame."""
    async with asyncio.timeout(PATIENCE_S):
        await client.wait_closed()
    return client.close_code


async def test_frames_in_order(server: Server, client: ClientConnection) -> None:
    """Many frames, some of them in one segment and some in fragments, are heard in order."""
    texts = [f"{number}-{'x' * (number % 300)}" for number in range(500)]
    for text in texts[:400]:
        await client.send(text)
    for text in texts[400:]:
        await client.send([text[:2], text[2:]])
    await until(server.has_heard("hello", *texts), "all are heard")


async def test_frames_that_waited(server: Server) -> None:
    """What came while the session was opened is heard first."""
    server.hold.clear()
    async with connect(server.url, subprotocols=[SUBPROTOCOL], compression=None, close_timeout=1) as client:
        for text in ("hello", "one", "two"):
            await client.send(text)
        await until(lambda: server.heard, "the hello has come")
        # A pong says that what was sent before it has been read.
        server.hold.set()
        await client.send("three")
        await until(server.has_heard("hello", "one", "two", "three"), "all are heard")


async def test_ping_is_answered(server: Server, client: ClientConnection) -> None:
    """A ping gets its pong with the same data, and disturbs nothing."""
    async with asyncio.timeout(PATIENCE_S):
        await (await client.ping(b"data"))
    await client.send("on")
    await until(server.has_heard("hello", "on"), "it goes on")


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 200_000])
async def test_sizes_of_what_is_sent(server: Server, client: ClientConnection, size: int) -> None:
    """Every length of a frame's header is right."""
    server.sockets[0].send(b"x" * size)
    async with asyncio.timeout(PATIENCE_S):
        assert await client.recv() == "x" * size


async def test_goodbye(server: Server, client: ClientConnection) -> None:
    """A client's close is answered with its code, and the handler ends."""
    await client.close(1000, "bye")
    assert (client.close_code, client.close_reason) == (1000, "")
    await until(lambda: server.ended, "the handler has ended")


async def test_cut(server: Server, client: ClientConnection) -> None:
    """A connection that is gone ends the handler; a write to it is lost without a word."""
    client.transport.abort()
    await until(lambda: server.ended, "the handler has ended")
    server.sockets[0].send(b"too late")
    server.sockets[0].ping()
    assert not server.sockets[0].open


@pytest.mark.parametrize(
    ("opcode", "data", "code"),
    [
        (Opcode.BINARY, b"binary", 4400),
        (Opcode.TEXT, b"\xff\xfe", 4400),
        (Opcode.TEXT, b"x" * (LIMIT + 1), 4413),
        (Opcode.CONT, b"of nothing", 4400),
    ],
    ids=["binary", "no UTF-8", "too large", "a continuation of nothing"],
)
async def test_what_breaks_the_protocol(
    server: Server, client: ClientConnection, opcode: Opcode, data: bytes, code: int
) -> None:
    """The connection is closed with our code, and what was said before counts."""
    await client.send("before")
    client.transport.write(Frame(opcode, data).serialize(mask=True))
    assert await close_code(client) == code
    assert server.heard == ["hello", "before"]


async def test_silent_reader_is_congested(server: Server, client: ClientConnection) -> None:
    """What a client does not read is held back at the limit, and goes on when it reads."""
    client.transport.pause_reading()
    socket = server.sockets[0]
    for _ in range(20_000):
        if socket.congested():
            break
        socket.send(b"x" * 1000)
    assert socket.congested()
    client.transport.resume_reading()
    async with asyncio.timeout(PATIENCE_S):
        drained = asyncio.create_task(socket.drained(PATIENCE_S))
        while not drained.done():
            await client.recv()
    assert await drained
    assert not socket.congested()
