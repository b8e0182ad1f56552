"""A device's socket at the level of bytes: its queue of frames does what aiohttp's does, on both event loops.

The same bytes go to a `Socket`, used as the gateway's door uses it, and to a WebSocket of unmodified aiohttp.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket as sockets
import ssl
import struct
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import pytest
import uvloop
import websockets
from aiohttp import WSMsgType, web

from support.certificates import Authority
from support.clock import PATIENCE_S, SCALE, until
from tidings.gateway.meter import Limits
from tidings.gateway.socket import Socket, Turns
from tidings.runtime.tls import ServerTls
from tidings.wire import codes
from tidings.wire.frames import SUBPROTOCOL

FRAME_MAX: Final = 100_000
BUFFER_MAX: Final = 65_536
LIMITS = Limits(1e6, 1_000_000, 1e9, 10**9)
"""Nothing here is about them."""
SMALL_KERNEL_BUFFER: Final = 4_096
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


# What a client puts on the wire


def frame(data: str | bytes = b"", opcode: int = TEXT, *, fin: bool = True, reserved: int = 0) -> bytes:
    """One masked frame, valid or not."""
    payload = data.encode() if isinstance(data, str) else data
    return head(len(payload), opcode, fin=fin, reserved=reserved) + bytes(
        byte ^ MASK[at % 4] for at, byte in enumerate(payload)
    )


def head(size: int, opcode: int = TEXT, *, fin: bool = True, reserved: int = 0) -> bytes:
    """What comes before the payload."""
    first = fin << 7 | reserved << 4 | opcode
    if size < 126:
        return struct.pack("!BB", first, 0x80 | size) + MASK
    if size < 65_536:
        return struct.pack("!BBH", first, 0x80 | 126, size) + MASK
    return struct.pack("!BBQ", first, 0x80 | 127, size) + MASK


MASK: Final = b"\x12\x34\x56\x78"


def goodbye(code: int | None = 1000, reason: str = "") -> bytes:
    return frame(b"" if code is None else struct.pack("!H", code) + reason.encode(), CLOSE)


HELLO: Final = frame("hello")


class Client(asyncio.Protocol):
    """Sends bytes as it is told, takes the server's frames apart, and answers a close unless it is `silent`."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, bytes]] = []
        self.received = 0
        self.silent = False
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport
        self._shaken = False
        self._rest = b""

    @classmethod
    async def connect(
        cls, server: Server, path: str, first: bytes = b"", *, kernel_buffer: int | None = None
    ) -> Client:
        """Open a connection, with `first` in the segment of the handshake."""
        loop = asyncio.get_running_loop()
        plain = sockets.socket()
        plain.setblocking(False)
        if kernel_buffer is not None:
            plain.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, kernel_buffer)
        await loop.sock_connect(plain, ("127.0.0.1", server.port))
        secured: dict[str, Any] = {"ssl": server.trust, "server_hostname": "localhost"} if server.trust else {}
        _, client = await loop.create_connection(cls, sock=plain, **secured)
        request = (
            f"GET {path} HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {b64encode(os.urandom(16)).decode()}\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
        )
        client.say(request.encode() + first)
        return client

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self._rest += data
        if not self._shaken and b"\r\n\r\n" in self._rest:
            answer, _, self._rest = self._rest.partition(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 101 ")
            self._shaken = True
        while self._shaken and self._take_one():
            pass

    def _take_one(self) -> bool:
        rest = self._rest
        if len(rest) < 2:
            return False
        size, at = rest[1], 2
        assert size < 128, "a server does not mask"
        if size >= 126:
            at = 4 if size == 126 else 10
            if len(rest) < at:
                return False
            least = 126 if size == 126 else 65_536
            size = int.from_bytes(rest[2:at], "big")
            assert size >= least, "a length takes as few bytes as it can"
        if len(rest) < at + size:
            return False
        assert rest[0] & 0xF0 == 0x80, "a server's frames are whole, and not compressed"
        opcode, payload, self._rest = rest[0] & 0xF, rest[at : at + size], rest[at + size :]
        self.frames.append((opcode, payload))
        if opcode == CLOSE and not self.silent:
            self.say(frame(payload, CLOSE))
        return True

    def of(self, opcode: int) -> list[bytes]:
        return [payload for kind, payload in self.frames if kind == opcode]

    async def got(self, opcode: int, count: int = 1) -> list[bytes]:
        """Wait for so many frames of a kind."""
        await until(lambda: len(self.of(opcode)) >= count or self.lost.done(), f"{count} frames of kind {opcode}")
        return self.of(opcode)

    def say(self, data: bytes) -> None:
        """Send, unless the server has ended the connection: uvloop's transports raise then."""
        if not self.transport.is_closing():
            self.transport.write(data)

    async def ended(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.lost

    def finish(self) -> None:
        """End without a close frame: a FIN, or what TLS has for it, which ends both directions."""
        self.transport.write_eof() if self.transport.can_write_eof() else self.transport.close()

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        plain = self.transport.get_extra_info("socket")
        plain.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


# The two servers


class Echo:
    """The server's end of one connection: says `welcome` after a hello, and every text again."""

    def __init__(self, request: web.Request) -> None:
        self.heard: list[str] = []
        self.code: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        """The close code that the server ended up with."""
        assert request.transport is not None
        self.transport: asyncio.Transport = request.transport
        self.socket: Socket | None = None
        self.response: Any = None

    def waiting(self) -> int:
        """How many frames wait to be read. Only aiohttp's private queue knows."""
        reader = self.response._reader
        return 0 if reader is None else len(reader._buffer)


class Server:
    """Both servers on one port; `go_on` cleared holds them between hello and welcome."""

    def __init__(self, trust: ssl.SSLContext | None) -> None:
        self.port = 0
        self.trust = trust
        """What a client needs for TLS; None where there is none."""
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.connections: asyncio.Queue[Echo] = asyncio.Queue()
        self.transports: list[asyncio.Transport] = []
        self.react: Callable[[Socket, str], None] = lambda socket, text: socket.send(text.encode())

    async def ours(self, request: web.Request) -> web.StreamResponse:
        """As `tidings.gateway.door` does it."""
        echo = Echo(request)
        self.transports.append(echo.transport)
        echo.socket = socket = Socket(FRAME_MAX, BUFFER_MAX, LIMITS, Turns())
        echo.response = response = await socket.accept(request)

        def hear(text: str) -> None:
            echo.heard.append(text)
            self.react(socket, text)

        try:
            hello = await socket.receive()
            await self.connections.put(echo)
            if hello is not None:
                await self.go_on.wait()
                socket.send(b"welcome")
                await socket.serve(hear)
        finally:
            await socket.gone()
            echo.code.set_result(response.close_code)
        return response

    async def theirs(self, request: web.Request) -> web.StreamResponse:
        """aiohttp as its documentation says."""
        echo = Echo(request)
        self.transports.append(echo.transport)
        echo.response = response = web.WebSocketResponse(
            compress=False, protocols=(SUBPROTOCOL,), max_msg_size=FRAME_MAX, timeout=2.0
        )
        await response.prepare(request)
        hello = await response.receive()
        await self.connections.put(echo)
        if hello.type is WSMsgType.TEXT:
            await self.go_on.wait()
            await response.send_str("welcome")
            async for message in response:
                if message.type is WSMsgType.TEXT:
                    echo.heard.append(message.data)
                    await response.send_str(message.data)
                elif message.type is WSMsgType.BINARY:
                    await response.close(code=codes.BAD_FRAME.code)
        echo.code.set_result(response.close_code)
        return response

    def origin(self, scheme: str) -> str:
        return f"{scheme}{'' if self.trust is None else 's'}://localhost:{self.port}"

    async def accepted(self) -> Echo:
        async with asyncio.timeout(PATIENCE_S):
            return await self.connections.get()


@asynccontextmanager
async def serving(tls: ServerTls | None, trust: ssl.SSLContext | None) -> AsyncIterator[Server]:
    """Both servers, without connections."""
    served = Server(trust)
    app = web.Application()
    app.router.add_get("/ours", served.ours)
    app.router.add_get("/theirs", served.theirs)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls and tls.context).start()
    served.port = runner.addresses[0][1]
    try:
        yield served
    finally:
        served.go_on.set()
        # A test that failed half-way may leave a client that never reads.
        for transport in served.transports:
            if transport.get_write_buffer_size():
                transport.abort()
        await runner.cleanup()


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on asyncio's loop and on the gateway's, uvloop, there with TLS too: their transports differ.

    Its server comes with it.
    """
    signature = inspect.signature(test)
    _, *others = signature.parameters.values()

    def run(transports: str, authority: Authority, **options: Any) -> None:
        secured = transports == "uvloop-tls"

        async def served() -> None:
            tls = ServerTls(*map(str, authority.pair("socket"))) if secured else None
            async with serving(tls, authority.trust() if secured else None) as server:
                async with asyncio.timeout(2 * PATIENCE_S):
                    await test(server, **options)

        loop = asyncio.new_event_loop if transports == "asyncio" else uvloop.new_event_loop
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(served())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [inspect.Parameter(name, kind) for name in ("transports", "authority")]
    run.__signature__ = signature.replace(parameters=[*own, *others])  # type: ignore[attr-defined]
    return pytest.mark.parametrize("transports", ["asyncio", "uvloop", "uvloop-tls"])(run)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Whom the clients of this module trust."""
    return Authority(tmp_path_factory.mktemp("tls"))


async def welcomed(server: Server, path: str = "/ours", **options: Any) -> tuple[Client, Echo]:
    """A client that has its welcome, and the server's end: from here on, frames are handled by callback."""
    client = await Client.connect(server, path, HELLO, **options)
    assert await client.got(TEXT) == [b"welcome"]
    return client, await server.accepted()


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that never answer a close are given up sooner, for the sake of the time that the tests take."""
    monkeypatch.setattr("tidings.gateway.socket._CLOSE_WAIT_S", 0.3 * SCALE)


# The same bytes to both


class Case(NamedTuple):
    """What a client sends, and what comes of it."""

    name: str
    sent: bytes
    heard: Sequence[str] = ()
    pongs: Sequence[bytes] = ()
    close: tuple[int, int] = (1000, 1000)
    """The code of the server's close frame: ours, and aiohttp's."""
    code: int = 1000
    """What the server takes down as the code of the connection."""


NUMBERS: Final = [str(number) for number in range(2_000)]
LENGTHS: Final = [0, 1, 125, 126, 127, 65_535, 65_536, FRAME_MAX - 1]
BROKEN: Final = (codes.BAD_FRAME.code, 1002)
NO_TEXT: Final = (codes.BAD_FRAME.code, 1007)
TOO_BIG: Final = (codes.FRAME_TOO_LARGE.code, 1009)
ABNORMAL: Final = 1006

CASES: Final = [
    Case("text", frame("grüße") + goodbye(), ["grüße"]),
    *(Case(f"text of {size} bytes", frame("x" * size) + goodbye(), ["x" * size]) for size in LENGTHS),
    Case(
        "fragmented text",
        frame("one ", fin=False) + frame("two ", CONTINUATION, fin=False) + frame("three", CONTINUATION) + goodbye(),
        ["one two three"],
    ),
    Case(
        "a character cut in two by fragments",
        frame("ü".encode()[:1], fin=False) + frame("ü".encode()[1:], CONTINUATION) + goodbye(),
        ["ü"],
    ),
    Case(
        "a ping between fragments",
        frame("one ", fin=False) + frame("p", PING) + frame("two", CONTINUATION) + frame("three") + goodbye(),
        ["one two", "three"],
        [b"p"],
    ),
    Case("pings", frame(b"", PING) + frame(b"x" * 125, PING) + goodbye(), pongs=[b"", b"x" * 125]),
    Case("a pong that nobody asked for", frame("p", PONG) + frame("one") + goodbye(), ["one"]),
    Case("many frames", b"".join(map(frame, NUMBERS)) + goodbye(), NUMBERS),
    Case(
        "many frames and pings",
        b"".join(frame(number) + frame(number, PING) for number in NUMBERS) + goodbye(),
        NUMBERS,
        [number.encode() for number in NUMBERS],
    ),
    Case("goodbye", goodbye(1000, "enough"), code=1000),
    Case("going away", goodbye(1001), code=1001),
    Case("goodbye with a code of its own", goodbye(4999, "mine"), code=4999),
    Case("goodbye without a code", goodbye(None), code=0),
    Case("reserved bits", frame("one") + frame("two", reserved=1) + frame("three"), ["one"], [], BROKEN, ABNORMAL),
    Case("compressed, as was not agreed", frame("one", reserved=4), [], [], BROKEN, ABNORMAL),
    Case("unknown opcode", frame("one") + frame("two", 3) + frame("three"), ["one"], [], BROKEN, ABNORMAL),
    Case("fragmented ping", frame("one", PING, fin=False), [], [], BROKEN, ABNORMAL),
    Case("ping too long", frame(b"x" * 126, PING), [], [], BROKEN, ABNORMAL),
    Case("continuation of nothing", frame("one", CONTINUATION), [], [], BROKEN, ABNORMAL),
    Case("text within a text", frame("one", fin=False) + frame("two"), [], [], BROKEN, ABNORMAL),
    Case("close of one byte", frame(b"x", CLOSE), [], [], BROKEN, ABNORMAL),
    Case("close with a code that is none", goodbye(1005), [], [], BROKEN, ABNORMAL),
    Case("not UTF-8", frame("one") + frame(b"\xff") + frame("three"), ["one"], [], NO_TEXT, ABNORMAL),
    Case("reason not UTF-8", frame(b"\x03\xe8\xff", CLOSE), [], [], NO_TEXT, ABNORMAL),
    Case("text too large", frame("one") + head(FRAME_MAX) + b"x", ["one"], [], TOO_BIG, ABNORMAL),
    Case("text much too large", head(2**63), [], [], TOO_BIG, ABNORMAL),
    Case(
        "fragments too large together",
        frame("x" * (FRAME_MAX - 10), fin=False) + frame("x" * 10, CONTINUATION),
        [],
        [],
        TOO_BIG,
        ABNORMAL,
    ),
    Case(
        "binary", frame("one") + frame(b"two", BINARY), ["one"], [], (codes.BAD_FRAME.code, codes.BAD_FRAME.code), 4400
    ),
]


async def send_early(server: Server, path: str, sent: bytes) -> Client:
    """All of it in the segment of the handshake: aiohttp keeps that until there is somebody to read it."""
    return await Client.connect(server, path, HELLO + sent)


async def send_waiting(server: Server, path: str, sent: bytes) -> Client:
    """All of it while the server still looks at the hello."""
    server.go_on.clear()
    client = await Client.connect(server, path, HELLO)
    echo = await server.accepted()
    client.say(sent)
    # Broken frames never wait, they end the queue; a long text pauses nothing that is alone.
    await until(
        lambda: echo.waiting() or echo.response._reader.exception() is not None, "the queue has heard of the frames"
    )
    server.connections.put_nowait(echo)
    server.go_on.set()
    return client


async def send_live(server: Server, path: str, sent: bytes) -> Client:
    """All of it in one write to a server that handles frames as they come."""
    client = await Client.connect(server, path, HELLO)
    await client.got(TEXT)
    client.say(sent)
    return client


async def send_pieces(server: Server, path: str, sent: bytes) -> Client:
    """In pieces that end anywhere within frames."""
    client = await Client.connect(server, path, HELLO)
    await client.got(TEXT)
    size = 1 if len(sent) < 1_000 else 1_021
    for at in range(0, len(sent), size):
        client.say(sent[at : at + size])
        # For the server's turn; what is asserted does not depend on how the pieces come together again.
        await asyncio.sleep(0)
    return client


@pytest.mark.parametrize("send", [send_early, send_waiting, send_live, send_pieces])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@on_both_loops
async def test_same_bytes_same_behaviour(server: Server, case: Case, send: Callable[..., Any]) -> None:
    """Whenever and however the bytes come, ours hears, answers and ends as aiohttp does, but with its own codes."""
    for which, path in enumerate(("/ours", "/theirs")):
        client = await send(server, path, case.sent)
        await client.ended()
        echo = await server.accepted()
        texts = [text.decode() for text in client.of(TEXT)]
        assert echo.heard == [*case.heard], path
        assert texts[: 1 + len(case.heard)] == ["welcome", *case.heard], path
        assert client.of(PONG) == [*case.pongs], path
        assert [int.from_bytes(close[:2], "big") for close in client.of(CLOSE)] == [case.close[which]], path
        assert await echo.code == case.code, path


@pytest.mark.parametrize("last", [goodbye(), frame(b"two", BINARY)], ids=["close", "binary"])
@on_both_loops
async def test_text_after_the_end(server: Server, last: bytes) -> None:
    """What follows the frame that ends a connection, in the same segment, is not heard, as with aiohttp."""
    for path in ("/theirs", "/ours"):
        client, echo = await welcomed(server, path)
        client.say(frame("one") + last + frame("three"))
        await client.ended()
        assert echo.heard == ["one"], path


@pytest.mark.parametrize("half", [b"", frame("two")[:3], frame("two", fin=False)], ids=["between", "in", "fragment"])
@pytest.mark.parametrize("end", ["reset", "eof"])
@pytest.mark.parametrize("path", ["/ours", "/theirs"])
@on_both_loops
async def test_abrupt_end(server: Server, path: str, end: str, half: bytes) -> None:
    """A connection that ends without a close frame is heard out and taken down as 1006, which is no goodbye."""
    client, echo = await welcomed(server, path)
    client.say(frame("one") + half)
    assert await client.got(TEXT, 2) == [b"welcome", b"one"]
    client.reset() if end == "reset" else client.finish()
    await client.ended()
    async with asyncio.timeout(PATIENCE_S):
        assert await echo.code == ABNORMAL
    assert echo.heard == ["one"]
    assert client.of(CLOSE) == []


@on_both_loops
async def test_frames_that_waited_when_the_client_left(server: Server) -> None:
    """What a client said before it vanished is heard, also when the server only gets to it afterwards."""
    server.go_on.clear()
    client = await Client.connect(server, "/ours", HELLO + frame("one") + frame("two"))
    echo = await server.accepted()
    client.finish()
    await until(echo.transport.is_closing, "the server has seen the end")
    server.go_on.set()
    assert await echo.code == ABNORMAL
    assert echo.heard == ["one", "two"]
    await client.ended()


# Pressure


@on_both_loops
async def test_order_from_queue_to_callback(server: Server) -> None:
    """Frames that waited come before those that come while they are handled, each once and in order."""
    server.go_on.clear()
    client = await Client.connect(server, "/ours", HELLO + b"".join(map(frame, NUMBERS[:100])))
    echo = await server.accepted()
    await until(lambda: echo.waiting() == 100, "the frames wait in aiohttp's queue")
    assert echo.socket is not None
    later = iter(range(100, len(NUMBERS), 100))

    def react(socket: Socket, text: str) -> None:
        # Each tenth frame brings a hundred more, so that some come in the middle of the change-over.
        if int(text) % 10 == 0 and (at := next(later, None)) is not None:
            client.say(b"".join(map(frame, NUMBERS[at : at + 100])))

    server.react = react
    server.go_on.set()
    await until(lambda: len(echo.heard) >= len(NUMBERS), "all of them are heard")
    assert echo.heard == NUMBERS
    assert echo.waiting() == 0
    client.say(goodbye())
    await client.ended()


@pytest.mark.parametrize("path", ["/ours", "/theirs"])
@on_both_loops
async def test_reading_pauses_before_the_welcome(server: Server, path: str) -> None:
    """Who floods a server that is not ready is read no further than a bound; it goes on later, losing nothing."""
    server.go_on.clear()
    client = await Client.connect(server, path, HELLO)
    echo = await server.accepted()
    texts = [f"{number} ".ljust(10_000, "x") for number in range(1_000)]
    for text in texts:
        client.say(frame(text))
    await until(lambda: not echo.transport.is_reading(), "the server stops reading")
    # Over TLS what waits is below, where nobody counts it.
    assert server.trust is not None or client.transport.get_write_buffer_size() > 0
    assert path == "/theirs" or echo.waiting() * 10_000 < 4 * BUFFER_MAX
    server.go_on.set()
    await until(lambda: len(echo.heard) >= len(texts), "the server has read all of it")
    assert echo.heard == texts
    assert echo.transport.is_reading()
    client.say(goodbye())
    await client.ended()
    assert await echo.code == 1000


@pytest.mark.parametrize("path", ["/ours", "/theirs"])
@on_both_loops
async def test_pings_of_a_client_that_reads_nothing(server: Server, path: str) -> None:
    """Pongs that nobody takes make the server stop reading; when they are read, each ping has its pong, in order."""
    client, echo = await welcomed(server, path, kernel_buffer=SMALL_KERNEL_BUFFER)
    shrink(echo)
    client.transport.pause_reading()
    sent: list[bytes] = []

    def flood() -> bool:
        for _ in range(200):
            sent.append(f"{len(sent)} ".ljust(125, "x").encode())
            client.say(frame(sent[-1], PING))
        return not echo.transport.is_reading()

    await until(flood, "the server stops reading")
    client.say(frame("after the pings"))
    client.transport.resume_reading()
    assert await client.got(PONG, len(sent)) == sent
    assert await client.got(TEXT, 2) == [b"welcome", b"after the pings"]
    assert echo.transport.is_reading()
    client.say(goodbye())
    await client.ended()


def shrink(echo: Echo) -> None:
    """Let the kernel keep little of what is sent, so that the server's own buffer fills."""
    plain = echo.transport.get_extra_info("socket")
    plain.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, SMALL_KERNEL_BUFFER)


