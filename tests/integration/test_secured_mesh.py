"""A whole mesh under the generated permissions: every agent does its work, and is refused nothing that it needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from support.api import client, service
from support.clock import PATIENCE_S, until
from support.secured import SecuredMesh, secured_mesh
from tidings.publish import Publisher
from tidings.runtime.settings import Settings
from tidings.stream import topology
from tidings.wire import subject
from tidings.wire.position import Position


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[SecuredMesh]:
    async with secured_mesh(tmp_path) as running:
        yield running
        assert running.refusals() == []


def publisher(mesh: SecuredMesh, name: str) -> Publisher:
    """The service, with its own key."""
    return Publisher(Settings(nats_url=mesh.secured.url, nats_credentials=str(mesh.secured.key(f"publisher-{name}"))))


async def test_all_ways_of_a_notification(mesh: SecuredMesh) -> None:
    """To a user, to a topic as copies and as a broadcast, to one who is online and to one who was away."""
    await mesh.inbox()
    await mesh.fanout(fanout_write_max=1)
    gateway = await mesh.gateway()
    alice, bob = await mesh.online(gateway, "alice"), await mesh.online(gateway, "bob")
    for device, topics in ((alice, ["shop.news", "shop.alice"]), (bob, ["shop.news"])):
        assert (await device.ask("sub", topics=topics))["t"] == "ok"
    async with publisher(mesh, "shop") as shop:
        ids = [
            (await shop.publish("alice", "test.made")).id,
            (await shop.publish_topic("shop.alice", "test.made")).id,
            (await shop.publish_topic("shop.news", "test.made")).id,
        ]
        await alice.until(lambda: set(ids) <= set(alice.ids), "personal, copied and broadcast")
        await bob.until(lambda: ids[2] in bob.ids, "the broadcast")
        await bob.leave()
        late = [(await shop.publish("bob", "test.made")).id, (await shop.publish_topic("shop.news", "test.made")).id]
    await mesh.stored("bob", late[0])
    await mesh.broadcasts_stored()
    await bob.connect()
    await bob.until(lambda: set(late) <= set(bob.ids), "what came while he was away")


async def test_two_gateways(mesh: SecuredMesh) -> None:
    """A device goes from one to the other, marks are told across, a subscription is in force on both, one is killed."""
    await mesh.inbox()
    await mesh.fanout(fanout_write_max=0)
    one, other = await mesh.gateway(), await mesh.gateway()
    phone, tablet = await mesh.online(one, "alice", "phone"), await mesh.online(other, "alice", "tablet")
    async with publisher(mesh, "shop") as shop:
        first = (await shop.publish("alice", "test.made")).id
        await phone.until(lambda: first in phone.ids, "the notification")
        position = phone.items[0]["pos"]
        await mesh.stored("alice", first)
        assert (await phone.ask("mark", **{"as": "read", "pos": [position]}))["t"] == "ok"
        await tablet.until(lambda: any(frame["t"] == "state" for frame in tablet.frames), "the mark of the other")
        assert (await phone.ask("sub", topics=["shop.news"]))["t"] == "ok"
        told = (await shop.publish_topic("shop.news", "test.made")).id
        await tablet.until(lambda: told in tablet.ids, "a broadcast by the other device's subscription")
        # The cursor's way from one gateway to the other, while the first one lives: a claim.
        moved = await mesh.online(other, "alice", "phone", window=7)
        await phone.until(lambda: phone.close_code == 4409, "the older session ends")
        await other.kill_agent()
        await moved.until(lambda: moved.close_code is not None, "the gateway is gone")
        last = (await shop.publish("alice", "test.made")).id
        back = await mesh.online(one, "alice", "phone")
        await back.until(lambda: last in back.ids, "what came meanwhile")


async def test_dead_letters(mesh: SecuredMesh) -> None:
    """Each agent may keep what it cannot deliver: no event to a user, none to a topic, and one that stays unacked."""
    await mesh.inbox()
    await mesh.fanout(fanout_write_max=0)
    gateway = await mesh.gateway(max_deliver=1)
    silent = await mesh.online(gateway, "alice", auto_ack=False)
    assert (await silent.ask("sub", topics=["shop.news"]))["t"] == "ok"
    async with publisher(mesh, "shop") as shop:
        await shop.publish("alice", "test.made")
        await shop.publish_topic("shop.news", "test.made")
    await mesh.connection.store(subject.notify_user("bob"), b"no event")
    await mesh.connection.store(subject.notify_topic("shop.news"), b"no event")

    await silent.until(lambda: len(silent.items) >= 2, "the notification and the broadcast")
    async with asyncio.timeout(PATIENCE_S):
        while len(letters := await mesh.dead_letters()) < 4:
            await asyncio.sleep(0.02)
    reasons = sorted(letter["tidings-reason"] for letter in letters)
    assert reasons == ["invalid_notification", "invalid_notification", "undelivered", "undelivered"]


async def test_services_over_http(mesh: SecuredMesh) -> None:
    """The api agent publishes, remembers idempotency keys, has topics followed, reads dead letters and revokes."""
    await mesh.inbox()
    await mesh.fanout()
    gateway, agent = await mesh.gateway(), await mesh.api()
    alice = await mesh.online(gateway, "alice")
    await mesh.connection.store(subject.notify_user("bob"), b"no event")
    async with client(agent.port) as http:

        async def call(method: str, path: str, body: object = None, **more: str) -> Any:
            answer = await http.request(method, path, json=body, headers={**service(), **more})
            assert answer.is_success, answer.text
            return answer.json() if answer.content else None

        event = {"type": "test.made", "id": "h1"}
        for _ in range(2):
            await call("POST", "/v1/publish", {"user": "alice", "event": event}, **{"Idempotency-Key": "k1"})
        await alice.until(lambda: "h1" in alice.ids, "the notification")
        await mesh.stored("alice", "h1")
        await call("POST", "/v1/users/alice/marks", {"as": "read", "pos": [alice.items[0]["pos"]]})
        await alice.until(lambda: any(frame["t"] == "state" for frame in alice.frames), "the mark")
        await call("POST", "/v1/users/alice/subscriptions", {"topics": ["shop.news"]})
        await call("POST", "/v1/publish", {"topic": "shop.news", "event": {**event, "id": "h2"}})
        await alice.until(lambda: "h2" in alice.ids, "what was published to the topic")
        async with asyncio.timeout(PATIENCE_S):
            while not (letters := (await call("GET", "/v1/deadletters"))["letters"]):
                await asyncio.sleep(0.02)
        await call("DELETE", f"/v1/deadletters/{letters[0]['id']}")
        await call("POST", "/v1/revocations", {"user": "alice"})
        await alice.until(lambda: alice.close_code == 4401, "the session ends")


async def test_a_log_that_lost_its_end(mesh: SecuredMesh) -> None:
    """The inbox agent may give a stream its new incarnation."""
    found = await topology.discover(mesh.connection)
    await mesh.store.note_floors({0: Position(found.incarnations[0], 1000)})
    agent = await mesh.inbox()
    await agent.said("goes on under a new incarnation")
    await agent.said(r"reads \d+ partitions")
    async with asyncio.timeout(PATIENCE_S):
        while (await topology.discover(mesh.connection)).incarnations[0] != found.incarnations[0] + 1:
            await asyncio.sleep(0.02)


async def test_what_the_operator_does(mesh: SecuredMesh) -> None:
    """Streams are planned, applied and shown, the doctor finds nothing, tokens are revoked, a user is erased."""
    await mesh.inbox()
    gateway = await mesh.gateway()
    alice = await mesh.online(gateway, "alice")
    async with publisher(mesh, "shop") as shop:
        receipt = await shop.publish("alice", "test.made")
    await alice.until(lambda: receipt.id in alice.ids, "the notification")
    await mesh.stored("alice", receipt.id)
    store = {"TIDINGS_STORE_URL": mesh.settings.store_url, "TIDINGS_TOKEN_KEY": mesh.settings.token_key}

    def run(*words: str, key: str = "operator") -> str:
        return mesh.secured.tidings(*words, key=key, **store)

    # The waits of the command's settings are longer than the test's.
    assert "update consumer inbox on NOTIFY_0" in run("topology", "apply")
    assert "nothing to do" in run("topology", "plan")
    assert f"{mesh.settings.partitions} partitions" in run("topology", "show")
    assert "FAIL" not in run("doctor")
    assert receipt.id in run("user", "export", "--user", "alice")
    assert "alice: delivered: " in run("explain", "--id", receipt.id, "--user", "alice")
    assert "stored for alice" in run("explain", "--id", receipt.id)
    run("revoke", "--user", "alice")
    await alice.until(lambda: alice.close_code == 4401, "the session ends")
    assert "reason" in run("deadletters", "list", "--user", "alice")
    assert "log: 1 notifications deleted" in run("user", "erase", "--user", "alice")
    assert "NOTIFY_" in run("publish", "--user", "alice", "--type", "test.made", key="publisher-shop")


async def test_keys_are_exchanged(mesh: SecuredMesh) -> None:
    """A new key is let in beside the old one, until that is retired: then the old one's connection is cut."""
    old = mesh.secured.key("publisher-shop").read_text()
    before = publisher(mesh, "shop")
    async with before:
        mesh.secured.configure("--rotate", "shop")
        mesh.secured.reload()
        assert mesh.secured.key("publisher-shop").read_text() != old
        assert mesh.secured.key("publisher-shop.previous").read_text() == old
        async with publisher(mesh, "shop") as after:
            assert (await after.publish("alice", "test.made")).stream.startswith("NOTIFY_")
        assert (await before.publish("alice", "test.made")).stream.startswith("NOTIFY_")
        mesh.secured.configure("--retire", "shop")
        mesh.secured.reload()
        connection = before._connection
        assert connection is not None
        await until(lambda: not connection.is_connected, "the old key's connection is cut")
