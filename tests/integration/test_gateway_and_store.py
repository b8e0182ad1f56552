"""The gateway when its store is down, the hand-over from inbox to stream at every await, and who keeps a session."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest

from support.clock import until
from support.device import Device
from support.faulty import FaultyStore
from support.mesh import KEY, Mesh
from tidings.gateway.agent import Gateway
from tidings.gateway.session import SessionState
from tidings.identity import issue
from tidings.inbox.agent import InboxAgent
from tidings.wire import codes
from tidings.wire.codes import Close


@asynccontextmanager
async def inside(mesh: Mesh, **changed: Any) -> AsyncIterator[tuple[FaultyStore, Gateway, Device]]:
    """A gateway in this process, with a store that the test controls, and alice's phone (not connected)."""
    store = FaultyStore(mesh.store)
    settings = type(mesh.settings)(**{**_values(mesh), **changed})
    gateway = Gateway(settings, store)  # type: ignore[arg-type]
    await gateway.start()
    phone = Device(f"http://127.0.0.1:{gateway.port}/v1/ws", issue(KEY, "alice", "phone"))
    try:
        yield store, gateway, phone
    finally:
        await phone.close()
        await gateway.stop()


def _values(mesh: Mesh) -> dict[str, Any]:
    settings = mesh.settings
    return {name: getattr(settings, name) for name in type(settings).__slots__}


async def test_store_down_at_connect(mesh: Mesh) -> None:
    """Deliveries go on; the client is told that its inbox is to be paged later, and repaired when the store is back."""
    async with inside(mesh, linger_s=0) as (store, gateway, phone):
        await mesh.inbox()
        await phone.connect()
        await phone.expect(*await mesh.publish("alice", 2))
        await phone.leave()
        missed = await mesh.publish("alice", 3)
        await mesh.stored("alice", *missed)
        store.down = True
        await phone.connect()
        assert phone.welcome["pos"] is None
        assert phone.welcome["unread"] is None
        await phone.expect_frame("gap", missed=None)
        live = await mesh.publish("alice", 2)
        # The overlap of the stream covers what was missed a moment ago.
        await phone.expect(*missed, *live)
        answer = await phone.ask("inbox")
        assert (answer["t"], answer["code"]) == ("error", "store_unavailable")
        store.down = False
        assert await phone.closed() == 1012
        assert (await phone.expect_frame("bye"))["reconnect"] is True
        await until(lambda: not len(gateway.hub), "the blind session is gone")
        await phone.connect()
        assert phone.welcome["pos"] is not None
        mesh.ledger.check_device("alice", "phone", phone.ids)


async def test_store_down_at_connect_with_since(mesh: Mesh) -> None:
    """With `since`, a device goes on exactly where it was although nobody can look its cursor up."""
    async with inside(mesh, linger_s=0, overlap_s=0) as (store, _, phone):
        await mesh.inbox()
        await phone.connect()
        await phone.expect(*await mesh.publish("alice", 2))
        since = phone.items[-1]["pos"]
        await phone.leave()
        missed = await mesh.publish("alice", 3)
        store.down = True
        await phone.connect(since=since)
        await phone.expect(*missed)
        mesh.ledger.check_device("alice", "phone", phone.ids, most_copies=1)


async def test_unknown_to_the_store(mesh: Mesh) -> None:
    """A device that the store has no cursor of goes on from where it says, out of the inbox and then the log."""
    async with inside(mesh, linger_s=0) as (_, gateway, phone):
        await mesh.inbox()
        await phone.connect()
        await phone.expect(*await mesh.publish("alice", 2))
        since = phone.items[-1]["pos"]
        await phone.leave()
        missed = await mesh.publish("alice", 3)
        await mesh.stored("alice", *missed)
        await mesh.floors_announced()
        await until(lambda: not gateway.hub.released and not len(gateway.hub), "the session is gone")
        with closing(sqlite3.connect(mesh.folder / "tidings.db")) as db, db:
            assert db.execute("DELETE FROM cursors").rowcount == 1
        await phone.connect(since=since)
        await phone.expect(*missed)
        mesh.ledger.check_device("alice", "phone", phone.ids, most_copies=1)


async def test_store_fails_in_the_middle_of_a_catch_up(mesh: Mesh) -> None:
    """A catch-up that breaks off is announced as a gap, keeps its cursor, and is done when the store is back."""
    async with inside(mesh, linger_s=0) as (store, _, phone):
        await mesh.inbox()
        await phone.connect()
        await phone.leave()
        missed = await mesh.publish("alice", 100)
        await mesh.stored("alice", *missed)
        await mesh.floors_announced()
        pages = 0

        async def fail_on_the_second_page(name: str) -> None:
            nonlocal pages
            pages += name == "between"
            store.down = pages > 1

        store.before = fail_on_the_second_page
        await phone.connect()
        await phone.expect_frame("gap", missed=None)
        live = await mesh.publish("alice")
        await phone.expect(*live)
        store.before, store.down = None, False
        assert await phone.closed() == 1012
        await phone.connect()
        await phone.expect(*missed)