async def congest(server: Server) -> tuple[Client, Echo, Socket, int]:
    """A client that reads nothing, and has been sent as much as its socket takes; how many frames that were."""
    client, echo = await welcomed(server, kernel_buffer=SMALL_KERNEL_BUFFER)
    shrink(echo)
    client.transport.pause_reading()
    assert echo.socket is not None
    socket, count = echo.socket, 0
    assert not socket.congested()

    quiet = 0

    def full() -> bool:
        nonlocal count, quiet
        before = count
        while not socket.congested():
            socket.send(b"x" * 1_000)
            count += 1
            assert count < 100_000, "the socket takes everything"
        quiet = quiet + 1 if count == before else 0
        return quiet == 10

    # Kernel and TLS move more to the other end after they have refused for the first time.
    await until(full, "nothing moves any more")
    return client, echo, socket, count


@on_both_loops
async def test_slow_reader_is_waited_for(server: Server) -> None:
    """Over the limit the socket is congested, by one frame at most, and free again when the client has read."""
    client, echo, socket, count = await congest(server)
    limit = BUFFER_MAX if server.trust is None else BUFFER_MAX // 2
    assert limit < echo.transport.get_write_buffer_size() <= limit + 1_004
    waiting = asyncio.ensure_future(socket.drained(PATIENCE_S))
    client.transport.resume_reading()
    assert await waiting
    assert not socket.congested()
    await client.got(TEXT, 1 + count)
    client.say(goodbye())
    await client.ended()


