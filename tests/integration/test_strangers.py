"""Connections that have not said whose they are, with and without TLS, on both event loops."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web

from support.certificates import Authority, settings_for
from support.clock import PATIENCE_S, until
from tidings.runtime.listening import listen
from tidings.runtime.porch import Porch, Runner
from tidings.runtime.service import Service
from tidings.runtime.settings import Settings

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


class Door:
    """A server of three strangers, and connections to it."""

    def __init__(self, stack: AsyncExitStack, porch: Porch, port: int) -> None:
        self._stack = stack
        self.porch = porch
        self.port = port

    async def knock(self, trust: ssl.SSLContext | None = None) -> Connection:
        """One more connection, which the server has noticed."""
        name = None if trust is None else "localhost"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=trust, server_hostname=name)
        # asyncio ends the connection of a reader that nobody has any more.
        self._stack.callback(lambda _: writer.transport.abort(), reader)
        return reader, writer

    async def silent(self, count: int) -> list[Connection]:
        """TCP connections that say nothing, one after the other."""
        found = []
        for _ in range(count):
            seen = len(self.porch) + self.porch.turned_away
            found.append(await self.knock())
            await until(lambda seen=seen: len(self.porch) + self.porch.turned_away > seen, "it was noticed")
        return found


@asynccontextmanager
async def door(settings: Settings) -> AsyncIterator[Door]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=request.scheme)

    app = web.Application()
    app.router.add_get("/", answer)
    porch = Porch(3)
    runner = Runner(app, porch, access_log=None)
    service = Service()
    await service.start()
    async with AsyncExitStack() as stack:
        port = await listen(service, runner, settings, ("127.0.0.1", 0), backlog=16, variable="PORT")
        try:
            yield Door(stack, porch, port)
        finally:
            await runner.cleanup()
            await service.stop()


async def ended(connection: Connection) -> bytes:
    async with asyncio.timeout(PATIENCE_S):
        try:
            return await connection[0].read()
        except ConnectionResetError:
            return b""


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a test's coroutine on one of the loops."""

    def run(test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(test)

    return run


@pytest.fixture(params=["plain", "tls"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    return Settings(**settings_for(Authority(tmp_path).pair("door")) if request.param == "tls" else {})


@pytest.mark.usefixtures("anyone_may_be_dropped")
def test_the_oldest_makes_room(run: Callable[..., None], settings: Settings) -> None:
    """Above the limit the one that is silent for longest goes, whether it has shaken hands or not."""

    async def test() -> None:
        async with door(settings) as one:
            clients = await one.silent(5)
            assert [await ended(client) for client in clients[:2]] == [b"", b""]
            assert (len(one.porch), one.porch.turned_away) == (3, 2)
            assert not any(reader.at_eof() for reader, _ in clients[2:])

    run(test())


@pytest.mark.usefixtures("anyone_may_be_dropped")
def test_who_has_gone_is_not_counted(run: Callable[..., None], settings: Settings) -> None:
    """Connections that their clients ended leave their places to others, and nobody is turned away."""

    async def test() -> None:
        async with door(settings) as one:
            for _ in range(5):
                for _, writer in await one.silent(3):
                    writer.transport.abort()
                await until(lambda: not len(one.porch), "all have gone")
            assert one.porch.turned_away == 0

    run(test())


def test_the_newest_is_turned_away(run: Callable[..., None], settings: Settings) -> None:
    """Where all have come within a second the newest finds no room: 503, or the end where TLS would come first."""

    async def test() -> None:
        async with door(settings) as one:
            *_, last = await one.silent(4)
            answer = await ended(last)
            assert answer.startswith(b"HTTP/1.1 503 ") or (settings.tls_certificate and answer == b"")
            assert len(one.porch) == 3

    run(test())


@pytest.mark.usefixtures("anyone_may_be_dropped")
def test_requests_behind_silent_handshakes(run: Callable[..., None], tmp_path: Path) -> None:
    """Whoever shakes hands is served beside connections that never do; their end leaves nothing behind."""
    authority = Authority(tmp_path)

    async def test() -> None:
        async with door(Settings(**settings_for(authority.pair("door")))) as one:
            await one.silent(3)
            for _ in range(5):
                reader, writer = await one.knock(authority.trust())
                writer.write(REQUEST)
                async with asyncio.timeout(PATIENCE_S):
                    assert (await reader.readuntil(b"https")).startswith(b"HTTP/1.1 200 ")
            assert one.porch.turned_away == 5
            await one.silent(2)
        assert len(one.porch) == 0

    run(test())


def test_a_handshake_has_its_time(run: Callable[..., None], tmp_path: Path) -> None:
    """What does not shake hands in the time of a hello ends, as what is no TLS does, and neither fills the log."""
    pair = Authority(tmp_path).pair("door")

    async def test() -> None:
        async with door(Settings(**settings_for(pair), hello_timeout_s=0.2)) as one:
            silent, garbage = await one.silent(2)
            garbage[1].write(REQUEST)
            for client in (silent, garbage):
                assert b"HTTP" not in await ended(client)
            await until(lambda: not len(one.porch), "both are forgotten")

    run(test())


@pytest.fixture
def anyone_may_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidings.runtime.porch._FAIR_S", 0.0)