@pytest.mark.parametrize("stop_at", ["claim", "missed", "unread", "between"])
async def test_hand_over_replayed_at_every_await(mesh: Mesh, stop_at: str) -> None:
    """While a connection waits for the store, everything moves: rows are stored, floors are announced, more comes.

    Whatever the order, each notification comes once, in order.
    """
    # Another agent's process starts meanwhile, which takes its time: that is no store that is down.
    async with inside(mesh, linger_s=0, store_timeout_s=30) as (store, _, phone):
        inbox = await mesh.inbox()
        await phone.connect()
        await phone.expect(*await mesh.publish("alice"))
        await phone.leave()
        stored = await mesh.publish("alice", 3)
        await mesh.stored("alice", *stored)
        await mesh.floors_announced()
        await inbox.stop()
        await mesh.publish("alice", 3)
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def stop_here(name: str) -> None:
            if name == stop_at and not reached.is_set():
                reached.set()
                await go_on.wait()

        store.before = stop_here
        connecting = asyncio.create_task(phone.connect())
        await asyncio.wait_for(reached.wait(), 10)
        # The world moves while the connection stands still.
        await mesh.inbox()
        await mesh.publish("alice", 3)
        await mesh.stored("alice", *mesh.ledger.accepted["alice"])
        await mesh.floors_announced()
        go_on.set()
        await connecting
        await mesh.publish("alice", 3)
        await phone.expect(*mesh.ledger.accepted["alice"])
        assert phone.ids == mesh.ledger.accepted["alice"]


async def test_inbox_agent_waits_for_its_store(mesh: Mesh) -> None:
    """With the store down nothing is acknowledged and the buffer is bounded; afterwards everything is stored."""
    store = FaultyStore(mesh.store)
    values = {**_values(mesh), "inbox_batch": 8}
    agent = InboxAgent(type(mesh.settings)(**values), store)  # type: ignore[arg-type]
    await agent.start()
    try:
        store.down = True
        await asyncio.gather(*(mesh.publish(f"user{number % 10}") for number in range(300)))
        floors = [
            (await mesh.connection.api(f"CONSUMER.INFO.NOTIFY_{number}.inbox"))["ack_floor"]["stream_seq"]
            for number in range(mesh.settings.partitions)
        ]
        assert floors == [0] * mesh.settings.partitions
        assert len(agent._rows) <= 8 * 8
        store.down = False
        for user, ids in mesh.ledger.accepted.items():
            await mesh.stored(user, *ids)
        await mesh.ledger.check_store(mesh.store)
    finally:
        await agent.stop()


async def test_marks_wait_for_their_notification(mesh: Mesh) -> None:
    """A client may mark what the inbox agent has not stored yet: the mark is there when the row is."""
    async with inside(mesh) as (_, _, phone):
        await phone.connect()
        (id,) = await mesh.publish("alice")
        await phone.expect(id)
        answer = await phone.ask("mark", **{"as": "read", "pos": [phone.items[0]["pos"]]})
        assert answer["t"] == "ok"
        await mesh.inbox()
        await mesh.stored("alice", id)
        assert (await phone.ask("inbox"))["items"][0]["read"] is True
        assert (await phone.ask("count"))["unread"] == 0


@pytest.mark.parametrize("reason", [codes.TOO_SLOW, codes.BAD_FRAME], ids=lambda reason: reason.name)
async def test_session_of_a_dismissed_client(mesh: Mesh, reason: Close) -> None:
    """A client that is sent away finds its session when it may return, and else leaves none, as after a goodbye."""
    async with inside(mesh) as (_, gateway, phone):
        await mesh.inbox()
        await phone.connect()
        session = gateway.hub.find("alice", "phone")
        assert session is not None
        assert session.socket is not None
        session.socket.dismiss(reason)
        assert await phone.closed() == reason.code
        await until(lambda: session.socket is None, "the door has noticed")
        assert session.state is (SessionState.LINGERING if reason.reconnect else SessionState.ENDED)
        await phone.connect()
        again = gateway.hub.find("alice", "phone")
        assert (again is session) is reason.reconnect
        await phone.leave()
        await until(lambda: not len(gateway.hub), "a goodbye ends the session")