@on_both_loops
async def test_slow_reader_is_given_up(server: Server) -> None:
    """Waiting for a client that never reads says so when the time is over, each time, and fails nobody else."""
    client, _, socket, _ = await congest(server)
    other = asyncio.ensure_future(socket.drained(PATIENCE_S))
    for _ in range(2):
        socket.stalled = True
        assert not await socket.drained(0.05 * SCALE)
        assert not socket.stalled
    assert not other.done()
    client.reset()
    await client.ended()
    await other


@pytest.mark.usefixtures("short_wait")
@pytest.mark.parametrize("waited", [False, True])
@on_both_loops
async def test_slow_reader_is_closed(server: Server, waited: bool) -> None:
    """A client that never reads is closed, also after it was waited for: its unread buffer is given up and freed."""
    client, echo, socket, count = await congest(server)
    client.say(frame("still talking"))
    await until(lambda: echo.heard, "the server hears, whatever the client reads")
    assert not waited or not await socket.drained(0.05 * SCALE)
    closing = asyncio.ensure_future(socket.close(codes.TOO_SLOW, b"farewell"))
    await asyncio.wait([closing], timeout=PATIENCE_S)
    try:
        assert closing.done()
        assert not closing.cancelled()
        await echo.code
        assert not socket.open
        await until(lambda: echo.transport.get_write_buffer_size() == 0, "the buffer is freed")
    finally:
        client.transport.resume_reading()
    await client.ended()
    assert client.received < count * 1_000


