"""`tidings explain`: what became of one notification, on a real mesh, as support asks every day."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from support.clock import PATIENCE_S
from support.command import answer
from support.mesh import Mesh
from tidings.stream import topology
from tidings.wire import subject
from tidings.wire.position import Position


async def explain(mesh: Mesh, id: str, *arguments: str, status: int = 0) -> dict[str, Any]:
    """What the command says, as JSON."""
    ran = await answer(
        *("explain", "--id", id, "--json", *arguments),
        TIDINGS_NATS_URL=mesh.settings.nats_url,
        TIDINGS_STORE_URL=mesh.settings.store_url,
    )
    assert ran.process.returncode == status, ran.lines
    story: dict[str, Any] = json.loads("\n".join(ran.out))
    return story


async def text(mesh: Mesh, id: str, *arguments: str) -> str:
    """What it says to a human."""
    ran = await answer(
        *("explain", "--id", id, *arguments),
        TIDINGS_NATS_URL=mesh.settings.nats_url,
        TIDINGS_STORE_URL=mesh.settings.store_url,
    )
    assert not ran.errors, ran.lines
    return "\n".join(ran.out)


def states(story: dict[str, Any]) -> dict[str, str]:
    return {one["device"]: one["state"] for one in story["devices"]}


async def delivery_noted(mesh: Mesh, user: str, id: str) -> dict[str, Any]:
    """Explain once the gateway has written down who had it first."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            story = await explain(mesh, id, "--user", user)
            if story["inbox"] and story["inbox"][0]["delivered"] is not None:
                return story


async def test_delivered_and_acknowledged(mesh: Mesh) -> None:
    """Where it lies, who had it first and when, and how far the user's other device is."""
    gateway, _ = await mesh.gateway(), await mesh.inbox()
    phone = await mesh.online(gateway, "zoë.b", "phone")
    tablet = await mesh.online(gateway, "zoë.b", "tablet", auto_ack=False)
    (id,) = await mesh.publish("zoë.b")
    await mesh.publish("alice")
    await phone.expect(id)
    await tablet.expect(id)
    await mesh.stored("zoë.b", id)
    story = await delivery_noted(mesh, "zoë.b", id)
    assert story["verdict"] == "delivered"
    (logged,), (row,) = story["log"], story["inbox"]
    assert (logged["user"], logged["type"], logged["message_id"]) == ("zoë.b", "test.made", id)
    assert logged["stream"] == f"NOTIFY_{subject.partition(subject.escape('zoë.b'), mesh.settings.partitions)}"
    assert logged["pos"] == row["pos"] == phone.items[0]["pos"]
    assert logged["stored"][:19] == row["stored"][:19] < logged["until"][:19]
    assert (row["delivered"]["device"], row["delivered"]["attempts"]) == ("phone", 1)
    assert (row["seen"], row["read"], row["archived"]) == (False, False, False)
    assert states(story) == {"phone": "acknowledged", "tablet": "under_way"}
    tablets = story["devices"][1]
    assert tablets["consumer"]["unacknowledged"] == 1
    assert any(tablets["gateway"] in line for line in gateway.output)
    assert "delivered: phone acknowledged it first, at " in story["summary"]
    # The partition's other users are not read: it is one subject of the stream.
    assert story["looked"][0]["messages"] == 1


async def test_offline_and_in_the_inbox(mesh: Mesh) -> None:
    """Stored, read on the page, archived: the marks are told, and the device that is away gets it when it comes."""
    gateway, _ = await mesh.gateway(linger_s=0), await mesh.inbox()
    phone = await mesh.online(gateway, "alice", "phone")
    await phone.leave()
    (id,) = await mesh.publish("alice")
    await mesh.stored("alice", id)
    async with asyncio.timeout(PATIENCE_S):
        while await mesh.store.holders("alice"):
            await asyncio.sleep(0.02)
    story = await explain(mesh, id, "--user", "alice")
    assert (story["verdict"], states(story)) == ("stored", {"phone": "offline"})
    assert "in the inbox; no device is known to have acknowledged it" in story["summary"]
    await mesh.store.mark("alice", [Position.parse(story["inbox"][0]["pos"])], "archived")
    (row,) = (await explain(mesh, id, "--user", "alice"))["inbox"]
    assert (row["seen"], row["read"], row["archived"], row["delivered"]) == (True, True, True, None)


