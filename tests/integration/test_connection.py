"""The connection's fast parser against nats-py's own, however the bytes are cut."""

from __future__ import annotations

import asyncio
import random

from support.clock import until
from support.mesh import Mesh
from tidings.stream.connection import Connection, connect

STREAM = (
    b"MSG a.b 1 5\r\nhello\r\n"
    b"PING\r\n"
    b"MSG a.c 1 reply.to 0\r\n\r\n"
    b"HMSG a.d 1 reply.to 12 15\r\nNATS/1.0\r\n\r\nabc\r\n"
    b"HMSG a.e 1 31 31\r\nNATS/1.0 408 Request Timeout\r\n\r\n\r\n"
    b"+OK\r\n"
    b"MSG a.f 1 6\r\nMSG \r\n\r\n"
)
EXPECTED = [
    (b"a.b", b"", None, b"hello"),
    (b"a.c", b"reply.to", None, b""),
    (b"a.d", b"reply.to", b"NATS/1.0\r\n\r\n", b"abc"),
    (b"a.e", b"", b"NATS/1.0 408 Request Timeout\r\n\r\n", b""),
    (b"a.f", b"", None, b"MSG \r\n"),
]


async def test_every_cut_gives_the_same_messages() -> None:
    """Cut anywhere, in two or in many pieces: the same subjects, replies, headers and payloads, in order."""
    random.seed(1)
    stream = STREAM.replace(b"31 31", b"32 32")
    cuts = [[at] for at in range(1, len(stream))]
    cuts += [sorted(random.sample(range(1, len(stream)), 12)) for _ in range(200)]
    for cut in cuts:
        connection, seen = Connection(), []
        pings = []

        async def ping(pings: list[int] = pings) -> None:
            pings.append(1)

        connection._process_ping = ping
        connection.handlers[b"1"] = lambda *message, seen=seen: seen.append(message)
        for start, end in zip([0, *cut], [*cut, len(stream)], strict=True):
            await connection._ps.parse(stream[start:end])
        assert seen == EXPECTED, cut
        assert pings == [1], cut


async def test_handlers_survive_a_restart_of_the_server(mesh: Mesh) -> None:
    """A subscription by `listen` is there again after nats-server was killed."""
    heard = asyncio.Event()
    await mesh.connection.listen("test.again", lambda *message: heard.set())
    await mesh.connection.flush()
    mesh.nats.kill()
    await mesh.nats.answering()
    async with asyncio.timeout(20):
        while not heard.is_set():
            mesh.connection.send("test.again", b"")
            await asyncio.sleep(0.05)


async def test_gulps(mesh: Mesh) -> None:
    """A connection that reads in gulps gets everything, in order, in fewer reads; also while the server restarts."""
    connection = await connect(mesh.settings, "gulps")
    seen: list[bytes] = []
    reads = 0
    parse = connection._ps.parse

    async def counted(data: bytes = b"") -> None:
        nonlocal reads
        reads += 1
        await parse(data)

    connection._ps.parse = counted
    await connection.listen("test.gulps", lambda where, reply, header, body: seen.append(body))
    await connection.flush()
    connection.gulp_s = 0.05
    sent = [b"%d" % number for number in range(200)]
    for body in sent:
        mesh.connection.send("test.gulps", body)
        await mesh.connection.flush()
    await until(lambda: len(seen) == len(sent), "all have come")
    assert seen == sent
    assert reads < len(sent) / 2
    mesh.nats.kill()
    await mesh.nats.answering()
    await until(lambda: connection.is_connected and mesh.connection.is_connected, "both are connected again")
    await connection.flush()
    mesh.connection.send("test.gulps", b"again")
    await until(lambda: seen[-1] == b"again", "the message behind the restart has come")
    await connection.close()