# Closing from the server's side


@on_both_loops
async def test_dismissal(server: Server) -> None:
    """A dismissed client has its farewell and the code; what it still says is not heard; the first reason counts."""
    server.react = lambda socket, text: socket.dismiss(codes.REPLACED, b"farewell") if text == "two" else None
    client, echo = await welcomed(server)
    client.say(frame("one") + frame("two") + frame("three") + frame("four", PING))
    await client.got(CLOSE)
    assert echo.socket is not None
    echo.socket.dismiss(codes.TOO_SLOW, b"another")
    echo.socket.send(b"too late")
    echo.socket.ping()
    await client.ended()
    assert client.of(TEXT) == [b"welcome", b"farewell"]
    assert client.of(CLOSE) == [struct.pack("!H", 4409) + b"replaced"]
    assert client.of(PING) == []
    assert echo.heard == ["one", "two"]
    assert await echo.code == 4409


@on_both_loops
async def test_dismissal_of_a_client_that_reads_late(server: Server) -> None:
    """A client with unread frames, fewer than the limit, that reads on within two seconds gets them and the reason."""
    client, echo = await welcomed(server, kernel_buffer=SMALL_KERNEL_BUFFER)
    shrink(echo)
    client.transport.pause_reading()
    socket = echo.socket
    assert socket is not None
    while not echo.transport.get_write_buffer_size():
        socket.send(b"x" * 1_000)
    for _ in range(20):
        socket.send(b"x" * 1_000)
    assert not socket.congested()
    socket.dismiss(codes.REPLACED, b"farewell")
    # So that the dismissal is under way; the client reads long before its two seconds are over.
    await asyncio.sleep(0)
    client.transport.resume_reading()
    await client.ended()
    assert client.of(TEXT)[-1:] == [b"farewell"]
    assert client.of(CLOSE) == [struct.pack("!H", 4409) + b"replaced"]