async def test_a_user_without_devices(mesh: Mesh) -> None:
    """And before the inbox agent has it."""
    (id,) = await mesh.publish("alice")
    story = await explain(mesh, id, "--user", "alice")
    assert story["summary"] == "stored, in the log, and waits for the inbox agents; the user has no device"


async def test_copies_of_a_topic_message(mesh: Mesh) -> None:
    """For anybody: the message and its copies; for one of them: the copy, and what it is a copy of."""
    gateway, _, _ = await mesh.gateway(), await mesh.inbox(), await mesh.fanout()
    phones = [await mesh.online(gateway, user) for user in ("alice", "bob")]
    for phone in phones:
        assert (await phone.ask("sub", topics=["news.local"]))["t"] == "ok"
    (id,) = await mesh.publish_topic("news.local", "alice", "bob")
    for phone in phones:
        await phone.expect(id)
    for arguments in ((), ("--topic", "news.local")):
        story = await explain(mesh, id, *arguments)
        assert [one["topic"] for one in story["topics"]] == ["news.local"]
        assert sorted(one["user"] for one in story["log"]) == ["alice", "bob"]
        assert (story["verdict"], story["copies"], story["broadcasts"]) == ("stored", 2, [])
        assert "stored for 2 users" in story["summary"]
    story = await delivery_noted(mesh, "alice", id)
    assert (story["verdict"], len(story["topics"]), len(story["log"])) == ("delivered", 1, 1)
    assert story["log"][0]["topic"] == "news.local"


async def test_a_broadcast(mesh: Mesh) -> None:
    """One message for all: where it lies, and how far one user's device is."""
    gateway, _ = await mesh.gateway(), await mesh.inbox()
    await mesh.fanout(fanout_write_max=0)
    phone = await mesh.online(gateway, "alice")
    assert (await phone.ask("sub", topics=["news.>"]))["t"] == "ok"
    away = await mesh.online(gateway, "bob")
    (id,) = await mesh.publish_topic("news.local", "alice")
    await phone.expect(id)
    await mesh.broadcasts_stored()
    await phone.leave()
    await away.leave()
    story = await explain(mesh, id)
    assert (story["verdict"], len(story["broadcasts"]), story["log"]) == ("stored", 1, [])
    assert story["summary"].startswith("stored, and broadcast to the topic's subscribers")
    story = await explain(mesh, id, "--user", "alice")
    assert story["inbox"][0]["pos"] == story["broadcasts"][0]["pos"] == phone.items[0]["pos"]
    assert story["verdict"] in ("past", "delivered")
    # Who does not follow the topic has nothing of it.
    assert (await explain(mesh, id, "--user", "bob", status=1))["verdict"] == "unknown"


async def test_a_broadcast_that_is_in_no_inbox_yet(mesh: Mesh) -> None:
    """Found where the inbox agents have not been, for who follows its topic."""
    gateway = await mesh.gateway()
    await mesh.fanout(fanout_write_max=0)
    phone = await mesh.online(gateway, "alice")
    assert (await phone.ask("sub", topics=["news.local"]))["t"] == "ok"
    (id,) = await mesh.publish_topic("news.local", "alice")
    await phone.expect(id)
    story = await explain(mesh, id, "--user", "alice")
    assert (len(story["broadcasts"]), story["inbox"]) == (1, [])
    assert (await explain(mesh, id, "--user", "bob", status=1))["verdict"] == "unknown"


