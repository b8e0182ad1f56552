"""What bounds the requests to JetStream's API, and who is let in where nobody else is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from support.clock import PATIENCE_S, until
from support.device import Device
from support.mesh import KEY, Mesh, issue
from tidings.gateway.agent import Gateway
from tidings.gateway.deletions import Deletions
from tidings.stream import consumers
from tidings.stream.connection import Connection, connect

STREAM = "NOTIFY_0"


async def left(mesh: Mesh) -> list[str]:
    """The sessions' consumers that the first partition has."""
    names: list[str] = (await mesh.connection.api("CONSUMER.NAMES.NOTIFY_0"))["consumers"] or []
    return [name for name in names if name != "inbox"]


async def made(mesh: Mesh, count: int) -> list[str]:
    """So many consumers in the first partition."""
    names = [f"gone{number}" for number in range(count)]
    for name in names:
        await consumers.create_session(
            mesh.connection, 0, name, "alice", start=1, window=1, ack_wait_s=30, idle_s=300
        )  # fmt: skip
    return names


class Deleting:
    """Deletions on a connection of their own, and the most of them that were ever under way."""

    def __init__(self, connection: Connection, at_once: int, most: int) -> None:
        self.deletions = Deletions(connection, lambda name: f"test.deleted.{name}", at_once=at_once, most=most)
        self.most = 0
        self.answers = 0

    def heard(self, where: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        self.most = max(self.most, self.deletions.under_way)
        self.answers += 1
        self.deletions.answered(where.rpartition(b".")[2].decode())


@pytest.fixture
async def deleting(mesh: Mesh) -> AsyncIterator[Deleting]:
    again: list[Deleting] = []

    async def found() -> None:
        again[0].deletions.reconnected()

    connection = await connect(mesh.settings, "deleting", found=found)
    one = Deleting(connection, 4, 1000)
    again.append(one)
    await connection.listen("test.deleted.*", one.heard)
    await connection.confirm()
    yield one
    one.deletions.close()
    await connection.close()


async def test_deletions_are_bounded(mesh: Mesh, deleting: Deleting) -> None:
    """Two hundred at once are four at a time for the server, and all are done."""
    for name in await made(mesh, 200):
        deleting.deletions.add(STREAM, name)
        deleting.deletions.add(STREAM, name)
    async with asyncio.timeout(PATIENCE_S):
        await deleting.deletions.settled()
    assert await left(mesh) == []
    assert deleting.most == 4
    assert deleting.answers == 200
    assert len(deleting.deletions) == 0


async def test_deletions_survive_a_broken_connection(mesh: Mesh, deleting: Deleting) -> None:
    """What was under way or waiting when the connection broke is done over the next one."""
    for name in await made(mesh, 100):
        deleting.deletions.add(STREAM, name)
    connection = deleting.deletions._connection
    transport: Any = connection._transport
    transport._io_writer.transport.abort()
    await until(lambda: connection.reconnects, "the connection is made anew")
    async with asyncio.timeout(PATIENCE_S):
        while await left(mesh):
            await asyncio.sleep(0.01)
    await until(lambda: not len(deleting.deletions), "all were answered")


async def test_deletions_that_are_not_answered_are_left_behind(mesh: Mesh, deleting: Deleting) -> None:
    """A server that is silent is not waited for: what it was asked is forgotten, some after the other."""
    names = await made(mesh, 6)
    assert mesh.nats.pid is not None
    os.kill(mesh.nats.pid, signal.SIGSTOP)
    try:
        for name in names:
            deleting.deletions.add(STREAM, name)
        async with asyncio.timeout(PATIENCE_S):
            await deleting.deletions.settled()
        assert deleting.answers == 0
    finally:
        os.kill(mesh.nats.pid, signal.SIGCONT)


async def test_more_deletions_than_are_remembered(mesh: Mesh) -> None:
    """The oldest are left behind, to end by themselves: nothing grows without a limit."""
    connection = await connect(mesh.settings, "deleting")
    await connection.close()
    deletions = Deleting(connection, 4, 10).deletions
    for number in range(100):
        deletions.add(STREAM, f"gone{number}")
    assert len(deletions) == 10
    assert deletions.under_way == 0
    # Without a connection nobody waits.
    await deletions.settled()


async def test_api_requests_are_bounded(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred questions at once are five at a time for the server, and all are answered."""
    connection = await connect(replace(mesh.settings, api_requests=5), "asking")
    under_way = most = 0
    ask = connection.ask

    async def counted(*args: Any, **options: Any) -> bytes:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await ask(*args, **options)
        finally:
            under_way -= 1

    monkeypatch.setattr(connection, "ask", counted)
    answers = await asyncio.gather(*(connection.api(f"STREAM.INFO.{STREAM}") for _ in range(100)))
    assert [answer["config"]["name"] for answer in answers] == [STREAM] * 100
    assert most == 5
    await connection.close()


async def test_who_has_a_session_here_is_always_let_in(mesh: Mesh) -> None:
    """While too many wait to be started, a device that is back within the linger is served, and a new one told when."""
    gateway = Gateway(replace(mesh.settings, linger_s=600), mesh.store)
    await gateway.start()
    url = f"http://127.0.0.1:{gateway.port}/v1/ws"
    alice, bob = Device(url, issue(KEY, "alice", "phone")), Device(url, issue(KEY, "bob", "phone"))
    await alice.connect()
    await alice.cut()
    await until(lambda: not any(session.socket for session in gateway.hub.by_id.values()), "the cut is noticed")
    assert gateway._door is not None
    admission = gateway._door._admission
    admission.waiting += 5000
    welcome = await alice.connect()
    assert welcome["t"] == "welcome"
    await alice.expect(*await mesh.publish("alice"))
    assert (await bob.connect())["code"] == "overloaded"
    assert await bob.closed() == 4503
    # Five thousand, at five hundred a second and half as many again, are before it.
    assert 6600 <= (await bob.expect_frame("bye"))["after_ms"] <= 7500
    admission.waiting -= 5000
    assert (await bob.connect())["t"] == "welcome"
    for device in (alice, bob):
        await device.close()
    await gateway.stop()


async def test_an_answer_after_the_close(mesh: Mesh) -> None:
    """What is answered, or added, once it is closed sends nothing more and leaves no timer."""
    connection = await connect(mesh.settings, "deleting")
    deletions = Deleting(connection, 1, 10).deletions
    for number in range(4):
        deletions.add(STREAM, f"gone{number}")
    deletions.close()
    deletions.answered("gone0")
    deletions.reconnected()
    deletions.add(STREAM, "late")
    assert len(deletions) == 0
    assert deletions._look is None
    await connection.close()