@pytest.mark.usefixtures("short_wait")
@on_both_loops
async def test_dismissal_of_a_client_that_does_not_answer(server: Server) -> None:
    """Who goes on talking and never answers the close is dropped."""
    client, echo = await welcomed(server)
    client.silent = True
    assert echo.socket is not None
    closing = asyncio.ensure_future(echo.socket.close(codes.RESTART))
    await client.got(CLOSE)
    client.say(frame("one") + frame("p", PING))
    async with asyncio.timeout(PATIENCE_S):
        await closing
        await echo.code
    await client.ended()
    assert echo.heard == []


@pytest.mark.parametrize("answer", [1000, 1012, None], ids=["goodbye", "same", "silence"])
@pytest.mark.parametrize("reason", [codes.RESTART, codes.TOO_SLOW, codes.REPLACED], ids=lambda reason: reason.name)
@on_both_loops
async def test_dismissed_client_may_return(server: Server, reason: codes.Close, answer: int | None) -> None:
    """Whether a dismissed client may come back is for the reason to say, whatever the client answers."""
    client, echo = await welcomed(server)
    client.silent = True
    assert echo.socket is not None
    echo.socket.dismiss(reason)
    await client.got(CLOSE)
    client.finish() if answer is None else client.say(goodbye(answer))
    await client.ended()
    await echo.code
    assert echo.socket.may_return is reason.reconnect