async def test_a_dead_letter(mesh: Mesh) -> None:
    """Why, and which device did not acknowledge it; another one did."""
    gateway, _ = await mesh.gateway(max_deliver=2, ack_wait_s=0.5), await mesh.inbox()
    phone = await mesh.online(gateway, "alice", auto_ack=False)
    (id,) = await mesh.publish("alice")
    await phone.expect(id)
    await mesh.stored("alice", id)
    async with asyncio.timeout(PATIENCE_S):
        while not await mesh.dead_letters():
            await asyncio.sleep(0.02)
    story = await explain(mesh, id, "--user", "alice")
    assert (story["verdict"], states(story)) == ("dead_letter", {"phone": "given_up"})
    (letter,) = story["dead"]
    assert (letter["reason"], letter["user"], letter["device"]) == ("undelivered", "alice", "phone")
    assert f"`tidings deadletters show {letter['id']}`" in story["summary"]
    assert (await explain(mesh, id))["dead"] == story["dead"]


async def test_expired_from_the_log(mesh: Mesh) -> None:
    """The inbox has it still, and the pages of its user lead to it."""
    gateway, _ = await mesh.gateway(), await mesh.inbox()
    phone = await mesh.online(gateway, "alice")
    ids = await mesh.publish("alice", 3)
    await phone.expect(*ids)
    await mesh.stored("alice", *ids)
    for partition in range(mesh.settings.partitions):
        await mesh.connection.api(f"STREAM.PURGE.{topology.notify_stream(partition)}")
    story = await delivery_noted(mesh, "alice", ids[0])
    assert (story["verdict"], story["log"], len(story["inbox"])) == ("delivered", [], 1)
    # Newest first: it was the last of the three.
    assert [look["messages"] for look in story["looked"] if look["where"].startswith("inbox")] == [3, 0]


async def test_unknown(mesh: Mesh) -> None:
    """It says where it looked, since when, and what that took; the exit status is 1."""
    await mesh.publish("alice", 2)
    story = await explain(mesh, "no-such", "--user", "alice", status=1)
    assert (story["verdict"], story["devices"]) == ("unknown", [])
    assert story["looked"][0]["messages"] == 2
    assert all(look["complete"] for look in story["looked"])
    said = await text(mesh, "no-such")
    assert said.startswith("no-such: not found: see below where, and since when.")
    assert f"all {mesh.settings.partitions} partitions, since " in said
    assert "DEAD, since " in said


async def test_the_search_is_bounded(mesh: Mesh) -> None:
    """By a number of messages, and by time: what was not looked at is told."""
    ids = await mesh.publish("alice", 5)
    story = await explain(mesh, ids[4], "--user", "alice", "--most", "3", status=1)
    assert story["looked"][0] | {"since": ""} == {**story["looked"][0], "since": "", "messages": 3, "complete": False}
    assert "not found, as far as was looked" in story["summary"]
    assert "and no further: narrow it" in await text(mesh, ids[4], "--user", "alice", "--most", "3")
    assert (await explain(mesh, ids[0], "--user", "alice", "--since", "2099-01-01T00:00:00Z", status=1))["log"] == []


async def test_what_it_prints_to_a_human(mesh: Mesh) -> None:
    """One section each, and nothing of a publisher's that steers a terminal."""
    await mesh.publish("alice")
    body = b'{"specversion":"1.0","id":"evil\\u001b[2J","source":"s","type":"t\\u001b"}'
    await mesh.connection.store(subject.notify_user("alice"), body)
    said = await text(mesh, "evil\x1b[2J", "--user", "alice")
    assert "\x1b" not in said
    assert said.splitlines()[0].startswith("evil\\x1b[2J of alice: stored, in the log")
    assert {"in the log", "looked at"} <= set(said.splitlines())


@pytest.mark.parametrize("arguments", [("--user", "a", "--topic", "b"), ("--most", "0"), ("--since", "soon")])
async def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    """Said with the usage, before anything is asked."""
    ran = await answer("explain", "--id", "x", *arguments)
    assert ran.process.returncode == 2, ran.lines