@pytest.mark.parametrize("code", [1000, 1001, 4999])
@on_both_loops
async def test_client_that_leaves_may_return(server: Server, code: int) -> None:
    """A client's own goodbye is final, another code is not; a dismissal that comes too late changes neither."""
    client, echo = await welcomed(server)
    client.say(goodbye(code))
    await client.ended()
    assert await echo.code == code
    assert echo.socket is not None
    assert echo.socket.may_return is (code != 1000)
    await echo.socket.close(codes.TOO_SLOW)
    assert echo.socket.may_return is (code != 1000)


@pytest.mark.usefixtures("short_wait")
@pytest.mark.parametrize(("last", "code"), [(goodbye(), 1000), (frame("", 3), ABNORMAL)], ids=["goodbye", "broken"])
@on_both_loops
async def test_end_of_a_client_that_reads_nothing(server: Server, last: bytes, code: int) -> None:
    """Who says goodbye, or something broken, and leaves its frames unread holds them little longer than others."""
    client, echo, _, count = await congest(server)
    client.say(last)
    assert await echo.code == code
    try:
        await until(lambda: echo.transport.get_write_buffer_size() == 0, "the buffer is freed")
    finally:
        client.transport.resume_reading()
    await client.ended()
    assert client.received < count * 1_000


def open_sockets() -> int:
    """Of this process; the folder's own descriptor is among those listed, and gone."""
    links = (Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(link.is_socket() for link in links)


@pytest.mark.usefixtures("short_wait")
@on_both_loops
async def test_end_of_a_client_that_leaves_little_unread(server: Server) -> None:
    """Who says goodbye with a little unread, which over TLS nobody counts, does not keep the connection either."""
    client, echo = await welcomed(server, kernel_buffer=SMALL_KERNEL_BUFFER)
    shrink(echo)
    client.transport.pause_reading()
    socket = echo.socket
    assert socket is not None
    for _ in range(30):
        socket.send(b"x" * 1_000)
    before = open_sockets()
    client.say(goodbye())
    assert await echo.code == 1000
    await until(lambda: open_sockets() < before, "the server's end is closed")
    client.transport.abort()


@on_both_loops
async def test_sending_to_a_client_that_has_gone(server: Server) -> None:
    """Frames for a connection that was reset are lost without an error, on either loop."""
    client, echo = await welcomed(server)
    client.reset()
    assert await echo.code == ABNORMAL
    assert echo.socket is not None
    assert not echo.socket.open
    for _ in range(10):
        echo.socket.send(b"lost")
        echo.socket.ping()
    echo.socket.abort()
    await echo.socket.close(codes.RESTART, b"lost")


@on_both_loops
async def test_signs_of_life(server: Server) -> None:
    """Each kind of frame counts as a sign of life: a text by callback, a ping, and the pong to a ping of ours."""
    client, echo = await welcomed(server)
    socket = echo.socket
    assert socket is not None
    for said in (frame("one"), frame("p", PING), frame(b"", PONG)):
        socket.ping()
        socket.heard = False
        assert socket.pinged
        client.say(said)
        await until(lambda: socket.heard, "a sign of life")
        assert not socket.pinged
    assert await client.got(PING, 3) == [b""] * 3
    client.say(goodbye())
    await client.ended()


# Clients that others have written


@on_both_loops
async def test_client_of_aiohttp(server: Server) -> None:
    """aiohttp's client gets back what it sends, its pong, and the close handshake with its code."""
    async with aiohttp.ClientSession() as http:
        client = await http.ws_connect(
            f"{server.origin('http')}/ours", ssl=server.trust or True, protocols=(SUBPROTOCOL,), autoping=False
        )
        assert client.protocol == SUBPROTOCOL
        for text in ("hello", *("ü" * (size // 2) for size in LENGTHS)):
            await client.send_str(text)
        assert await client.receive_str() == "welcome"
        for size in LENGTHS:
            assert await client.receive_str() == "ü" * (size // 2)
        await client.ping(b"p")
        pong = await client.receive()
        assert (pong.type, pong.data) == (WSMsgType.PONG, b"p")
        await client.close(code=4998)
        assert client.close_code == 1000
    assert await (await server.accepted()).code == 4998


@on_both_loops
async def test_client_of_websockets(server: Server) -> None:
    """The client of websockets, which fragments, gets back what it sends, its pong, and the close handshake."""
    async with websockets.connect(
        f"{server.origin('ws')}/ours", ssl=server.trust, subprotocols=[websockets.Subprotocol(SUBPROTOCOL)]
    ) as client:
        await client.send("hello")
        assert await client.recv() == "welcome"
        await client.send(["one ", "two ", "three"])
        assert await client.recv() == "one two three"
        async with asyncio.timeout(PATIENCE_S):
            await (await client.ping(b"p"))
        await client.close(4998, "enough")
        assert client.close_code == 1000
    assert await (await server.accepted()).code == 4998
